"""Matrix products for a few rows in Triton language, fused with the norm before or the sum or activation after them.

With so few rows a product only reads its weights, and each launch costs as much as a megabyte of them. A program loads
its part of the weights at once, before it waits for the kernel ahead of it (programmatic dependent launch).

Importing this module raises ImportError where the triton package is missing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 4
MAX_INPUTS = 8192  # a program holds whole rows of the weights
_TILE = 8192  # weights in a program's registers


def normed_product(residual: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``rms_norm(residual) * norm @ weight.T + bias`` for ``residual`` [rows, in] f32, in the dtype of ``weight``."""
    out = torch.empty(len(residual), len(weight), dtype=weight.dtype, device=weight.device)
    _launch(residual, norm, eps, weight, bias, out, len(weight), gated=False, add=False)
    return out


def gated_product(residual: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(gate) * up of a `normed_product` whose ``weight`` [2 * inner, in] gives both, side by side."""
    inner = len(weight) // 2
    out = torch.empty(len(residual), inner, dtype=weight.dtype, device=weight.device)
    _launch(residual, norm, eps, weight, bias, out, inner, gated=True, add=False)
    return out


def add_product(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Add ``x @ weight.T + bias`` to ``residual`` [rows, out] f32 in place."""
    _launch(x, None, 0.0, weight, bias, residual, len(weight), gated=False, add=True)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` for ``x`` [rows, in], in the dtype of ``weight``."""
    out = torch.empty(len(x), len(weight), dtype=weight.dtype, device=weight.device)
    _launch(x, None, 0.0, weight, bias, out, len(weight), gated=False, add=False)
    return out


def gated(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(gate) * up of a `product` whose ``weight`` [2 * inner, in] gives both, side by side."""
    inner = len(weight) // 2
    out = torch.empty(len(x), inner, dtype=weight.dtype, device=weight.device)
    _launch(x, None, 0.0, weight, bias, out, inner, gated=True, add=False)
    return out


def _launch(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    outputs: int,
    *,
    gated: bool,
    add: bool,
) -> None:
    rows, inputs = x.shape
    block_k = int(triton.next_power_of_2(inputs))
    block_n = max(_TILE // block_k // (2 if gated else 1), 1)
    dependent = {"launch_pdl": True} if x.is_cuda else {}
    _product[(triton.cdiv(outputs, block_n),)](
        x,
        weight if norm is None else norm,
        weight,
        weight if bias is None else bias,
        out,
        eps,
        outputs,
        ROWS=rows,
        INPUTS=inputs,
        NORM=norm is not None,
        BIAS=bias is not None,
        GATED=gated,
        ADD=add,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        DEPENDENT=x.is_cuda,
        num_warps=4,
        **dependent,
    )


@triton.jit
def _product(
    x,
    norm,
    weight,
    bias,
    out,
    eps,
    outputs,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    mask = (n < outputs)[:, None] & (k < INPUTS)[None, :]
    at = n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    w = tl.load(weight + at, mask=mask, other=0)
    if GATED:
        w_up = tl.load(weight + outputs.to(tl.int64) * INPUTS + at, mask=mask, other=0)
    if NORM:
        gain = tl.load(norm + k, mask=k < INPUTS, other=0).to(tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for row in tl.static_range(ROWS):
        v = tl.load(x + row * INPUTS + k, mask=k < INPUTS, other=0).to(tl.float32)
        scale = 1.0
        if NORM:
            scale = 1.0 / tl.sqrt_rn(tl.sum(v * v, axis=0) / INPUTS + eps)
            v = v * gain
        y = tl.sum(w.to(tl.float32) * v[None, :], axis=1) * scale
        if BIAS:
            y += tl.load(bias + n, mask=n < outputs, other=0).to(tl.float32)
        if GATED:
            up = tl.sum(w_up.to(tl.float32) * v[None, :], axis=1) * scale
            if BIAS:
                up += tl.load(bias + outputs + n, mask=n < outputs, other=0).to(tl.float32)
            y = y / (1.0 + tl.exp(-y)) * up
        to = out + row * outputs + n
        if ADD:
            y += tl.load(to, mask=n < outputs, other=0)
        tl.store(to, y, mask=n < outputs)
