"""Where two streams of a model in bf16 may part: at a tie, of which rounding has taken one side and then the other."""

from __future__ import annotations

import numpy as np
import torch
import transformers

from radix_backend.sampling.noise import gumbel, hash32, row_keys


def assert_equal_or_tied(
    reference: transformers.PreTrainedModel,
    prompt: list[int],
    first: list[int],
    second: list[int],
    tie: float,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """``first`` and ``second`` follow ``prompt``, drawn without top_k and the like. ``tie``: of two f32 logits.

    Where they differ first, what both have drawn is by the f32 ``reference`` as good as the best.
    """
    assert len(first) == len(second)
    if first == second:
        return
    at = next(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    with torch.inference_mode():
        scores = reference(torch.tensor([prompt + first[:at]])).logits[0, -1].numpy()
    if temperature:
        keys = row_keys(np.array([seed]), np.array([len(prompt) + at]))
        scores = scores + temperature * gumbel(hash32(keys, np.arange(len(scores))))[0]
    for token in (first[at], second[at]):
        assert scores.max() - scores[token] < tie, f"output {at} is {first[at]} and {second[at]}"
