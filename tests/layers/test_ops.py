import pytest
import torch

from radix_backend.layers.compiled_ops import CompiledOps
from radix_backend.layers.linear import Linear
from radix_backend.layers.ops import TorchOps
from radix_backend.layers.rope import cos_sin_table
from radix_backend.loading import Rope

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TOKENS = pytest.mark.parametrize("tokens", [1, 3, 300])


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def check(actual, expected):
    assert actual.dtype == expected.dtype
    exact = actual.dtype == torch.float32
    # In bf16 both round the same f32 values, which may lie on either side of a tie.
    torch.testing.assert_close(actual, expected, rtol=2e-6 if exact else 2**-7, atol=2e-6 if exact else 1e-6)


@DTYPES
@TOKENS
@pytest.mark.parametrize("with_delta", [True, False])
def test_compiled_norm_equals_torch(dtype, tokens, with_delta):
    residuals = [random(tokens, 576) * 10 for _ in range(2)]
    delta, weight = (random(tokens, 576, dtype=dtype) if with_delta else None), random(576, dtype=dtype)
    outs = [
        ops.add_rms_norm(residual, delta, weight, 1e-5)
        for ops, residual in zip((CompiledOps(dtype), TorchOps()), residuals, strict=True)
    ]
    check(*outs)
    assert torch.equal(*residuals)


@DTYPES
@TOKENS
@pytest.mark.parametrize("with_norms", [True, False])
def test_compiled_rotation_equals_torch(dtype, tokens, with_norms):
    norms = (random(24, dtype=dtype), random(25, dtype=dtype)[:24]) if with_norms else None
    positions = torch.randperm(512, generator=torch.Generator().manual_seed(0))[:tokens].int()
    table = cos_sin_table(Rope(10000.0), 24, 512)
    buffers = [random(tokens, 8, 24, dtype=dtype) for _ in range(2)]
    for ops, buffer in zip((CompiledOps(dtype), TorchOps()), buffers, strict=True):
        ops.norm_and_rotate(buffer[:, :6], norms, 4, 1e-6, positions, table)
    check(*buffers)
    assert torch.equal(buffers[0][:, 6:], random(tokens, 8, 24, dtype=dtype)[:, 6:])


@DTYPES
@TOKENS
def test_compiled_silu_mul_equals_torch(dtype, tokens):
    gate_up = random(tokens, 2 * 1536, dtype=dtype) * 20
    gate_up[0, :4] = torch.tensor([-1e4, 1e4, -88.0, 0.0])
    check(CompiledOps(dtype).silu_mul(gate_up), TorchOps().silu_mul(gate_up))


@pytest.mark.parametrize(("outputs", "inputs"), [(960, 576), (7, 5), (1, 64)])
@pytest.mark.parametrize("biased", [True, False])
@TOKENS
def test_bf16_products_are_right_packed_or_not(outputs, inputs, biased, tokens):
    weight, x = random(outputs, inputs, dtype=torch.bfloat16), random(tokens, inputs, dtype=torch.bfloat16)
    bias = random(outputs, dtype=torch.bfloat16) if biased else None
    with torch.inference_mode():
        actual = Linear(weight, bias)(x).float()
    expected = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-7 * inputs**0.5)
