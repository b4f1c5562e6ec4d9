"""Attention on CUDA in plain torch and in f32, whatever the pool's dtype: the reference for its kernels.

Slow: a decode row reads as much KV as a request may have, so that the same launches fit any lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from radix_backend.attention.cuda import Attend, CudaAttention, DecodeBatch, PrefillBatch

_ELEMENTS = 1 << 26  # of keys, or of scores, in memory at once


class TorchAttention(CudaAttention):
    """q/k norm, rope and the KV write are those of `CudaAttention`."""

    def decode(self, batch: DecodeBatch) -> Attend:
        def attend(layer: int, heads: Tensor, norms: tuple[Tensor, Tensor] | None) -> Tensor:
            keys, values = self._write(layer, heads, norms, batch.positions, batch.slots)
            _, kv_heads, page_size, head_dim = keys.shape
            q = heads[:, : self._num_heads]
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            step = max(_ELEMENTS // (self._page_table.shape[1] * page_size * kv_heads * head_dim), 1)
            for first in range(0, len(q), step):
                rows = slice(first, first + step)
                pages = self._page_table[batch.slots[rows].clamp(min=0)]
                visible = batch.lengths[rows].clamp(min=1)[:, None]
                out[rows] = _attend(q[rows, None], _gather(keys, pages), _gather(values, pages), visible)[:, 0]
            return out.flatten(1)

        return attend

    def extend(self, batch: PrefillBatch, piece: int = 0) -> Attend:
        chunks = batch.chunks

        def attend(layer: int, heads: Tensor, norms: tuple[Tensor, Tensor] | None) -> Tensor:
            keys, values = self._write(layer, heads, norms, batch.positions, batch.slots)
            q = heads[:, : self._num_heads]
            out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
            first = 0
            for chunk, (count, length) in enumerate(
                zip(chunks.num_tokens.tolist(), chunks.lengths.tolist(), strict=True)
            ):
                pages = self._page_table[chunks.device_slots[chunk : chunk + 1]]
                pages = pages[:, : -(-length // keys.shape[2])]
                k, v = _gather(keys, pages), _gather(values, pages)
                step = max(_ELEMENTS // (length * self._num_heads), 1)
                for start in range(0, count, step):
                    tokens = slice(first + start, first + min(start + step, count))
                    visible = batch.positions[tokens][None] + 1
                    out[tokens] = _attend(q[None, tokens], k, v, visible)[0]
                first += count
            return out.flatten(1)

        return attend


def _gather(pool: Tensor, pages: Tensor) -> Tensor:
    """KV of ``pages`` [rows, pages]: [rows, kv_heads, tokens, head_dim] f32."""
    return pool[pages.long()].transpose(1, 2).flatten(2, 3).float()


def _attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """``q`` [rows, tokens, heads, head_dim], each over its first ``visible`` [rows, tokens] keys; shaped like ``q``."""
    rows, tokens, heads, head_dim = q.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    grouped = q.float().view(rows, tokens, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    seen = torch.arange(length, device=q.device) < visible[..., None]  # [rows, tokens, length]
    hidden = ~seen.repeat(1, heads // kv_heads, 1)[:, None]
    weights = (grouped @ keys.transpose(2, 3) * head_dim**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    # What nobody wrote may be NaN, which no weight of zero would silence.
    values = values.masked_fill(~seen.any(1)[:, None, :, None], 0)
    out = (weights @ values).view(rows, kv_heads, -1, tokens, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(q.shape).to(q.dtype)
