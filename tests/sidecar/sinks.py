"""A sink that remembers, and notices a call that must not be."""

from __future__ import annotations

import threading

from radix_backend.errors import RadixError
from radix_backend.protocol import Receipt
from radix_backend.sidecar.sink import Delta
from tests.sidecar.world import PATIENCE


class Recorder:
    def __init__(self, n: int = 1) -> None:
        self._left = n  # completions
        self.tokens: list[int] = []
        self.text = ""
        self.texts: dict[int, str] = {}  # by index of the completion
        self.ends: list[int | RadixError] = []
        self.receipt: Receipt | None = None
        self.calls_after_the_end = 0
        self._ended = threading.Event()

    def on_delta(self, delta: Delta) -> None:
        self.calls_after_the_end += bool(self.ends)
        self.tokens += delta.token_ids.tolist()
        self.text += delta.text
        self.texts[delta.index] = self.texts.get(delta.index, "") + delta.text
        if delta.finish:
            self.receipt = delta.receipt
            self._left -= 1
            if not self._left:
                self._end(delta.finish)

    def on_error(self, error: RadixError) -> None:
        self.calls_after_the_end += bool(self.ends)
        self._end(error)

    def end(self) -> int | RadixError:
        """Wait for the last call: a finish or an error."""
        assert self._ended.wait(PATIENCE), "the request never ended"
        return self.ends[0]

    def _end(self, how: int | RadixError) -> None:
        self.ends.append(how)
        self._ended.set()
