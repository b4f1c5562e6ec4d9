import pytest
import torch

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.layers.cuda_ops import CudaOps
from radix_backend.layers.ops import TorchOps

pytestmark = on_gpu

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (5, 896), (3, 1024), (2, 5000)])
def test_norm_equals_torch(tokens, hidden, dtype):
    residual, weight = randn(tokens, hidden), randn(hidden, dtype=dtype, seed=1)
    for delta in (None, randn(tokens, hidden, dtype=dtype, seed=2)):
        ours, theirs = residual.clone(), residual.clone()
        result = CudaOps().add_rms_norm(ours, delta, weight, 1e-6)
        expected = TorchOps().add_rms_norm(theirs, delta, weight, 1e-6)
        assert result.dtype == dtype
        torch.testing.assert_close(result, expected, rtol=DTYPES[dtype], atol=1e-6)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inner"), [(1, 96), (3, 3072), (2, 4864)])
def test_activation_equals_torch(tokens, inner, dtype):
    gate_up = randn(tokens, 2 * inner, dtype=dtype) * 3
    torch.testing.assert_close(CudaOps().silu_mul(gate_up), TorchOps().silu_mul(gate_up), rtol=DTYPES[dtype], atol=1e-6)
