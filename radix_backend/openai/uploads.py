"""The bodies that are on their way here."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from radix_backend.errors import Cancelled, RadixError


class Uploads:
    def __init__(self) -> None:
        self._reading: set[asyncio.Task[bytes]] = set()
        self._end: RadixError | None = None

    async def read(self, request: Request) -> bytes:
        """The request's body. Raises Cancelled if its client leaves, what `end_all` is given if that comes first."""
        reading = asyncio.create_task(request.body())
        self._reading.add(reading)
        try:
            return await reading
        except ClientDisconnect:
            raise Cancelled("the client went away") from None
        except asyncio.CancelledError:
            if self._end is None:
                raise
            raise self._end from None
        finally:
            self._reading.discard(reading)

    def end_all(self, error: RadixError) -> None:
        """On the loop."""
        self._end = error
        for reading in self._reading:
            reading.cancel()
