"""What a request changes in the logits before it samples: biases, penalties, and tokens that are not allowed now.

The order and the formulas are vLLM's: bias, exclusions, repetition penalty (Keskar et al., "CTRL", 2019), then
frequency and presence penalties (as in OpenAI's API).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from radix_backend.sampling_params import MAX_BIAS, SamplingParams


def logits_rules(
    params: SamplingParams,
    stop_token_ids: Sequence[int],
    bad_words: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
) -> LogitsRules | None:
    """The rules of a request, if it has any."""
    shifts = params.logit_bias or params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    excludes = bad_words or (params.min_tokens and stop_token_ids)
    return LogitsRules(params, stop_token_ids, bad_words, device) if shifts or excludes else None


class LogitsRules:
    """The rules of one request, and how plain torch applies them."""

    def __init__(
        self,
        params: SamplingParams,
        stop_token_ids: Sequence[int],
        bad_words: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
    ) -> None:
        self.bias = {token: min(max(bias, -MAX_BIAS), MAX_BIAS) for token, bias in params.logit_bias.items()}
        self.bad_words = [tuple(word) for word in bad_words]
        self.min_tokens = params.min_tokens
        self.stops = tuple(stop_token_ids)  # excluded before `min_tokens` outputs
        self.repetition = params.repetition_penalty
        self.presence, self.frequency = params.presence_penalty, params.frequency_penalty
        # Whether logits change by amounts that bf16 would round away; otherwise tokens are only excluded.
        self.shifts = bool(self.bias or self.presence or self.frequency or self.repetition != 1)
        self._bias_ids = torch.tensor(list(self.bias), dtype=torch.int64, device=device)
        self._biases = torch.tensor(list(self.bias.values()), dtype=torch.float32, device=device)
        # A tensor: CUDA multiplies by the reciprocal of a number, which rounds twice.
        self._divisor = torch.tensor(self.repetition, dtype=torch.float32, device=device)
        self._stops = torch.tensor(self.stops, dtype=torch.int64, device=device)

    @property
    def until(self) -> int:
        """How many outputs there are when the rules end to matter: those of a minimum alone do."""
        return sys.maxsize if self.shifts or self.bad_words else self.min_tokens

    def apply(self, logits: Tensor, tokens: Tensor, prompt_len: int) -> None:
        """Change ``logits`` [vocabulary], f32 if this `shifts`, of the token after ``tokens``: prompt, then outputs."""
        outputs = tokens[prompt_len:]
        if self.bias:
            logits[self._bias_ids] += self._biases
        if len(outputs) < self.min_tokens:
            logits[self._stops] = -torch.inf
        if self.bad_words:
            self._exclude_bad_words(logits, outputs)
        if self.repetition != 1:
            seen = tokens.unique().long()
            theirs = logits[seen]
            logits[seen] = torch.where(theirs > 0, theirs / self._divisor, theirs * self._divisor)
        if self.presence or self.frequency:
            generated, counts = outputs.unique(return_counts=True)
            logits[generated.long()] -= self.frequency * counts.float() + self.presence

    def _exclude_bad_words(self, logits: Tensor, outputs: Tensor) -> None:
        longest = max(len(word) for word in self.bad_words)
        recent = tuple(outputs[max(len(outputs) - longest + 1, 0) :].tolist())
        for *start, last in self.bad_words:
            if not start or recent[-len(start) :] == tuple(start):
                logits[last] = -torch.inf
