"""What the stages of a pipeline send each other.

Every rank executes the steps in one order, so messages need no name: hidden states go from stage to stage, sampled
tokens from the last stage to the first, each kind on communicators of its own, which the other kind cannot block.

A request is in at most one of the ``pp_size`` last steps with a token to come (`Scheduler` sees to that). So the first
stage takes in the tokens of step *n* before it computes step *n + pp_size*, wherever the last stage is then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from radix_backend.worker.interface import Ints


class Sampling(Protocol):
    """A step to which tokens will come."""

    @property
    def sample_slots(self) -> Ints: ...


S = TypeVar("S", bound=Sampling)


class Link:
    """To or from one rank of another stage, in order."""

    def __init__(self, peer: int, group: dist.ProcessGroup, kept: int) -> None:
        """``kept``: messages that may be under way at most; the sender waits for the one before them."""
        self._peer, self._group, self._kept = peer, group, kept
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()  # tensors live until they have arrived

    def send(self, x: Tensor) -> None:
        """Returns at once; nobody may write to ``x`` any more."""
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        work = dist.isend(x, self._peer, self._group)
        assert work is not None
        self._sent.append((work, x))
        if len(self._sent) > self._kept:
            self._sent.popleft()[0].wait()

    def receive(self, x: Tensor) -> Tensor:
        """Fill ``x``; on CUDA the current stream waits, the CPU does not."""
        dist.recv(x, self._peer, self._group)
        return x


class Pipeline(Generic[S]):
    """One rank's links, where there are several stages."""

    def __init__(self, pp_size: int, previous: Link | None, following: Link | None, tokens: Link | None) -> None:
        """``tokens`` is that of the first and the last stage."""
        self._pp_size, self._previous, self._next, self._tokens = pp_size, previous, following, tokens
        self._expected: deque[tuple[int, S]] = deque()

    def receive_hidden(self, x: Tensor) -> Tensor:
        """Fill ``x`` [tokens, hidden] f32."""
        assert self._previous is not None
        return self._previous.receive(x)

    def send_hidden(self, x: Tensor) -> None:
        assert self._next is not None
        self._next.send(x)

    def send_tokens(self, tokens: Tensor) -> None:
        """Of one step [sampling rows], from the last stage; nothing where there are none."""
        assert self._tokens is not None
        if len(tokens):
            self._tokens.send(tokens.int())

    def expect_tokens(self, number: int, step: S) -> None:
        """Of step ``number``, on the first stage."""
        if len(step.sample_slots):
            self._expected.append((number, step))

    def drain(self, device: torch.device | str = "cpu") -> None:
        """Take in the tokens of all steps, so that nobody waits for them to be taken."""
        if self._expected:
            for _ in self.due_tokens(self._expected[-1][0] + self._pp_size, device):
                pass

    def due_tokens(self, number: int, device: torch.device | str = "cpu") -> Iterator[tuple[S, Tensor]]:
        """Those that step ``number`` may need, with the steps that sampled them."""
        assert self._tokens is not None
        while self._expected and self._expected[0][0] <= number - self._pp_size:
            _, step = self._expected.popleft()
            yield step, self._tokens.receive(torch.empty(len(step.sample_slots), dtype=torch.int32, device=device))
