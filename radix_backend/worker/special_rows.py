"""Rows that take more between logits and token than sampling settings say: rules, or log probabilities; and, where each
rank has a part of the logits, filters, which need all of them.

What a request wants is known when it enters; each step says which of its rows are concerned, in its staged block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from radix_backend.sampling.cuda_rules import pack_rules
from radix_backend.sampling.logits_rules import logits_rules
from radix_backend.worker.interface import Ints, NewRequest
from radix_backend.worker.staging import Staging

_NONE = -1  # no log probabilities wanted


@dataclass(frozen=True)
class SpecialRows:
    """Of a step's decode rows, or of its sampling chunks. Those whose log probabilities are wanted come first."""

    rows: Tensor  # [rows] int32: which of the logits are theirs
    slots: Tensor  # [rows] int32
    rules: Tensor  # [rows] int64: addresses of their rules on the device; 0: none
    scored: Ints  # [≤ rows]: which of the logits belong to the first of them
    counts: list[int]  # of the likeliest tokens to report for each of these


class SpecialState:
    """The wishes of each slot's request."""

    def __init__(self, max_bs: int, staging: Staging, device: torch.device, filters: bool) -> None:
        """``filters``: whether they make a row special."""
        self._staging, self._device = staging, device
        self._rules: list[Tensor | None] = [None] * max_bs
        self._addresses = np.zeros(max_bs, np.int64)
        self._ruled_until = np.zeros(max_bs, np.int64)  # outputs: then there are no rules any more
        self._counts = np.full(max_bs, _NONE)
        self._filters = filters
        self._filtered = np.zeros(max_bs, np.bool_)
        self._entering: list[tuple[Tensor, Ints]] = []

    def enter(self, request: NewRequest) -> None:
        slot, params = request.slot, request.params
        self._counts[slot] = _NONE if params.logprobs is None else params.logprobs
        self._ruled_until[slot] = 0
        self._filtered[slot] = self._filters and params.filters
        rules = logits_rules(params, request.stop_token_ids, request.bad_words)
        if rules is not None:
            words = pack_rules(rules, request.prompt_len)
            # Steps in flight may read the last request's: memory is given out again in the order of the stream.
            mine = torch.empty(len(words), dtype=torch.int32, device=self._device)
            self._rules[slot], self._addresses[slot] = mine, mine.data_ptr()
            self._ruled_until[slot] = rules.until
            self._entering.append((mine, words))

    def put_rules(self) -> list[tuple[Tensor, Tensor]]:
        """Stage the rules of requests that have entered: where they will be, and what is to be copied there."""
        entering, self._entering = self._entering, []
        return [(mine, self._staging.put(words)) for mine, words in entering]

    def put(self, slots: Ints, num_outputs: npt.NDArray[np.int64]) -> SpecialRows | None:
        """Stage which of the rows that sample for ``slots`` [rows], after so many outputs, are special, if any."""
        ruled = num_outputs < self._ruled_until[slots]
        scored = self._counts[slots] != _NONE
        other = (ruled | self._filtered[slots]) & ~scored
        if not (scored | other).any():
            return None
        first = np.flatnonzero(scored).astype(np.int32)
        rows = np.concatenate([first, np.flatnonzero(other).astype(np.int32)])
        addresses = np.where(ruled[rows], self._addresses[slots[rows]], 0)
        return SpecialRows(
            rows=self._staging.put(rows),
            slots=self._staging.put(slots[rows]),
            rules=self._staging.put(addresses.view(np.int32)).view(torch.int64),
            scored=first,
            counts=self._counts[slots[first]].tolist(),
        )
