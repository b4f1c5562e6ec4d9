"""The sampler in plain torch and numpy: the definition of what is drawn, and the fallback where nothing compiles."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from radix_backend.sampling.base import SamplingRows
from radix_backend.sampling.noise import gumbel, hash32


def sample(logits: Tensor, rows: SamplingRows, first: int = 0) -> tuple[Tensor, Tensor]:
    """See `Sampler`."""
    scores, tokens = logits.float().max(dim=-1)
    for row in np.flatnonzero(rows.temperature > 0).tolist():
        # By a tensor: CUDA multiplies by the reciprocal of a number, which rounds twice.
        scaled = logits[row].float() / torch.tensor(rows.temperature[row], device=logits.device)
        keep = scaled >= _threshold(scaled, int(rows.top_k[row]), float(rows.top_p[row]), float(rows.min_p[row]))
        candidates = keep.nonzero()[:, 0]
        noise = gumbel(hash32(rows.keys[row : row + 1], first + candidates.cpu().numpy()))[0]
        perturbed = scaled[candidates] + torch.from_numpy(noise).to(scaled.device)
        scores[row], winner = perturbed.max(dim=0)
        tokens[row] = candidates[winner]
    return tokens + first, scores


def _threshold(scaled: Tensor, top_k: int, top_p: float, min_p: float) -> float:
    """The least of ``scaled`` [vocabulary] that survives."""
    threshold = -math.inf
    if min_p > 0:
        threshold = float(scaled.max() + np.log(np.float32(min_p)))
    if 0 < top_k < len(scaled):
        threshold = max(threshold, float(scaled.topk(top_k).values[-1]))
    if top_p < 1:
        survivors = scaled[scaled >= threshold].sort(descending=True).values
        mass = survivors.double().softmax(dim=0).cumsum(dim=0)
        last = int(torch.searchsorted(mass, torch.tensor(top_p, dtype=torch.float64, device=mass.device)))
        threshold = float(survivors[min(last, len(survivors) - 1)])
    return threshold
