"""A process of the sidecar as its supervisor sees it: what it prints, what it reports, how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

import msgspec

from radix_backend.process import EXIT_FATAL, PARENT_PID, REPORT_FD
from radix_backend.protocol import Log, Report

_LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR) (.*)")
_LINE_LIMIT = 8000  # characters of a log line that are kept
_LAST_ERRORS = 5  # lines that tell why a process ended
_CHUNK = 65536

_report = msgspec.json.Decoder(Report)


class Child:
    """Started by the constructor, in a session of its own, so that a terminal's Ctrl-C is the supervisor's alone."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        """``arguments`` follow this process's own interpreter."""
        self.name = name
        self.report = Report(phase="starting")
        self.progress_at = time.monotonic()
        self.stacks_asked_at: float | None = None
        self.last_line = ""  # of stdout
        self._last_errors: deque[str] = deque(maxlen=_LAST_ERRORS)
        (self._reports, reports), (self._stdout, stdout), (self._stderr, stderr) = os.pipe(), os.pipe(), os.pipe()
        self.pipes = {self._reports: b"", self._stdout: b"", self._stderr: b""}  # the open ones: unfinished line
        for fd in self.pipes:
            os.set_blocking(fd, False)
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd="/",
            env=os.environ | {REPORT_FD: str(reports), PARENT_PID: str(os.getpid())},
            start_new_session=True,
            pass_fds=(reports,),
        )
        for fd in (reports, stdout, stderr):
            os.close(fd)

    @property
    def ready(self) -> bool:
        return self.report.phase == "ready"

    @property
    def failed(self) -> bool:
        """It said, or its exit status says, that starting again cannot help."""
        return self.report.phase == "failed" or self._process.returncode == EXIT_FATAL

    @property
    def succeeded(self) -> bool:
        return self._process.returncode == 0

    @property
    def activity(self) -> str:
        """What it does now, for people: "loading weights 40 %"."""
        phase, fraction = self.report.phase, self.report.fraction
        if phase == "starting":
            return f"the {self.name} process starts"
        return phase if fraction is None else f"{phase} {100 * fraction:.0f} %"

    @property
    def last_words(self) -> str:
        """Its own account of why it ends: what it reported, or else its last lines of error."""
        return self.report.message or "\n".join(self._last_errors)

    @property
    def ending(self) -> str:
        """How the ended process ended, with its last words."""
        status = self._process.returncode
        if status < 0:
            how = f"{self.name} was killed by signal {-status} ({signal.strsignal(-status)})"
        else:
            how = f"{self.name} exited with status {status}"
        return f"{how}: {self.last_words}" if self.last_words else how

    def ended(self) -> bool:
        """Whether the process is gone. What it started in its session goes with it."""
        if self._process.poll() is None:
            return False
        self.signal(signal.SIGKILL)
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and to what it started in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def ask_stacks(self) -> None:
        """Have the process dump its stacks to its log."""
        self._process.send_signal(signal.SIGUSR1)
        self.stacks_asked_at = time.monotonic()

    def read(self, fd: int) -> list[Log]:
        """Take in what one of the `pipes` holds: returns log lines. A pipe at its end is closed and no longer there.

        Raises BlockingIOError when it holds nothing.
        """
        data = os.read(fd, _CHUNK)
        *lines, rest = (self.pipes[fd] + data).split(b"\n")
        if data and len(rest) < _CHUNK:
            self.pipes[fd] = rest
        elif rest:
            lines.append(rest)
            self.pipes[fd] = b""
        if not data:
            del self.pipes[fd]
            os.close(fd)
        if fd == self._reports:
            return [log for line in lines for log in self._take_report(line)]
        return [self._take_line(fd, line.decode(errors="replace")) for line in lines]

    def drain(self) -> list[Log]:
        """Take in what all pipes hold now."""
        logs = []
        for fd in list(self.pipes):
            with contextlib.suppress(BlockingIOError):
                while fd in self.pipes:
                    logs += self.read(fd)
        return logs

    def close(self) -> None:
        for fd in self.pipes:
            os.close(fd)
        self.pipes.clear()

    def _take_report(self, line: bytes) -> list[Log]:
        try:
            report = _report.decode(line)
        except msgspec.DecodeError:
            return [Log("warning", self.name, f"no report: {line[:_LINE_LIMIT]!r}")]
        if report.progress != self.report.progress:
            self.progress_at = time.monotonic()
            self.stacks_asked_at = None
        self.report = report
        return []

    def _take_line(self, fd: int, line: str) -> Log:
        line = line[:_LINE_LIMIT]
        match = _LEVEL.fullmatch(line)
        if match is not None:
            log = Log(match[1].lower(), self.name, match[2])
        else:
            log = Log("info" if fd == self._stdout else "error", self.name, line)
        if fd == self._stdout:
            self.last_line = line
        if log.level == "error":
            self._last_errors.append(log.line)
        return log
