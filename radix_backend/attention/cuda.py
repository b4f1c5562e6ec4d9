"""Attention on CUDA, q/k norm and rope included, with kernels in Triton language.

Importing this module raises ImportError where the triton package is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from radix_backend.attention.cuda_decode import CASCADE_ROWS, CudaDecode, DecodeTiles, decode_shape
from radix_backend.attention.cuda_extend import extend
from radix_backend.attention.cuda_kv_write import rotate_and_write
from radix_backend.attention.kv_pool import KVPool

# (layer, heads [tokens, heads, head_dim] as they leave the product, norms) → [tokens, heads * head_dim]
Attend = Callable[[int, Tensor, "tuple[Tensor, Tensor] | None"], Tensor]


@dataclass(frozen=True)
class DecodeBatch:
    """One token a row; tensors [rows] int32 on the device."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor  # -1: the row is padding
    lengths: Tensor  # tokens attended to, the row's own included; 0: padding
    page_ends: Tensor  # cumulative sum of the rows' pages, less those that their tiles read
    tiles: DecodeTiles  # of `CASCADE_ROWS` rows and more


@dataclass(frozen=True)
class Chunks:
    """A step's prefill chunks by columns [chunks] int32: on the CPU for those who plan, on the device for kernels."""

    num_tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]  # tokens of the request up to the chunk's end
    device_slots: Tensor
    device_lengths: Tensor


@dataclass(frozen=True)
class PrefillBatch:
    """Chunks, one after the other; tensors [tokens] int32 on the device."""

    positions: Tensor
    slots: Tensor
    tiles: Tensor  # cuda_extend.tiles
    chunks: Chunks


@dataclass(frozen=True)
class AttentionSetup:
    """What attention needs to know of a worker and its model."""

    page_table: Tensor  # [slots, pages] int32
    num_heads: int
    max_rows: int  # of a decode batch
    max_tiles: int  # of these
    rope_table: Tensor  # rope.cos_sin_table
    eps: float  # of the q/k norms


class CudaAttention:
    """Every layer writes the KV of all tokens of a batch before any of them attends (see `AttentionBackend`).

    Where a step's chunks are cut into several batches, a chunk may read pages that its own or an earlier one fills.
    """

    def __init__(self, pool: KVPool, setup: AttentionSetup) -> None:
        self.pool = pool  # until launches are captured, one with another number of pages may take its place
        self._page_table, self._num_heads = setup.page_table, setup.num_heads
        self._rope_table, self._eps = setup.rope_table, setup.eps
        keys, _ = pool.layer(0)
        num_sms = torch.cuda.get_device_properties(keys.device).multi_processor_count if keys.is_cuda else 4
        shape = decode_shape(keys.dtype, keys.shape[3], keys.shape[1], num_sms)
        self._decode_rows = CudaDecode(setup.max_rows, setup.num_heads, keys, shape, setup.max_tiles)

    def plan_decode(self, rows: int, lengths: npt.NDArray[np.int64]) -> None:
        """Called before each step of ``rows`` decode rows, captured or not; those beyond ``lengths`` are padding.

        ``lengths``: tokens attended to. The kernels here need no plan.
        """

    def decode(self, batch: DecodeBatch) -> Attend:
        """Can be captured."""

        def attend(layer: int, heads: Tensor, norms: tuple[Tensor, Tensor] | None) -> Tensor:
            keys, values = self._write(layer, heads, norms, batch.positions, batch.slots)
            q = heads[:, : self._num_heads]
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            tiles = batch.tiles if len(q) >= CASCADE_ROWS else None
            self._decode_rows(
                q, keys, values, self._page_table, batch.slots, batch.lengths, batch.page_ends, out, tiles
            )
            return out.flatten(1)

        return attend

    def extend(self, batch: PrefillBatch, piece: int = 0) -> Attend:
        """``piece``: which of a step's batches it is. In each layer those before it are written before it attends."""

        def attend(layer: int, heads: Tensor, norms: tuple[Tensor, Tensor] | None) -> Tensor:
            keys, values = self._write(layer, heads, norms, batch.positions, batch.slots)
            q = heads[:, : self._num_heads]
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            extend(q, keys, values, self._page_table, batch.tiles, out)
            return out.flatten(1)

        return attend

    def _write(
        self, layer: int, heads: Tensor, norms: tuple[Tensor, Tensor] | None, positions: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.pool.layer(layer)
        rotate_and_write(
            heads,
            self._num_heads,
            norms,
            self._eps,
            positions,
            self._rope_table,
            slots,
            self._page_table,
            keys,
            values,
        )
        return keys, values
