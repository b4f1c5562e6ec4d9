"""What a benchmark asks of an engine and what it sees. Travels as JSON between the processes that ask and measure."""

from __future__ import annotations

import msgspec


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
