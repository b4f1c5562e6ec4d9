"""`Ops` in Triton language: one pass over memory each.

Importing this module raises ImportError where the triton package is missing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_backend.layers import cuda_few_rows
from radix_backend.layers.linear import Linear
from radix_backend.layers.ops import FewRows, TorchOps

_SILU_BLOCK = 1024


class CudaFewRows:
    max_rows = cuda_few_rows.MAX_ROWS

    def normed_product(self, residual: Tensor, norm: Tensor, eps: float, linear: Linear) -> Tensor:
        return cuda_few_rows.normed_product(residual, norm, eps, linear.weight, linear.bias)

    def gated_product(self, residual: Tensor, norm: Tensor, eps: float, linear: Linear) -> Tensor:
        return cuda_few_rows.gated_product(residual, norm, eps, linear.weight, linear.bias)

    def add_product(self, residual: Tensor, x: Tensor, linear: Linear) -> None:
        cuda_few_rows.add_product(residual, x, linear.weight, linear.bias)

    def product(self, x: Tensor, linear: Linear) -> Tensor:
        return cuda_few_rows.product(x, linear.weight, linear.bias)

    def gated(self, x: Tensor, linear: Linear) -> Tensor:
        return cuda_few_rows.gated(x, linear.weight, linear.bias)


class CudaOps(TorchOps):
    """Norm, activation and small products; the rotation is part of attention.cuda_kv_write."""

    def few_rows(self, largest: int) -> FewRows | None:
        return CudaFewRows() if largest <= cuda_few_rows.MAX_INPUTS else None

    def add_rms_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty(residual.shape, dtype=weight.dtype, device=residual.device)
        tokens, hidden = residual.shape
        if tokens:
            block = triton.next_power_of_2(hidden)
            _add_rms_norm[(tokens,)](
                residual,
                weight if delta is None else delta,
                weight,
                out,
                eps,
                hidden,
                ADD=delta is not None,
                BLOCK=block,
                num_warps=min(max(block // 512, 1), 16),
            )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(tokens, inner, dtype=gate_up.dtype, device=gate_up.device)
        if tokens:
            _silu_mul[(tokens, triton.cdiv(inner, _SILU_BLOCK))](gate_up, out, inner, BLOCK=_SILU_BLOCK, num_warps=4)
        return out


@triton.jit
def _add_rms_norm(residual, delta, weight, out, eps, hidden, ADD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * hidden
    i = tl.arange(0, BLOCK)
    mask = i < hidden
    x = tl.load(residual + at + i, mask=mask, other=0)
    if ADD:
        x += tl.load(delta + at + i, mask=mask, other=0).to(tl.float32)
        tl.store(residual + at + i, x, mask=mask)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / hidden + eps)
    tl.store(out + at + i, x * scale * tl.load(weight + i, mask=mask, other=0).to(tl.float32), mask=mask)


@triton.jit
def _silu_mul(gate_up, out, inner, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < inner
    gate = tl.load(gate_up + token * 2 * inner + i, mask=mask, other=0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * inner + inner + i, mask=mask, other=0).to(tl.float32)
    tl.store(out + token * inner + i, gate / (1.0 + tl.exp(-gate)) * up, mask=mask)
