"""``python -m radix_backend.worker.rank SPEC_JSON``: a rank beside the engine's own, in a process of its own.

A SPEC_JSON of ``-`` is read from stdin.

It takes step plans from the engine's process and executes them; of the results only the engine's process may want some.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn, Protocol

import msgspec

from radix_backend.config import EngineConfig
from radix_backend.errors import RadixError
from radix_backend.loading import resolve_model
from radix_backend.process import Reporter, die_with_parent, freeze_objects, setup_logging
from radix_backend.worker.channel import Door, RemoteConnection
from radix_backend.worker.interface import Worker
from radix_backend.worker.messages import RankFailed, RankProgress, RankResult, decode_plan, encode
from radix_backend.worker.ranks import Meeting, Ranks, join, use_gpu

MakeRunner = Callable[[EngineConfig, Path, Reporter, Ranks], Worker]

_PROGRESS_INTERVAL = 1.0  # seconds


class RankSpec(msgspec.Struct, frozen=True):
    """What a rank has to know to take its place."""

    config: EngineConfig  # settled
    model_dir: str
    rank: int
    connection: int | Door  # inherited file descriptor, or the way from another host
    meeting: Meeting


class ToEngine(Protocol):
    """A `Connection`, or the like of it."""

    def recv_bytes(self) -> bytes:
        """The next plan; empty once there are no more."""

    def send_bytes(self, data: bytes) -> None: ...

    def close(self) -> None: ...


class _RankReporter(Reporter):
    """Tells the engine's process instead of the supervisor."""

    def __init__(self, connection: ToEngine) -> None:
        super().__init__()
        self._connection = connection
        self._writing = threading.Lock()
        self._told_at = 0.0

    def send(self, message: RankResult | RankFailed | RankProgress) -> None:
        with self._writing:
            self._connection.send_bytes(encode(message))

    def phase(self, name: str, fraction: float | None = None) -> None:
        super().phase(name, fraction)
        self.progress()

    def progress(self) -> None:
        super().progress()
        if time.monotonic() - self._told_at >= _PROGRESS_INTERVAL:
            self._told_at = time.monotonic()
            self.send(RankProgress())


def serve(spec: RankSpec, make_runner: MakeRunner) -> NoReturn:
    """Until the engine has no more plans."""
    door = spec.connection
    connection: ToEngine = RemoteConnection(door) if isinstance(door, Door) else Connection(door)
    reporter = _RankReporter(connection)
    try:
        model_dir = Path(spec.model_dir)
        if not model_dir.is_dir():  # on another host than the engine's
            model_dir = resolve_model(spec.config, reporter)
        ranks = join(spec.config, spec.rank, spec.meeting)
        runner = make_runner(spec.config, model_dir, reporter, ranks)
    except RadixError as error:
        reporter.send(RankFailed(error.code, str(error)))
        connection.close()
        raise SystemExit(1) from None
    freeze_objects()
    reports = spec.rank == spec.config.num_ranks - spec.config.tp_size and spec.rank > 0
    launched = threading.Semaphore(0)

    def settle() -> None:
        use_gpu(spec.config, ranks.gpu)  # a thread begins on the first
        with _ending():
            while True:
                launched.acquire()
                result = runner.settle()
                reporter.progress()
                if reports:
                    reporter.send(RankResult(result))

    threading.Thread(target=settle, name="settle", daemon=True).start()
    with _ending():
        while data := connection.recv_bytes():
            runner.launch(decode_plan(data))
            launched.release()
        runner.close()
        ranks.close()
    raise AssertionError("the process has ended")


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """The process ends when this does, in whatever thread, at once: whoever waits for this rank has to know.

    Taking the interpreter down would wait for the other thread, and for collectives whose peers are gone.
    """
    try:
        yield
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stderr.flush()
    os._exit(status)


def run(make_runner: MakeRunner) -> None:
    die_with_parent()
    text = sys.stdin.read() if sys.argv[1] == "-" else sys.argv[1]
    spec = msgspec.json.decode(text, type=RankSpec)
    setup_logging(spec.config.log_level, f"rank {spec.rank}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the engine: the supervisor decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the engine says when
    serve(spec, make_runner)


def main() -> None:
    from radix_backend.worker.selection import make_runner

    run(make_runner)


if __name__ == "__main__":
    main()
