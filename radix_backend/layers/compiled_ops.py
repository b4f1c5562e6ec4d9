"""`Ops` as numba kernels: one pass over memory and one call each, where eager torch takes up to ten.

Importing this module raises ImportError where numba is missing.
"""

from __future__ import annotations

import struct

import numpy as np
import torch
from numba import carray
from torch import Tensor

from radix_backend.layers.ops import FewRows
from radix_backend.layers.parallel import FLOAT32, Kernel, element, exp, load, next_item, pointer, store

_PARALLEL_FROM = 1 << 17  # elements; waking another thread costs as much as less work


class CompiledOps:
    """For one dtype of weights and activations."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Compiles, or loads from the cache."""
        self._add_rms_norm = _add_rms_norm_kernel(element(dtype))
        self._norm_and_rotate = _norm_and_rotate_kernel(element(dtype))
        self._silu_mul = _silu_mul_kernel(element(dtype))

    def few_rows(self, largest: int) -> FewRows | None:
        return None

    def add_rms_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty(residual.shape, dtype=weight.dtype)
        self._add_rms_norm(
            len(residual),
            residual.data_ptr(),
            0 if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            residual.shape[1],
            _bits(eps),
            parallel=residual.numel() > _PARALLEL_FROM,
        )
        return out

    def norm_and_rotate(
        self,
        heads: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        num_heads: int,
        eps: float,
        positions: Tensor,
        table: Tensor,
    ) -> None:
        tokens, all_heads, head_dim = heads.shape
        self._norm_and_rotate(
            tokens,
            heads.data_ptr(),
            heads.stride(0),
            all_heads,
            num_heads,
            head_dim,
            norms[0].data_ptr() if norms else 0,
            norms[1].data_ptr() if norms else 0,
            _bits(eps),
            positions.data_ptr(),
            table.data_ptr(),
            len(table),
            parallel=heads.numel() > _PARALLEL_FROM,
        )

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        tokens, width = gate_up.shape
        out = torch.empty(tokens, width // 2, dtype=gate_up.dtype)
        self._silu_mul(
            tokens, gate_up.data_ptr(), out.data_ptr(), width // 2, parallel=gate_up.numel() > _PARALLEL_FROM
        )
        return out


def _bits(value: float) -> int:
    """A kernel's arguments are integers: the bits of an f32."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def _add_rms_norm_kernel(like: np.generic) -> Kernel:
    def body(arguments):
        a = carray(arguments, 8)
        tokens, hidden, eps = a[1], a[6], np.int32(a[7]).view(np.float32)
        residual = carray(pointer(a[2], FLOAT32), (tokens, hidden))
        delta = carray(pointer(a[3], like), (tokens, hidden))
        weight = carray(pointer(a[4], like), hidden)
        out = carray(pointer(a[5], like), (tokens, hidden))
        while True:
            token = next_item(arguments)
            if token < 0:
                break
            x = residual[token]
            if a[3] != 0:
                for i in range(hidden):
                    x[i] += load(delta[token, i])
            squares = np.float32(0)
            for i in range(hidden):
                squares += x[i] * x[i]
            scale = np.float32(1) / np.sqrt(squares / np.float32(hidden) + eps)
            row = out[token]
            for i in range(hidden):
                store(row, i, x[i] * scale * load(weight[i]))

    return Kernel(body)


def _norm_and_rotate_kernel(like: np.generic) -> Kernel:
    def body(arguments):
        a = carray(arguments, 13)
        tokens, stride, all_heads, num_heads, head_dim = a[1], a[3], a[4], a[5], a[6]
        half = head_dim // 2
        eps = np.int32(a[9]).view(np.float32)
        heads = carray(pointer(a[2], like), tokens * stride)
        q_norm, k_norm = carray(pointer(a[7], like), head_dim), carray(pointer(a[8], like), head_dim)
        positions = carray(pointer(a[10], np.int32(0)), tokens)
        table = carray(pointer(a[11], FLOAT32), (a[12], head_dim))
        x = np.empty(head_dim, np.float32)
        while True:
            token = next_item(arguments)
            if token < 0:
                break
            angles = table[positions[token]]
            for h in range(all_heads):
                at = token * stride + h * head_dim
                head = heads[at : at + head_dim]
                for d in range(head_dim):
                    x[d] = load(head[d])
                if a[7] != 0:
                    squares = np.float32(0)
                    for d in range(head_dim):
                        squares += x[d] * x[d]
                    scale = np.float32(1) / np.sqrt(squares / np.float32(head_dim) + eps)
                    norm = q_norm if h < num_heads else k_norm
                    for d in range(head_dim):
                        x[d] *= scale * load(norm[d])
                for d in range(half):
                    cos, sin = angles[d], angles[half + d]
                    store(head, d, x[d] * cos - x[half + d] * sin)
                    store(head, half + d, x[half + d] * cos + x[d] * sin)

    return Kernel(body)


def _silu_mul_kernel(like: np.generic) -> Kernel:
    def body(arguments):
        a = carray(arguments, 5)
        tokens, inner = a[1], a[4]
        gate_up = carray(pointer(a[2], like), (tokens, 2, inner))
        out = carray(pointer(a[3], like), (tokens, inner))
        while True:
            token = next_item(arguments)
            if token < 0:
                break
            row = out[token]
            for i in range(inner):
                gate = load(gate_up[token, 0, i])
                store(row, i, gate / (np.float32(1) + exp(-gate)) * load(gate_up[token, 1, i]))

    return Kernel(body)
