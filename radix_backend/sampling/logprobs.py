"""Log probabilities of tokens, by the model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from radix_backend.protocol import TokenLogprobs


def token_logprobs(logprobs: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    """Of each of ``tokens`` [rows] itself and of the ``counts[row]`` likeliest.

    ``logprobs`` [rows, vocabulary] is the log_softmax of the logits, f32.
    """
    own = logprobs.gather(1, tokens[:, None])
    ranks: list[int] = ((logprobs > own).sum(dim=1) + 1).tolist()
    likeliest = logprobs.topk(min(max(counts), logprobs.shape[1]), dim=1)
    ids = torch.cat([tokens[:, None], likeliest.indices], dim=1).cpu().numpy().astype(np.int32)
    values = torch.cat([own, likeliest.values], dim=1).cpu().numpy()
    return [
        TokenLogprobs(rank, ids[row, : count + 1].tobytes(), values[row, : count + 1].tobytes())
        for row, (rank, count) in enumerate(zip(ranks, counts, strict=True))
    ]
