"""What a client gets of a request it submitted."""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from radix_backend.errors import RadixError
from radix_backend.protocol import FINISH_REASONS, RUNNING, Logprob, Receipt


class Delta(msgspec.Struct, frozen=True):
    """What a step, or several, added to one completion.

    ``token_ids`` is a read-only view into the step's message: copy what you keep for long. Both it and ``text`` may be
    empty.
    """

    token_ids: npt.NDArray[np.int32]
    text: str
    finish: int = RUNNING  # in the last one of its completion STOP, LENGTH or ABORT
    receipt: Receipt | None = None  # in the last one
    index: int = 0  # which of `SamplingParams.n` completions
    logprobs: list[list[Logprob]] = []  # if asked for: for each token itself, then the likeliest
    num_input_tokens: int = 0  # in the first one of its completion, which has nothing else but
    input_ids: npt.NDArray[np.int32] | None = None  # the prompt's tokens, if asked for
    prompt_logprobs: list[list[Logprob]] = []  # if asked for, before any token: the prompt's next, from the second on

    @property
    def finish_reason(self) -> str:
        """ "stop", "length", "abort"; "" before the last one."""
        return FINISH_REASONS[self.finish]


class Choice:
    """One completion: how it stands, and what was not sent of it yet (the tokens of one step or several)."""

    def __init__(self) -> None:
        self.finish = RUNNING
        self.receipt: Receipt | None = None
        self.cumulative_logprob = 0.0
        self.clear()

    def clear(self) -> None:
        """The response is sent."""
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[list[Logprob]] = []

    def add(self, delta: Delta) -> None:
        if delta.text:
            self.text.append(delta.text)
        self.token_ids += delta.token_ids.tolist()
        if delta.logprobs:
            self.logprobs += delta.logprobs
            self.cumulative_logprob += sum(token.logprob for token, *_ in delta.logprobs)
        self.finish, self.receipt = delta.finish, delta.receipt


class Sink(Protocol):
    """Receives one request's results, on the client's I/O thread: be quick, and call no blocking client method."""

    def on_delta(self, delta: Delta) -> None:
        """The last call if with it all completions have finished."""

    def on_error(self, error: RadixError) -> None:
        """The request ended without a result. The last call."""


def by_token_id(token: list[Logprob]) -> dict[str, dict[str, object]]:
    """As vLLM shows the log probabilities of a token.

    The token itself comes first, by which clients know it, and beats a likeliest of its id.
    """
    entries: dict[str, dict[str, object]] = {}
    for entry in token:
        shown: dict[str, object] = {
            "logprob": entry.logprob,
            "rank": entry.rank,
            "decoded_token": entry.decoded_token,
        }
        entries.setdefault(str(entry.token_id), shown)
    return entries
