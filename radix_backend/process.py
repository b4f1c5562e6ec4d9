"""What every process of the sidecar does alike: dies with its parent, logs with levels, reports about itself."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import msgspec

from radix_backend.errors import RadixError
from radix_backend.protocol import Report

REPORT_FD = "RADIX_REPORT_FD"  # environment: the inherited pipe that takes one JSON `Report` a line
PARENT_PID = "RADIX_PARENT_PID"  # environment: the supervisor's process id
EXIT_FATAL = 3  # exit status: starting again cannot help

_PR_SET_PDEATHSIG = 1
_REPORT_INTERVAL = 1.0  # seconds between heartbeats
_PHASE_INTERVAL = 0.2  # seconds between two fractions of the same phase

_log = logging.getLogger(__name__)


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ask the kernel to SIGKILL this process when the thread that forked it ends. Call it first of all.

    ``parent_pid`` defaults to the supervisor's; a process that nobody supervises is left alone. A parent that died
    before this call is noticed too.
    """
    if parent_pid is None:
        if PARENT_PID not in os.environ:
            return
        parent_pid = int(os.environ.pop(PARENT_PID))  # not meant for what this process starts
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


class _LevelPrefix(logging.Formatter):
    """Repeats ``LEVEL`` on every line, so that a traceback keeps the level of its record."""

    def format(self, record: logging.LogRecord) -> str:
        level = "ERROR" if record.levelno >= logging.ERROR else record.levelname
        return "\n".join(f"{level} {line}" for line in super().format(record).splitlines() or [""])


def setup_logging(level: str, who: str = "") -> None:
    """Log to stderr as ``LEVEL message`` lines; SIGUSR1 dumps the stacks of all threads there.

    ``level`` is one of EngineConfig.log_level's. ``who`` comes before each message, where several processes have one
    stderr.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LevelPrefix(f"{who}: %(message)s" if who else "%(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def freeze_objects() -> None:
    """What has been loaded stays: no collection looks at it again, which would stop the process for 0.1 s."""
    gc.collect()
    gc.freeze()


class Reporter:
    """Tells the supervisor how this process is doing; for all its threads. Silent when nobody supervises."""

    def __init__(self) -> None:
        self._pipe = None
        if REPORT_FD in os.environ:
            fd = int(os.environ.pop(REPORT_FD))  # neither it nor the pipe is meant for what this process starts
            os.set_inheritable(fd, False)
            self._pipe = os.fdopen(fd, "wb")
        self._lock = threading.Lock()
        self._report = Report(phase="starting")
        self._sent_at = 0.0
        self._phase_name, self._phase_since = "starting", time.monotonic()
        self.progress_at = time.monotonic()

    def phase(self, name: str, fraction: float | None = None) -> None:
        """Work on the way to ready, such as "loading weights"; ``fraction`` of it is done. Counts as progress."""
        self._time(name)
        self._send(name, fraction, 0 if name != self._report.phase or fraction == 1 else _PHASE_INTERVAL)

    def ready(self) -> None:
        """The process serves."""
        self._time("ready")
        self._send("ready")

    def failed(self, message: str) -> None:
        """Starting again cannot help; ``message`` is for the user."""
        self._send("failed", message=message)

    def last_words(self, message: str) -> None:
        """The process is about to end; ``message`` says why."""
        self._send(self._report.phase, message=message)

    def progress(self) -> None:
        """Something got done, or there is nothing to do. A fraction of a microsecond on most calls."""
        self.progress_at = time.monotonic()
        if self._pipe is not None and self.progress_at - self._sent_at >= _REPORT_INTERVAL:
            self._send(self._report.phase, self._report.fraction)

    def _time(self, phase: str) -> None:
        """Log how long the phase before this one took."""
        if phase != self._phase_name:
            now = time.monotonic()
            _log.info("%s: %.1f s", self._phase_name, now - self._phase_since)
            self._phase_name, self._phase_since = phase, now

    def _send(self, phase: str, fraction: float | None = None, interval: float = 0, message: str = "") -> None:
        now = time.monotonic()
        if self._pipe is None or now - self._sent_at < interval:
            return
        with self._lock:
            self._sent_at = now
            self._report = Report(phase, fraction, message, self._report.progress + 1)
            self._pipe.write(msgspec.json.encode(self._report) + b"\n")
            self._pipe.flush()


@contextlib.contextmanager
def fatal_on_user_error(reporter: Reporter) -> Iterator[None]:
    """Inside, a RadixError ends the process with status 3 after its message was reported: no restart follows."""
    try:
        yield
    except RadixError as error:
        _log.error("%s", error)
        reporter.failed(str(error))
        raise SystemExit(EXIT_FATAL) from None
