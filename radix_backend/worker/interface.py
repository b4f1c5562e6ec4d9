"""What the engine and the workers say to each other. numpy only: the scheduler's floor has no torch.

A request is described once (`NewRequest`); from then on a step carries deltas. Positions, lengths and last tokens
live with the worker, indexed by the request's **slot**, and advance there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from radix_backend.errors import Unsupported
from radix_backend.protocol import TokenLogprobs
from radix_backend.sampling_params import SamplingParams

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class NewRequest:
    """A request entering the batch (also one that comes back after retraction or a restart)."""

    slot: int
    token_ids: Ints  # prompt, then the outputs generated so far
    prompt_len: int  # where the outputs start
    num_computed: int  # leading tokens whose KV is already in the pages it was given
    params: SamplingParams  # without a seed: 0
    stop_token_ids: tuple[int, ...] = ()  # not sampled before `min_tokens` outputs
    bad_words: tuple[tuple[int, ...], ...] = ()  # never completed by an output
    num_scored: int = 0  # leading prompt tokens that need no log probabilities any more; the first never does


def _empty() -> Ints:
    return np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class StepPlan:
    """One step. Applied in order: new requests, then page table writes, then the rows are computed.

    Row ``i`` computes the next ``num_tokens[i]`` tokens of the request in ``slots[i]``, writing their KV, and samples
    one token after them if ``sample[i]``. The first ``num_decode`` rows are decodes: one token each, which may be the
    one that the previous step sampled and nobody on the CPU has seen yet. The others are chunks of prompts: one may
    read pages that itself or another before it fills in this step.
    """

    step: int
    new: list[NewRequest] = field(default_factory=list)
    # Page table writes: table[page_slots[j], page_index[j]] = page_ids[j]
    page_slots: Ints = field(default_factory=_empty)
    page_index: Ints = field(default_factory=_empty)
    page_ids: Ints = field(default_factory=_empty)
    slots: Ints = field(default_factory=_empty)
    num_tokens: Ints = field(default_factory=_empty)
    sample: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=np.bool_))
    num_decode: int = 0


@dataclass(frozen=True)
class StepResult:
    step: int
    tokens: Ints  # one a row with `sample`, in row order
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)  # of `tokens`; empty where nobody wants any
    # One list a row that computed prompt tokens whose successors are to be scored, in row order: of those successors.
    prompt_logprobs: list[list[TokenLogprobs]] = field(default_factory=list)


class Worker(Protocol):
    """Executes steps in the order they are launched. An exception from any method is fatal to the engine."""

    num_pages: int  # pages in the KV pool, sized by the worker

    def launch(self, plan: StepPlan) -> None:
        """Queue a step; returns at once."""

    def settle(self) -> StepResult:
        """Wait for the oldest launched step that has not been settled."""

    def close(self) -> None: ...


class Profiler(Protocol):
    """Records what the engine does, on demand. On the engine's thread only."""

    @property
    def active(self) -> bool:
        """Whether something is being recorded."""

    def start(self) -> None:
        """Raises InvalidArgument when it is active already."""

    def stop(self) -> str:
        """Write what was recorded; returns the file. Takes seconds. Raises InvalidArgument when it is not active."""

    def phase(self, name: str) -> AbstractContextManager[object]:
        """What happens inside has this name in the trace."""


class NoProfiler:
    """`Profiler` for engines that have no torch."""

    active = False

    def start(self) -> None:
        raise Unsupported("this engine cannot be profiled")

    def stop(self) -> str:
        raise Unsupported("this engine cannot be profiled")

    def phase(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()
