"""What the offline `LLM` answers, filled delta by delta."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from radix_backend.protocol import Logprob, Receipt
from radix_backend.sidecar.sink import Delta


@dataclass
class Completion:
    """One continuation of a prompt: what there is of it so far, or all of it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""  # "stop" or "length"; "" while it goes on
    logprobs: list[list[Logprob]] = field(
        default_factory=list
    )  # if asked for: of each token itself, then the likeliest
    receipt: Receipt | None = None  # what it cost, once it is complete

    @property
    def cumulative_logprob(self) -> float | None:
        """Natural logarithm of the probability of all its tokens; None unless ``logprobs`` were asked for."""
        return sum(token.logprob for token, *_ in self.logprobs) if self.logprobs else None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids.tolist()
        self.logprobs += delta.logprobs
        self.finish_reason, self.receipt = delta.finish_reason, delta.receipt


@dataclass
class Output:
    """A prompt and its completions. ``text``, ``token_ids`` and so on are those of the first one."""

    prompt: Any  # as it was given: text, token ids or messages
    completions: list[Completion]  # as many as `SamplingParams.n`
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[list[Logprob]] = field(default_factory=list)  # if asked for, from the second token on

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.completions[0].finish_reason

    @property
    def logprobs(self) -> list[list[Logprob]]:
        return self.completions[0].logprobs

    @property
    def cumulative_logprob(self) -> float | None:
        return self.completions[0].cumulative_logprob

    @property
    def receipt(self) -> Receipt | None:
        return self.completions[0].receipt

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason for completion in self.completions)

    def add(self, delta: Delta) -> None:
        if delta.input_ids is not None:
            self.prompt_token_ids = delta.input_ids.tolist()
        elif delta.prompt_logprobs:
            self.prompt_logprobs += delta.prompt_logprobs
        else:
            self.completions[delta.index].add(delta)
