"""Runs what would stall the loop (tokenizing a long prompt: 0.4 s a megabyte) on threads of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

_Job = Callable[[], Callable[[], None]]


class Offload:
    """Jobs run on a thread and return what is left to do: a function that `finish` calls, on the loop's thread."""

    def __init__(self, threads: int = 2) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._done: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable when `finish` has something to do
        for _ in range(threads):
            threading.Thread(target=self._work, name="offload", daemon=True).start()

    def start(self, job: _Job) -> None:
        self._jobs.put(job)

    def wake(self) -> None:
        """Make ``wake_fd`` readable (from any thread or signal handler)."""
        os.eventfd_write(self.wake_fd, 1)

    def finish(self) -> None:
        """Complete the jobs that are done."""
        try:
            os.eventfd_read(self.wake_fd)
        except BlockingIOError:
            return
        while not self._done.empty():
            self._done.get()()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                done = job()
            except BaseException as error:  # a bug; it must end the process, not a thread that nobody watches
                done = partial(_raise, error)
            self._done.put(done)
            self.wake()


def _raise(error: BaseException) -> None:
    raise error
