import pytest
import torch

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.layers.cuda_few_rows import add_product, gated, gated_product, normed_product, product
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 96), (3, 896, 130), (4, 1024, 18), (2, 4864, 7)])
def test_products_of_few_rows_equal_torch(rows, inputs, outputs, biased, dtype):
    residual, norm = randn(rows, inputs), randn(inputs, dtype=dtype, seed=1)
    weight = randn(2 * outputs, inputs, dtype=dtype, seed=2) / inputs**0.5
    bias = randn(2 * outputs, dtype=dtype, seed=3) if biased else None
    normed = torch.nn.functional.rms_norm(residual, (inputs,), norm.float(), 1e-6)
    expected = normed @ weight.float().T + (0 if bias is None else bias.float())
    tolerance = {"rtol": DTYPES[dtype] * 4, "atol": DTYPES[dtype] * 4}
    result = normed_product(residual, norm, 1e-6, weight, bias)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, **tolerance)
    activated = gated_product(residual, norm, 1e-6, weight, bias)
    assert activated.dtype == dtype
    torch.testing.assert_close(activated.float(), TorchOps().silu_mul(expected), **tolerance)
    x, sums = randn(rows, inputs, dtype=dtype, seed=4), randn(rows, 2 * outputs, seed=5)
    expected = sums + x.float() @ weight.float().T + (0 if bias is None else bias.float())
    add_product(sums, x, weight, bias)
    torch.testing.assert_close(sums, expected, **tolerance)
    expected = x.float() @ weight.float().T + (0 if bias is None else bias.float())
    torch.testing.assert_close(product(x, weight, bias).float(), expected, **tolerance)
    torch.testing.assert_close(gated(x, weight, bias).float(), TorchOps().silu_mul(expected), **tolerance)
