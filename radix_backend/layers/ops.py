"""The small operations between the matrix products: in torch, and where to get them compiled."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from radix_backend.layers.linear import Linear

log = logging.getLogger(__name__)


class FewRows(Protocol):
    """Products for a few rows with what surrounds them, in one pass over the weights."""

    max_rows: int

    def normed_product(self, residual: Tensor, norm: Tensor, eps: float, linear: Linear) -> Tensor:
        """The product of the RMS norm of ``residual`` [rows, hidden] f32 times ``norm``."""

    def gated_product(self, residual: Tensor, norm: Tensor, eps: float, linear: Linear) -> Tensor:
        """`Ops.silu_mul` of such a product."""

    def add_product(self, residual: Tensor, x: Tensor, linear: Linear) -> None:
        """Add the product of ``x`` to ``residual`` in place."""

    def product(self, x: Tensor, linear: Linear) -> Tensor:
        """The product of ``x`` [rows, in]."""

    def gated(self, x: Tensor, linear: Linear) -> Tensor:
        """`Ops.silu_mul` of it."""


class Ops(Protocol):
    """Everything is computed in f32 and rounded once, to the dtype of weights and activations."""

    def few_rows(self, largest: int) -> FewRows | None:
        """Fused products for layers of up to ``largest`` inputs, where there are any that beat separate ones."""

    def add_rms_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add ``delta`` to ``residual`` [tokens, hidden] f32 in place; return its RMS norm times ``weight`` [hidden].

        ``delta`` and the result are [tokens, hidden] of the dtype of ``weight``.
        """

    def norm_and_rotate(
        self,
        heads: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        num_heads: int,
        eps: float,
        positions: Tensor,
        table: Tensor,
    ) -> None:
        """RMS-norm each head if there are ``norms`` (for q, for k; [head_dim]), then apply rope, in place.

        ``heads`` [tokens, heads, head_dim] holds ``num_heads`` queries, then keys; what follows a token's heads may be
        something else. ``positions`` [tokens] int32; ``table`` is rope.cos_sin_table.
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up [tokens, inner] of both side by side [tokens, 2 * inner]."""


class TorchOps:
    def few_rows(self, largest: int) -> FewRows | None:
        return None

    def add_rms_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if delta is not None:
            residual += delta
        return _rms_norm(residual, weight, eps).to(weight.dtype)

    def norm_and_rotate(
        self,
        heads: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        num_heads: int,
        eps: float,
        positions: Tensor,
        table: Tensor,
    ) -> None:
        x = heads.float()
        if norms is not None:
            q, k = x[:, :num_heads], x[:, num_heads:]
            x = torch.cat([_rms_norm(q, norms[0], eps), _rms_norm(k, norms[1], eps)], dim=1)
        cos, sin = table[positions][:, None].chunk(2, dim=-1)
        first, second = x.chunk(2, dim=-1)
        heads.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(gate_up.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.float(), eps)


def cpu_ops(dtype: torch.dtype) -> Ops:
    """Compiled for ``dtype`` if numba works here, otherwise torch's with a warning."""
    try:
        from radix_backend.layers.compiled_ops import CompiledOps

        return CompiledOps(dtype)
    except Exception as error:  # numba fails in many ways, none of which is worth a server
        log.warning("no compiled layer operations, plain torch instead: %s: %s", type(error).__name__, error)
        return TorchOps()
