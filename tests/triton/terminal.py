"""A command of ours on a pseudo-terminal, as a person sees it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 60.0  # seconds: a bound on hanging, not an expectation
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07|\r")


class Terminal:
    def __init__(self, fd: int, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._fd = fd
        self._shown = ""

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, text: str) -> str:
        """What was shown up to and with ``text``, since the last call; without colours and cursor movements."""
        deadline = time.monotonic() + PATIENCE
        while text not in self._shown:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self._shown!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                self._shown = _CONTROLS.sub("", self._shown + os.read(self._fd, 65536).decode(errors="replace"))
        before, _, self._shown = self._shown.partition(text)
        return before + text


@contextmanager
def terminal(home: Path, *arguments: str, program: Sequence[str] = ("-m", "radix_backend.cli")) -> Iterator[Terminal]:
    """``radix-backend``, or another program of Python's, with these arguments and this RADIX_HOME; killed at the end if
    it runs still."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))  # of no size at first
    settings = {"TERM": "xterm", "COLUMNS": "120", "PROMPT_TOOLKIT_NO_CPR": "1", "RADIX_HOME": str(home)}
    environment = os.environ | settings
    process = subprocess.Popen(
        [sys.executable, *program, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
