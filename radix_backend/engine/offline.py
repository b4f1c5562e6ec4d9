"""``python -m radix_backend.engine.offline CONFIG_JSON MODEL_DIR``: the engine without doors, for measuring.

Reads one JSON `Load` a line from stdin, runs it and writes one JSON `Outcome` a line to stdout.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from radix_backend.config import EngineConfig
from radix_backend.engine.kv_cache import KVCache
from radix_backend.engine.request import Request
from radix_backend.engine.scheduler import Output, Scheduler
from radix_backend.load import Load, Outcome, Session, Trace
from radix_backend.process import Reporter, setup_logging
from radix_backend.protocol import RUNNING
from radix_backend.sampling_params import SamplingParams
from radix_backend.worker import create_worker, settle_device
from radix_backend.worker.interface import Worker


class OfflineEngine:
    """Scheduler and worker in this process, with async scheduling."""

    def __init__(self, config: EngineConfig, worker: Worker) -> None:
        self._worker = worker
        self._depth = 1 if config.disable_async_scheduling else 2
        self._ids = itertools.count()
        self.scheduler = Scheduler(
            KVCache(worker.num_pages, config.page_size),
            max_bs=config.max_bs,
            max_batched_tokens=config.max_batched_tokens,
            max_queue_size=config.max_queue_size,
        )

    def run(self, load: Load) -> Outcome:
        return _Run(self._worker, self.scheduler, self._depth, self._ids, load).outcome()


class _Conversation:
    """A session under way: what was said, and the turn that runs."""

    def __init__(self, session: Session) -> None:
        self.turns = iter(session.turns)
        self.said: list[int] = []
        self.trace = Trace(session.arrival, [], 0, 0)


class _Run:
    """One load, from its first arrival to its last token."""

    def __init__(self, worker: Worker, scheduler: Scheduler, depth: int, ids: itertools.count[int], load: Load) -> None:
        self._worker, self._scheduler, self._depth, self._ids = worker, scheduler, depth, ids
        self._temperature = load.temperature
        self._arrivals = [(session.arrival, index) for index, session in enumerate(load.sessions)]
        heapq.heapify(self._arrivals)
        self._conversations = [_Conversation(session) for session in load.sessions]
        self._running: dict[int, _Conversation] = {}
        self._traces: list[Trace] = []
        self._waited = 0.0  # for steps and arrivals
        self._started = time.perf_counter()

    def outcome(self) -> Outcome:
        in_flight = num_steps = 0
        while self._arrivals or self._scheduler.requests or in_flight:
            self._admit(idle=not self._scheduler.requests and not in_flight)
            plan = self._scheduler.schedule()
            if plan is not None:
                self._worker.launch(plan)
                in_flight += 1
            if in_flight == self._depth or (plan is None and in_flight):
                before = self._now()
                result = self._worker.settle()
                self._waited += self._now() - before
                in_flight -= 1
                num_steps += 1
                self._scheduler.settle(result)
                outputs, self._scheduler.outputs = self._scheduler.outputs, []
                now = self._now()
                for output in outputs:
                    self._take(output, now)
        host_seconds = self._now() - self._waited
        return Outcome(self._traces, facts={"steps": num_steps, "host_seconds": round(host_seconds, 4)})

    def _now(self) -> float:
        return time.perf_counter() - self._started

    def _admit(self, idle: bool) -> None:
        """Start the sessions that have arrived; when there is nothing else to do, wait for the next."""
        if idle and self._arrivals and (wait := self._arrivals[0][0] - self._now()) > 0:
            time.sleep(wait)
            self._waited += wait
        while self._arrivals and self._arrivals[0][0] <= self._now():
            arrival, index = heapq.heappop(self._arrivals)
            self._next_turn(self._conversations[index], arrival)

    def _next_turn(self, conversation: _Conversation, now: float) -> None:
        turn = next(conversation.turns, None)
        if turn is None:
            return
        conversation.said += turn.tokens
        conversation.trace = Trace(now, [], 0, len(conversation.said))
        self._traces.append(conversation.trace)
        number = next(self._ids)
        self._running[number] = conversation
        self._scheduler.add(
            Request(
                id=number,
                prompt=np.array(conversation.said, np.int32),
                params=SamplingParams(max_tokens=turn.num_outputs, temperature=self._temperature, seed=number),
                stop_token_ids=frozenset(),
                max_tokens=turn.num_outputs,
            )
        )

    def _take(self, output: Output, now: float) -> None:
        conversation = self._running[output.id]
        trace = conversation.trace
        if output.token is not None:
            conversation.said.append(output.token)
            trace.times.append(now)
            trace.num_tokens += 1
        if output.finish != RUNNING:
            del self._running[output.id]
            trace.num_cached_tokens = output.receipt.cached_tokens if output.receipt else None
            self._next_turn(conversation, now)


def main() -> None:
    config = EngineConfig.parse(msgspec.json.decode(sys.argv[1]))
    setup_logging(config.log_level)
    config = settle_device(config)
    worker = create_worker(config, Path(sys.argv[2]), Reporter())
    engine = OfflineEngine(config, worker)
    gc.collect()
    gc.freeze()  # what was loaded stays: collections need not look at it again
    for line in sys.stdin:
        outcome = engine.run(msgspec.json.decode(line, type=Load))
        sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")
        sys.stdout.flush()
    worker.close()


if __name__ == "__main__":
    main()
