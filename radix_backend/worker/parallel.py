"""One engine on several ranks: this process is rank 0, an `Executor` starts the others."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from radix_backend.config import EngineConfig
from radix_backend.errors import RadixError
from radix_backend.process import EXIT_FATAL, Reporter
from radix_backend.worker.executor import Executor, RankMessage
from radix_backend.worker.interface import StepPlan, StepResult
from radix_backend.worker.messages import RankAlive, RankFailed, RankLog, RankResult, decode_from_rank, encode
from radix_backend.worker.rank import MakeRunner
from radix_backend.worker.ranks import join

log = logging.getLogger(__name__)

STEP_SECONDS = 30.0  # without progress of any rank while steps are in flight: what is wrong will not mend itself
_EXIT_SECONDS = 5.0  # for ranks to end by themselves
_EXIT_LOST = 1  # status of this process when a rank is lost


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
        executor: Executor,
    ) -> None:
        """``config`` is settled, its layout fits the model.

        Raises what the checkpoint, settings, memory or ``executor`` do not allow.
        """
        self._reporter = reporter
        self._results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()  # of the last stage, if it is not this one
        self._is_last_stage = config.pp_size == 1
        self._num_launched = 0  # steps in flight
        self._progress_at = time.monotonic()
        self._closing = False
        self._executor = executor
        meeting, listener = executor.start(config, model_dir, reporter)
        self._watch = threading.Thread(target=self._look_after_ranks, name="ranks", daemon=True)
        self._watch.start()
        try:
            with self._blame():
                self._ranks = join(config, 0, meeting, listener)
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
        with self._blame():
            self._executor.send(data)
            self._own.launch(plan)

    def settle(self) -> StepResult:
        with self._blame():
            result = self._own.settle()
        if not self._is_last_stage:
            result = self._results.get()
        self._progress_at = time.monotonic()
        self._num_launched -= 1
        return result

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(Exception):  # those that are gone need not be told
            self._executor.send(b"")
        self._own.close()
        self._ranks.close()
        self._end_ranks(_EXIT_SECONDS)

    def _end_ranks(self, patience: float) -> None:
        """Wait so many seconds for the others to end, then end them."""
        self._closing = True
        self._executor.end(patience)
        self._watch.join()
        self._executor.close()

    # ── what the others say ─────────────────────────────────────────────────────────────────────────────────

    def _look_after_ranks(self) -> None:
        """In a thread of its own."""
        while (events := self._executor.receive(1.0)) is not None:
            for event in events:
                if isinstance(event, RankMessage):
                    self._take(event)
                elif not self._closing:
                    self._end(event.reason)
            silence = time.monotonic() - max(self._progress_at, self._reporter.progress_at)
            if self._num_launched and silence > STEP_SECONDS and not self._closing:
                self._end(f"no rank made progress for {STEP_SECONDS:g} s while a step was in flight")

    def _take(self, event: RankMessage) -> None:
        message = decode_from_rank(event.data)
        if isinstance(message, RankAlive):
            return
        if isinstance(message, RankLog):
            sys.stderr.write(f"{message.text}\n")
            sys.stderr.flush()
            return
        self._progress_at = time.monotonic()
        if isinstance(message, RankResult):
            self._results.put(message.result)
        elif isinstance(message, RankFailed):
            self._reporter.failed(message.message)
            self._end(f"rank {event.rank}: {message.message}", EXIT_FATAL)

    @contextlib.contextmanager
    def _blame(self) -> Iterator[None]:
        """Inside, an error may come of another rank's end: the watch, which knows the reason, goes first.

        If it knows none, the error ends the process: by the usual way it would wait for collectives that never end.
        """
        try:
            yield
        except RadixError:
            raise
        except Exception as error:
            time.sleep(self._executor.notice_seconds)
            log.exception("rank 0 fails")
            self._end(f"{type(error).__name__}: {error}")

    def _end(self, reason: str, status: int = _EXIT_LOST) -> None:
        log.error("%s", reason)
        self._reporter.last_words(reason)
        sys.stderr.flush()
        os._exit(status)
