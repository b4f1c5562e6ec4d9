"""Attention by FlashInfer's kernels (https://github.com/flashinfer-ai/flashinfer, written against 0.6.14).

FlashInfer splits a batch's work on the CPU, by its lengths (a *plan*), before the kernels of a step are launched. The
plan is written to a pinned buffer and copied to the device from there, in stream order like everything that reads it.

Importing this module raises ImportError where the flashinfer or triton package is missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper, fast_decode_plan
from flashinfer.jit.attention import gen_batch_prefill_module
from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper, get_batch_prefill_module
from torch import Tensor

from radix_backend.attention.cuda import Attend, AttentionSetup, CudaAttention, DecodeBatch, PrefillBatch
from radix_backend.attention.cuda_page_lists import PageLists
from radix_backend.attention.kv_pool import KVPool

_PLANS = 4  # pinned buffers: steps in flight at most, and the one being planned
_INT_BYTES = 8 << 20  # what FlashInfer itself takes for a plan
_FLOAT_BYTES = 128 << 20  # what FlashInfer recommends for the parts of split rows
_TENSOR_CORE_GROUP = 4  # queries that share a KV head, from which tensor cores are worth it
_MAX_TILE = 128  # queries of a KV head that a prefill kernel takes at once


PrefillKernel = Literal["fa2", "fa3"]  # FlashAttention 2, or 3 for GPUs of compute capability 9.0


def load_compiled_prefill(kernel: PrefillKernel, dtype: torch.dtype, head_dim: int) -> bool:
    """Load the kernel if it has been compiled; returns whether it was. Raises whatever keeps it from loading."""
    variant = _prefill_variant(dtype, head_dim)
    if not gen_batch_prefill_module(kernel, *variant).is_compiled:
        return False
    get_batch_prefill_module(kernel, *variant)
    return True


def compile_prefill(kernel: PrefillKernel, dtype: torch.dtype, head_dim: int) -> None:
    """So that it can be loaded from then on. Takes minutes; raises whatever keeps it from that, nvcc's absence too."""
    get_batch_prefill_module(kernel, *_prefill_variant(dtype, head_dim))


def _prefill_variant(dtype: torch.dtype, head_dim: int) -> tuple[Any, ...]:
    """The types of queries, KV, output and indices, the sizes of keys' and values' heads, no rope, no options."""
    return dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, False, False, False


