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


class Sink(Protocol):
    """Receives one request's results, on the client's I/O thread: be quick, and call no blocking client method."""

    def on_delta(self, delta: Delta) -> None:
        """The last call if with it all completions have finished."""

    def on_error(self, error: RadixError) -> None:
        """The request ended without a result. The last call."""
