"""What the load generator wants of a kind of server."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from radix_backend.load import Trace


class Connection(Protocol):
    """One client's."""

    async def ask(
        self, prompt: list[int], num_outputs: int, temperature: float, want_tokens: bool, trace: Trace
    ) -> list[int]:
        """Stream exactly ``num_outputs`` tokens into ``trace``, whose times are the monotonic clock's.

        Returns the tokens if they are wanted. Raises whatever goes wrong.
        """

    async def close(self) -> None: ...


class Door(Protocol):
    async def connect(self) -> Connection: ...

    async def __aenter__(self) -> Door: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
