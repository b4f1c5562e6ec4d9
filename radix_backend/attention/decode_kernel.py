"""Paged attention for single queries on a CPU: writes KV into pages, reads it from there.

Importing this module raises ImportError where numba is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import carray, njit
from torch import Tensor

from radix_backend.attention.kv_pool import KVPool
from radix_backend.layers.parallel import Kernel, element, exp, load, next_item, pointer, prefetch, store

_PARALLEL_FROM = 1 << 16  # elements of KV; less is done before another thread has woken up


@dataclass(frozen=True)
class Queries:
    """Single queries: tensors [queries] int32."""

    tokens: Tensor  # row of q and of the output
    slots: Tensor  # row of the page table
    lengths: Tensor  # tokens attended to
    total_length: int


class DecodeKernel:
    """Both kernels for one shape of pool."""

    def __init__(self, pool: KVPool, num_heads: int) -> None:
        """Compiles, or loads from the cache."""
        keys, _ = pool.layer(0)
        _, self._kv_heads, self._page_size, self._head_dim = keys.shape
        self._groups = num_heads // self._kv_heads
        self._write = _write_kernel(element(keys.dtype))
        self._decode = _decode_kernel(element(keys.dtype), self._head_dim, self._groups)

    def write(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, pages: Tensor, offsets: Tensor) -> None:
        """Put ``k`` and ``v`` [tokens, kv_heads, head_dim] (rows may be apart) at ``offsets`` in ``pages`` (int32)."""
        self._write(
            len(k),
            k.data_ptr(),
            v.data_ptr(),
            k.stride(0),
            v.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            len(keys),
            self._kv_heads,
            self._page_size,
            self._head_dim,
            pages.data_ptr(),
            offsets.data_ptr(),
            parallel=k.numel() > _PARALLEL_FROM,
        )

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, table: Tensor, queries: Queries, out: Tensor) -> None:
        """Fill the rows of ``out`` [tokens, heads, head_dim] that ``queries`` name from those of ``q`` (may be apart).

        ``table`` [slots, pages] int32.
        """
        self._decode(
            len(queries.tokens) * self._kv_heads,
            q.data_ptr(),
            q.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            len(keys),
            self._kv_heads,
            self._page_size,
            table.data_ptr(),
            table.shape[0],
            table.shape[1],
            queries.tokens.data_ptr(),
            queries.slots.data_ptr(),
            queries.lengths.data_ptr(),
            out.data_ptr(),
            len(q),
            parallel=queries.total_length * self._kv_heads * self._head_dim > _PARALLEL_FROM,
        )


def _write_kernel(like: np.generic) -> Kernel:
    def body(arguments):
        a = carray(arguments, 14)
        pages, kv_heads, page_size, head_dim = a[8], a[9], a[10], a[11]
        tokens = a[1]
        k = carray(pointer(a[2], like), tokens * a[4])
        v = carray(pointer(a[3], like), tokens * a[5])
        keys = carray(pointer(a[6], like), (pages, kv_heads, page_size, head_dim))
        values = carray(pointer(a[7], like), (pages, kv_heads, page_size, head_dim))
        token_pages = carray(pointer(a[12], np.int32(0)), tokens)
        token_offsets = carray(pointer(a[13], np.int32(0)), tokens)
        while True:
            token = next_item(arguments)
            if token < 0:
                break
            page, offset = token_pages[token], token_offsets[token]
            for head in range(kv_heads):
                k_at, v_at = token * a[4] + head * head_dim, token * a[5] + head * head_dim
                for d in range(head_dim):
                    keys[page, head, offset, d] = k[k_at + d]
                    values[page, head, offset, d] = v[v_at + d]

    return Kernel(body)


@njit(inline="always")
def _row(q, keys, values, pages, head, length, out, head_dim, groups):
    """Attention of the ``groups`` query heads that share the KV ``head``; q and out are [groups * head_dim].

    Scores first, then one softmax, then the weighted sum: the order of every sum depends on the row alone. Each token
    read asks for its neighbour in the next page, which may lie anywhere: 1.6 times as fast from DRAM.
    """
    page_size = keys.shape[2]
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    query = np.empty((groups, head_dim), np.float32)
    scores = np.empty((groups, length), np.float32)
    total = np.zeros((groups, head_dim), np.float32)
    for g in range(groups):
        for d in range(head_dim):
            query[g, d] = load(q[g * head_dim + d]) * scale
    for start in range(0, length, page_size):
        page = keys[pages[start // page_size], head]
        following = keys[pages[min(start + page_size, length - 1) // page_size], head]
        for offset in range(min(page_size, length - start)):
            prefetch(following[offset])
            for g in range(groups):
                score = np.float32(0)
                for d in range(head_dim):
                    score += query[g, d] * load(page[offset, d])
                scores[g, start + offset] = score
    for g in range(groups):
        highest = scores[g, 0]
        for i in range(length):
            highest = max(highest, scores[g, i])
        mass = np.float32(0)
        for i in range(length):
            weight = exp(scores[g, i] - highest)
            scores[g, i] = weight
            mass += weight
        for i in range(length):
            scores[g, i] /= mass
    for start in range(0, length, page_size):
        page = values[pages[start // page_size], head]
        following = values[pages[min(start + page_size, length - 1) // page_size], head]
        for offset in range(min(page_size, length - start)):
            prefetch(following[offset])
            for g in range(groups):
                weight = scores[g, start + offset]
                for d in range(head_dim):
                    total[g, d] += weight * load(page[offset, d])
    for g in range(groups):
        for d in range(head_dim):
            store(out, g * head_dim + d, total[g, d])


def _decode_kernel(like: np.generic, head_dim: int, groups: int) -> Kernel:
    def body(arguments):
        a = carray(arguments, 17)
        kv_heads, page_size = a[7], a[8]
        rows, num_tokens = a[1] // kv_heads, a[16]
        width = groups * head_dim
        q = carray(pointer(a[2], like), num_tokens * a[3])
        keys = carray(pointer(a[4], like), (a[6], kv_heads, page_size, head_dim))
        values = carray(pointer(a[5], like), (a[6], kv_heads, page_size, head_dim))
        table = carray(pointer(a[9], np.int32(0)), (a[10], a[11]))
        tokens = carray(pointer(a[12], np.int32(0)), rows)
        slots = carray(pointer(a[13], np.int32(0)), rows)
        lengths = carray(pointer(a[14], np.int32(0)), rows)
        out = carray(pointer(a[15], like), num_tokens * kv_heads * width)
        while True:
            item = next_item(arguments)
            if item < 0:
                break
            row, head = item // kv_heads, item % kv_heads
            q_at = tokens[row] * a[3] + head * width
            out_at = (tokens[row] * kv_heads + head) * width
            _row(
                q[q_at : q_at + width],
                keys,
                values,
                table[slots[row]],
                head,
                lengths[row],
                out[out_at : out_at + width],
                head_dim,
                groups,
            )

    return Kernel(body)
