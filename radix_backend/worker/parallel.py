"""One engine on several ranks: this process is rank 0 and starts the others."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

import msgspec

from radix_backend.config import EngineConfig
from radix_backend.errors import RadixError
from radix_backend.process import EXIT_FATAL, PARENT_PID, Reporter
from radix_backend.worker.interface import StepPlan, StepResult
from radix_backend.worker.messages import RankFailed, RankResult, decode_from_rank, encode
from radix_backend.worker.rank import MakeRunner, RankSpec
from radix_backend.worker.ranks import join, listen

log = logging.getLogger(__name__)

STEP_SECONDS = 30.0  # without progress of any rank while steps are in flight: what is wrong will not mend itself
_EXIT_SECONDS = 5.0  # for ranks to end by themselves
_BLAME_SECONDS = 2.0  # for the end of a rank to be noticed
_EXIT_LOST = 1  # status of this process when a rank is lost


class _Process:
    """Another rank."""

    def __init__(self, spec: RankSpec, connection: Connection, process: subprocess.Popen[bytes]) -> None:
        self.number, self.connection, self.process = spec.rank, connection, process

    def ending(self) -> str:
        """How it ended, once its connection has."""
        try:
            status = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return f"rank {self.number} (pid {self.process.pid}) closed its connection"
        how = f"exited with status {status}"
        if status < 0:
            how = f"was killed by signal {-status} ({signal.strsignal(-status)})"
        return f"rank {self.number} (pid {self.process.pid}) {how}"


class ParallelWorker:
    """`Worker` that broadcasts each plan once; every rank executes all of them in this order.

    A collective whose peer is gone may wait for ever, on a GPU even beyond the reach of exceptions. So when a rank ends
    or nothing moves any more, this whole process ends; the others die with it.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        reporter: Reporter,
        make_runner: MakeRunner,
        program: Sequence[str] = ("-m", "radix_backend.worker.rank"),
    ) -> None:
        """``config`` is settled, its layout fits the model. ``program``: what this interpreter runs as another rank.

        Raises what the checkpoint, settings or memory do not allow.
        """
        self._reporter = reporter
        self._results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()  # of the last stage, if it is not this one
        self._is_last_stage = config.pp_size == 1
        self._num_launched = 0  # steps in flight
        self._progress_at = time.monotonic()
        self._closing = False
        listener = listen(config)
        port = listener.getsockname()[1]
        self._processes = [_start(config, model_dir, rank, port, program) for rank in range(1, config.num_ranks)]
        self._watch = threading.Thread(target=self._look_after_ranks, name="ranks", daemon=True)
        self._watch.start()
        try:
            with _blame():
                self._ranks = join(config, 0, port, listener)
                self._own = make_runner(config, model_dir, reporter, self._ranks)
        except BaseException:
            self._end_ranks(0)
            raise
        self.num_pages = self._own.num_pages

    def launch(self, plan: StepPlan) -> None:
        if not self._num_launched:
            self._progress_at = time.monotonic()
        self._num_launched += 1
        data = encode(plan)
        with _blame():
            for process in self._processes:
                process.connection.send_bytes(data)
            self._own.launch(plan)

    def settle(self) -> StepResult:
        with _blame():
            result = self._own.settle()
        if not self._is_last_stage:
            result = self._results.get()
        self._progress_at = time.monotonic()
        self._num_launched -= 1
        return result

    def close(self) -> None:
        self._closing = True
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.connection.send_bytes(b"")
        self._own.close()
        self._ranks.close()
        self._end_ranks(_EXIT_SECONDS)

    def _end_ranks(self, patience: float) -> None:
        """Wait so many seconds for the others to end, then end them."""
        self._closing = True
        deadline = time.monotonic() + patience
        for process in self._processes:
            try:
                process.process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.process.kill()
                process.process.wait()
        self._watch.join()
        for process in self._processes:
            process.connection.close()

    # ── what the others say ─────────────────────────────────────────────────────────────────────────────────

    def _look_after_ranks(self) -> None:
        """In a thread of its own."""
        connected = {process.connection: process for process in self._processes}
        while connected:
            for connection in wait(list(connected), timeout=1.0):
                assert isinstance(connection, Connection)
                try:
                    self._take(connected[connection], connection.recv_bytes())
                except (EOFError, OSError):
                    process = connected.pop(connection)
                    if not self._closing:
                        self._end(process.ending())
            silence = time.monotonic() - max(self._progress_at, self._reporter.progress_at)
            if self._num_launched and silence > STEP_SECONDS and not self._closing:
                self._end(f"no rank made progress for {STEP_SECONDS:g} s while a step was in flight")

    def _take(self, process: _Process, data: bytes) -> None:
        self._progress_at = time.monotonic()
        message = decode_from_rank(data)
        if isinstance(message, RankResult):
            self._results.put(message.result)
        elif isinstance(message, RankFailed):
            self._reporter.failed(message.message)
            self._end(f"rank {process.number}: {message.message}", EXIT_FATAL)

    def _end(self, reason: str, status: int = _EXIT_LOST) -> None:
        log.error("%s", reason)
        self._reporter.last_words(reason)
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def _blame() -> Iterator[None]:
    """Inside, an error may be what another rank's end has caused: the watch, which knows the reason, comes first."""
    try:
        yield
    except RadixError:
        raise
    except Exception:
        time.sleep(_BLAME_SECONDS)
        raise


def _start(config: EngineConfig, model_dir: Path, rank: int, port: int, program: Sequence[str]) -> _Process:
    ours, theirs = Pipe()
    spec = RankSpec(config, os.fspath(model_dir), rank, theirs.fileno(), port)
    process = subprocess.Popen(
        [sys.executable, *program, msgspec.json.encode(spec).decode()],
        stdin=subprocess.DEVNULL,
        env=os.environ | {PARENT_PID: str(os.getpid())},
        pass_fds=(theirs.fileno(),),
    )
    theirs.close()
    return _Process(spec, ours, process)