class FlashInferPrefill(CudaAttention):
    """Prefill by FlashInfer's paged wrapper; decode, q/k norm, rope and the KV write are those of `CudaAttention`."""

    def __init__(self, pool: KVPool, setup: AttentionSetup, prefill_kernel: PrefillKernel) -> None:
        super().__init__(pool, setup)
        keys, _ = pool.layer(0)
        _, kv_heads, self._page_size, head_dim = keys.shape
        self._shape = (setup.num_heads, kv_heads, head_dim, self._page_size)
        self._types = {"q_data_type": keys.dtype, "kv_data_type": keys.dtype}
        self._setup, self._prefill_kernel = setup, prefill_kernel
        self._floats = _floats(keys, setup.num_heads)
        self._prefillers: list[_Prefiller] = []  # by piece of a step
        self._prefiller(0)

    def extend(self, batch: PrefillBatch, piece: int = 0) -> Attend:
        """Plans too: it is never captured."""
        chunks, prefiller = batch.chunks, self._prefiller(piece)
        if len(chunks.num_tokens):
            ends, last_page_len = _page_columns(chunks.lengths, len(chunks.lengths), self._page_size)
            query_ends = torch.from_numpy(np.concatenate([[0], np.cumsum(chunks.num_tokens)]).astype(np.int32))
            prefiller.lists.fill(chunks.device_slots, chunks.device_lengths)
            with prefiller.workspace.planning(prefiller.wrapper):
                prefiller.wrapper.plan(
                    query_ends,
                    ends,
                    prefiller.lists.indices[: int(ends[-1])],
                    last_page_len,
                    *self._shape,
                    causal=True,
                    **self._types,
                )

        def attend(layer: int, heads: Tensor, norms: tuple[Tensor, Tensor] | None) -> Tensor:
            keys, values = self._write(layer, heads, norms, batch.positions, batch.slots)
            if not len(chunks.num_tokens):  # nothing but padding
                return torch.zeros_like(heads[:, : self._num_heads]).flatten(1)
            return self._run(prefiller.wrapper, heads, keys, values)

        return attend

    def _prefiller(self, piece: int) -> _Prefiller:
        while piece >= len(self._prefillers):
            lists = PageLists(self._setup.max_rows, self._setup.page_table, self._page_size)
            workspace = _Workspace(self._floats)
            wrapper = BatchPrefillWithPagedKVCacheWrapper(self._floats, "HND", backend=self._prefill_kernel)
            workspace.attach(wrapper)
            self._prefillers.append(_Prefiller(lists, workspace, wrapper))
        return self._prefillers[piece]

    def _run(self, wrapper: Any, heads: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q = heads[:, : self._num_heads]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        wrapper.run(q, (keys, values), out=out)
        return out.flatten(1)


class FlashInferAttention(FlashInferPrefill):
    """Decode by FlashInfer's paged wrappers too, one for each number of rows."""

    def __init__(self, pool: KVPool, setup: AttentionSetup, prefill_kernel: PrefillKernel) -> None:
        super().__init__(pool, setup, prefill_kernel)
        keys, _ = pool.layer(0)
        # Kernels for CUDA cores exist for groups of 1, 2, 3, 4 and 8: for all below this bound.
        self._tensor_cores = setup.num_heads // keys.shape[1] >= _TENSOR_CORE_GROUP
        self._decode_lists = PageLists(setup.max_rows, setup.page_table, self._page_size)
        self._decode_workspace = _Workspace(_floats(keys, setup.num_heads))
        self._decoders: dict[int, Any] = {}

    def plan_decode(self, rows: int, lengths: npt.NDArray[np.int64]) -> None:
        ends, last_page_len = _page_columns(lengths, rows, self._page_size)
        decoder = self._decoder(rows)
        with self._decode_workspace.planning(decoder):
            fast_decode_plan(
                decoder,
                ends,
                self._decode_lists.indices[:rows],  # only counted: `decode` fills the lists
                last_page_len,
                *self._shape,
                **self._types,
                global_override_indptr_cpu=ends,
            )

    def decode(self, batch: DecodeBatch) -> Attend:
        """Can be captured from the second call for this number of rows on; a replay follows the latest plan."""
        decoder = self._decoder(len(batch.slots))
        self._decode_lists.fill(batch.slots, batch.lengths)

        def attend(layer: int, heads: Tensor, norms: tuple[Tensor, Tensor] | None) -> Tensor:
            keys, values = self._write(layer, heads, norms, batch.positions, batch.slots)
            return self._run(decoder, heads, keys, values)

        return attend

    def _decoder(self, rows: int) -> Any:
        """A wrapper whose launches are the same whatever the lengths; a new one is planned for padding alone."""
        if rows not in self._decoders:
            lists = self._decode_lists
            decoder = BatchDecodeWithPagedKVCacheWrapper(
                self._decode_workspace.floats,
                "HND",
                use_cuda_graph=True,
                use_tensor_cores=self._tensor_cores,
                paged_kv_indptr_buffer=lists.ends[: rows + 1],
                paged_kv_indices_buffer=lists.indices,
                paged_kv_last_page_len_buffer=lists.last_page_len[:rows],
            )
            self._decode_workspace.attach(decoder)
            ends, last_page_len = _page_columns(np.empty(0, np.int64), rows, self._page_size)
            with self._decode_workspace.planning(decoder):
                decoder.plan(ends, lists.indices[:rows], last_page_len, *self._shape, **self._types)
            self._decoders[rows] = decoder
        return self._decoders[rows]


class _Workspace:
    """What the wrappers of a phase, or of a piece, share. Steps run one after the other, each after its plan's copy."""

    def __init__(self, floats: Tensor) -> None:
        """``floats``: made by `_floats`; another phase may have it too."""
        self.floats = floats
        self._ints = torch.empty(_INT_BYTES, dtype=torch.uint8, device=floats.device)
        self._pinned = [torch.empty(_INT_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_PLANS)]
        self._copied = [torch.cuda.Event() for _ in range(_PLANS)]
        self._current = 0

    def attach(self, wrapper: Any) -> None:
        # There is a public setter, but it makes another pinned buffer, and one alone could not be rotated.
        wrapper._int_workspace_buffer = self._ints

    @contextlib.contextmanager
    def planning(self, wrapper: Any) -> Iterator[None]:
        """Plan in a pinned buffer that no copy is reading. Waits only if the device is `_PLANS` plans behind."""
        self._current = (self._current + 1) % _PLANS
        self._copied[self._current].synchronize()
        wrapper._pin_memory_int_workspace_buffer = self._pinned[self._current]
        yield
        self._copied[self._current].record()


class _Prefiller(NamedTuple):
    lists: PageLists
    workspace: _Workspace
    wrapper: Any


def _floats(keys: Tensor, num_heads: int) -> Tensor:
    """Room for what parts of split rows leave; ``keys`` [pages, kv_heads, page_size, head_dim]: any layer's."""
    device, (_, kv_heads, _, head_dim) = keys.device, keys.shape
    # Rows are split until there are two tiles of queries for each SM; every tile leaves a part in f32.
    num_tiles = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    part_bytes = num_heads // kv_heads * _MAX_TILE * (head_dim + 1) * 4
    float_bytes = max(_FLOAT_BYTES, num_tiles * part_bytes + (1 << 20))
    return torch.zeros(float_bytes, dtype=torch.uint8, device=device)


def _page_columns(lengths: npt.NDArray[Any], rows: int, page_size: int) -> tuple[Tensor, Tensor]:
    """Page ends [rows + 1] and tokens in the last page [rows], int32 on the CPU, as `PageLists` makes them.

    ``lengths`` [up to rows]; the rows after them are padding.
    """
    padded = np.ones(rows, np.int64)
    padded[: len(lengths)] = lengths
    ends = np.zeros(rows + 1, np.int32)
    np.cumsum(-(-padded // page_size), out=ends[1:])
    return torch.from_numpy(ends), torch.from_numpy(((padded - 1) % page_size + 1).astype(np.int32))
