"""Log probabilities of a prompt's tokens, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from radix_backend.models.decoder import Decoder, Hidden
from radix_backend.protocol import TokenLogprobs
from radix_backend.sampling.logprobs import token_logprobs
from radix_backend.worker.batch_state import ScoredSpan

_ROWS = 64  # whose logits are computed at once: 39 MB in f32 for the largest vocabularies


def score_prompt(model: Decoder, hidden: Hidden, span: ScoredSpan, progress: Callable[[], None]) -> list[TokenLogprobs]:
    """Of the span's successors. In slices, so that the logits of a long prompt are never in memory at once."""
    scores: list[TokenLogprobs] = []
    for start in range(0, len(span.tokens), _ROWS):
        progress()
        successors = span.successors[start : start + _ROWS]
        rows = torch.tensor(span.tokens[start : start + _ROWS], device=successors.device)
        logprobs = torch.log_softmax(model.logits(hidden, rows).float(), dim=-1)
        scores += token_logprobs(logprobs, successors, [span.count] * len(rows))
    return scores
