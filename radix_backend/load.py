"""What a benchmark asks of an engine and what it sees. Travels as JSON between the processes that ask and measure."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt


class Turn(msgspec.Struct):
    """Tokens that follow everything said before, and exactly how many are to be generated after them."""

    tokens: list[int]
    num_outputs: int


class Session(msgspec.Struct):
    """Turns of one conversation: each is sent when the answer to the one before is complete."""

    turns: list[Turn]
    arrival: float = 0.0  # seconds after the start


class Load(msgspec.Struct):
    sessions: list[Session]
    temperature: float = 0.6


class Trace(msgspec.Struct):
    """One turn, as seen by who asked. Times are seconds after the start of the load."""

    sent: float
    times: list[float]  # when something with tokens came; one entry a response, which may hold several tokens
    num_tokens: int  # generated
    num_prompt_tokens: int
    num_cached_tokens: int | None = None  # of the prompt; None where it is not told
    error: str = ""


class Outcome(msgspec.Struct):
    """Of a load, or of one process's share of it."""

    traces: list[Trace]
    cpu_seconds: dict[str, float] = {}  # by process
    facts: dict[str, float] = {}  # what else the measured engine tells: steps, CPU time of its own Python


class _Conversation:
    """A session under way: what was said, the turns to come, and the one that runs."""

    def __init__(self, session: Session) -> None:
        # Made before the clock starts: a list of integers becomes an array slowly.
        self.turns = deque((np.array(turn.tokens, np.int32), turn.num_outputs) for turn in session.turns)
        self.said = np.empty(0, np.int32)
        self.answer: list[int] = []
        self.trace = Trace(session.arrival, [], 0, 0)


class Player:
    """Plays a load to an engine in this process: tells its owner, who steps the engine, what is due, and notes what
    comes."""

    def __init__(self, load: Load) -> None:
        self.traces: list[Trace] = []
        self.waited = 0.0  # seconds, for arrivals
        self._conversations = [_Conversation(session) for session in load.sessions]
        self._arrivals = [(session.arrival, index) for index, session in enumerate(load.sessions)]
        heapq.heapify(self._arrivals)
        self._running: dict[int, int] = {}  # number of a turn → index of its conversation
        self._started = time.perf_counter()

    @property
    def playing(self) -> bool:
        """Whether anything runs or is still to come."""
        return bool(self._arrivals or self._running)

    def now(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    def due(self) -> Iterator[tuple[int, npt.NDArray[np.int32], int]]:
        """Number, prompt and outputs of each turn to start now. Waits for the next one when nothing runs."""
        if not self._running and self._arrivals and (wait := self._arrivals[0][0] - self.now()) > 0:
            time.sleep(wait)
            self.waited += wait
        while self._arrivals and self._arrivals[0][0] <= self.now():
            arrival, index = heapq.heappop(self._arrivals)
            conversation = self._conversations[index]
            tokens, num_outputs = conversation.turns.popleft()
            conversation.said = np.concatenate([conversation.said, np.array(conversation.answer, np.int32), tokens])
            conversation.answer = []
            conversation.trace = Trace(arrival, [], 0, len(conversation.said))
            number = len(self.traces)
            self.traces.append(conversation.trace)
            self._running[number] = index
            yield number, conversation.said, num_outputs

    def take(self, number: int, tokens: Sequence[int], now: float) -> None:
        """Turn ``number`` got ``tokens``."""
        conversation = self._conversations[self._running[number]]
        conversation.answer += tokens
        conversation.trace.times.append(now)
        conversation.trace.num_tokens += len(tokens)

    def end(self, number: int, num_cached: int | None, now: float) -> None:
        """Turn ``number`` is complete; ``num_cached`` tokens of its prompt were cached. The next turn is due."""
        index = self._running.pop(number)
        conversation = self._conversations[index]
        conversation.trace.num_cached_tokens = num_cached
        if conversation.turns:
            heapq.heappush(self._arrivals, (now, index))
