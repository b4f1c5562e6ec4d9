"""What a step tells an attention backend, and what the backend promises.

A step's tokens are laid out row after row. They are attended to in **sub-batches** of consecutive tokens, each of a
kind that has its own kernel: decode rows together, every prefill chunk for itself. Other kinds (rows that share the
pages of a prefix, half of a step that overlaps the other half) are further sub-batches of the same list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class DecodeRows:
    """Tokens ``first`` … ``first + len(slots) - 1``: one query a row, over all KV of its request up to itself."""

    first: int
    slots: Tensor  # [rows] int32
    lengths: Tensor  # [rows] int32: tokens attended to, the row's own included


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens ``first`` … ``first + num_tokens - 1``: consecutive tokens of one request, after ``cached`` others."""

    first: int
    num_tokens: int
    slot: int
    cached: int


@dataclass(frozen=True)
class AttentionStep:
    """The shape of one step, the same for all layers."""

    page_table: Tensor  # [slots, pages a request] int32: page ids of each slot's request, in order
    token_slots: Tensor  # [tokens] int32
    positions: Tensor  # [tokens] int32: index of each token in its request
    sub_batches: Sequence[DecodeRows | PrefillChunk]


class AttentionBackend(Protocol):
    """Owns the KV pool.

    The radix cache relies on one guarantee: in every layer the KV of *all* tokens of a step is written before any of
    them attends. So a row may read pages that another row of the same step fills.
    """

    def plan(self, step: AttentionStep) -> object:
        """What is computed once a step and passed to `attend` in each layer."""

    def attend(self, plan: object, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v, then attend.

        ``q`` [tokens, heads, head_dim], ``k`` and ``v`` [tokens, kv_heads, head_dim], rotated, of the pool's dtype;
        they may be views into one buffer. Returns [tokens, heads * head_dim].
        """
