"""What a command says: lines, and on a terminal one line that changes while something is waited for."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

from radix_backend.protocol import Status

_CLEAR = "\r\x1b[K"
_SPACING = 5.0  # seconds between lines about the same wait where no terminal shows progress


class Terminal:
    """For all threads. On stderr: stdout is for answers."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._lock = threading.Lock()
        self._shown = ""
        self._shown_at = 0.0

    def say(self, text: str) -> None:
        with self._lock:
            self._clear()
            print(text, file=self._stream, flush=True)

    def waiting(self, text: str) -> None:
        """What is being waited for; replaces the last such line on a terminal, and is thinned out elsewhere."""
        with self._lock:
            kind, now = _kind(text), time.monotonic()
            if self._live:
                self._clear()
                print(text, end="", file=self._stream, flush=True)
            elif kind != _kind(self._shown) or now - self._shown_at >= _SPACING:
                print(text, file=self._stream, flush=True)
            else:
                return
            self._shown, self._shown_at = text, now

    def done_waiting(self) -> None:
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        if self._live and self._shown:
            print(_CLEAR, end="", file=self._stream, flush=True)
        if self._live:
            self._shown = ""


class EngineLog:
    """Shows the engine's warnings and errors."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def __call__(self, level: str, source: str, line: str) -> None:
        if level in ("warning", "error"):
            self._terminal.say(f"{source}: {level}: {line}")


class EngineProgress:
    """Shows what the engine is doing until it is ready, and that it has to start again."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def __call__(self, status: Status) -> None:
        text = f"engine: {status.detail or status.state}"
        if status.state == "starting":
            self._terminal.waiting(text)
        elif status.state == "restarting":
            self._terminal.say(f"engine restarts: {status.detail}")
        elif status.state == "ready":
            self._terminal.say("engine: ready")


def _kind(text: str) -> str:
    """The text without its figures: "loading weights 40 %" and "… 60 %" are the same wait."""
    return "".join(character for character in text if not character.isdigit())
