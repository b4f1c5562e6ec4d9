"""Log probabilities of tokens, by the model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from radix_backend.protocol import TokenLogprobs


def score_tokens(logprobs: Tensor, tokens: Tensor, most: int) -> Tensor:
    """Of each of ``tokens`` [rows] itself and of the ``most`` likeliest. Nothing is waited for.

    ``logprobs`` [rows, vocabulary] is the log_softmax of the logits, f32. Returns [rows, 3 + 2 * most] int32 for
    `token_logprobs`: the token's rank, its id, the ids of the likeliest, then the bits of all these' log probabilities.
    """
    own = logprobs.gather(1, tokens.long()[:, None])
    ranks = (logprobs > own).sum(dim=1, keepdim=True) + 1
    likeliest = logprobs.topk(min(most, logprobs.shape[1]), dim=1)
    ids = torch.cat([ranks, tokens[:, None], likeliest.indices], dim=1).int()
    return torch.cat([ids, own.view(torch.int32), likeliest.values.view(torch.int32)], dim=1)


def token_logprobs(scores: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """``scores`` as `score_tokens` makes them, on the CPU; of each row the ``counts[row]`` likeliest are reported."""
    columns = scores.numpy()
    ids, values = columns[:, 1 : (columns.shape[1] + 1) // 2], columns[:, (columns.shape[1] + 1) // 2 :]
    return [
        TokenLogprobs(int(columns[row, 0]), ids[row, : count + 1].tobytes(), values[row, : count + 1].tobytes())
        for row, count in enumerate(counts)
    ]
