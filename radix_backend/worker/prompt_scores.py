"""Log probabilities of a prompt's tokens, on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from radix_backend.models.decoder import Decoder, Hidden
from radix_backend.sampling.logprobs import score_tokens
from radix_backend.worker.interface import Ints, NewRequest

_ROWS = 64  # whose logits are computed at once: 39 MB in f32 for the largest vocabularies
_NONE = -1  # no log probabilities wanted


@dataclass(frozen=True)
class ScoredSpan:
    """Consecutive prompt tokens of one row whose successors, prompt tokens too, are to be scored."""

    tokens: range  # their indices in the step
    successors: Tensor  # [tokens] int32
    count: int  # of the likeliest tokens to report for each


class PromptScores:
    """What of each slot's prompt is to be scored."""

    def __init__(self, max_bs: int) -> None:
        self._count = np.full(max_bs, _NONE)
        self._prompt_len = np.zeros(max_bs, np.int64)
        self._num_scored = np.zeros(max_bs, np.int64)

    def enter(self, request: NewRequest) -> None:
        wanted = request.params.prompt_logprobs
        self._count[request.slot] = _NONE if wanted is None else wanted
        self._prompt_len[request.slot] = request.prompt_len
        self._num_scored[request.slot] = max(request.num_scored, 1)

    def spans(
        self, slots: Ints, cached: npt.NDArray[np.int64], num_tokens: npt.NDArray[Any], token_ids: Tensor
    ) -> list[ScoredSpan]:
        """Of rows that lie one after the other: ``num_tokens`` [rows] of ``slots``, after ``cached`` others.

        ``token_ids`` [slots, positions] int32 hold the prompts.
        """
        found = []
        ends = np.cumsum(num_tokens)
        for row in np.flatnonzero(self._count[slots] != _NONE).tolist():
            slot, after = int(slots[row]), int(cached[row]) + int(num_tokens[row])
            first = max(int(cached[row]) + 1, int(self._num_scored[slot]))
            last = min(after + 1, int(self._prompt_len[slot]))
            if first < last:
                stop = int(ends[row]) - (after + 1 - last)
                tokens = range(stop - (last - first), stop)
                found.append(ScoredSpan(tokens, token_ids[slot, first:last].clone(), int(self._count[slot])))
        return found


def score_prompt(model: Decoder, hidden: Hidden, span: ScoredSpan, progress: Callable[[], None]) -> Tensor:
    """Of the span's successors, as `score_tokens` does. In slices, so that the logits of a long prompt are never in
    memory at once."""
    scores = []
    for start in range(0, len(span.tokens), _ROWS):
        progress()
        tokens = span.tokens[start : start + _ROWS]
        rows = torch.arange(tokens.start, tokens.stop, device=span.successors.device)
        logprobs = torch.log_softmax(model.whole_logits(hidden, rows).float(), dim=-1)
        scores.append(score_tokens(logprobs, span.successors[start : start + _ROWS], span.count))
    return torch.cat(scores)
