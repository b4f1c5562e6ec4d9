"""The engine's loop: receive → schedule → launch → settle.

With async scheduling step *n+1* is scheduled and launched while step *n* runs; its tokens are read one step late.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import msgspec
import zmq

from radix_backend.config import EngineConfig
from radix_backend.engine.kv_cache import KVCache
from radix_backend.engine.request import Request
from radix_backend.engine.scheduler import Scheduler
from radix_backend.engine.stats import Stats
from radix_backend.errors import RadixError
from radix_backend.process import Reporter
from radix_backend.protocol import (
    Admit,
    EngineCommand,
    EngineProfile,
    EngineRejected,
    EngineReply,
    EngineStats,
    Finish,
    Message,
    Step,
    array,
    column,
)
from radix_backend.worker.interface import NoProfiler, Profiler, Worker

log = logging.getLogger(__name__)

AUDIT_SECONDS = 60.0
IDLE_POLL_MS = 500
PROFILE_STEPS = 2000  # after which a forgotten profile ends by itself: it takes memory with every step


class EngineCore:
    """Serves one gateway over ``socket`` (a ZeroMQ PAIR)."""

    def __init__(
        self,
        config: EngineConfig,
        worker: Worker,
        socket: zmq.Socket[bytes],
        reporter: Reporter,
        profiler: Profiler | None = None,
    ) -> None:
        """``config`` is settled (`EngineConfig.on_device`)."""
        self.cache = KVCache(worker.num_pages, config.page_size)
        self.scheduler = Scheduler(
            self.cache,
            max_bs=config.max_bs,
            max_batched_tokens=config.max_batched_tokens,
            max_queue_size=config.max_queue_size,
            pp_size=config.pp_size,
            ahead=config.steps_in_flight - config.pp_size,
        )
        self.stats = Stats(self.scheduler)
        self._namespace = config.namespace
        self._depth = config.steps_in_flight
        self._worker = worker
        self._socket = socket
        self._reporter = reporter
        self._commands = msgspec.msgpack.Decoder(EngineCommand)
        self._encoder = msgspec.msgpack.Encoder()
        self._num_launched = 0  # steps in flight
        self._next_audit = time.monotonic() + AUDIT_SECONDS
        self._stopping = False
        self._profiler = profiler or NoProfiler()
        self._profile_until = 0  # steps
        if config.profile:
            self._start_profile()

    def stop(self) -> None:
        """Make `run` return (from a signal handler)."""
        self._stopping = True

    def run(self) -> None:
        while not self._stopping:
            self.turn()
        self._worker.close()
        self._end_profile()

    def turn(self) -> None:
        """One turn of the loop; waits for a message when there is nothing else to do."""
        self._receive(block=self._num_launched == 0 and not self.scheduler.requests)
        with self.stats.host_time():
            with self._profiler.phase("schedule"):
                plan = self.scheduler.schedule()
            if plan is not None:
                with self._profiler.phase("launch"):
                    self._worker.launch(plan)
                self.stats.count_launch(int(plan.num_tokens.sum()))
                self._num_launched += 1
            self._flush()
        if self._num_launched == self._depth or (plan is None and self._num_launched):
            with self._profiler.phase("settle"):
                with self._profiler.phase("wait"):
                    result = self._worker.settle()
                self._num_launched -= 1
                with self.stats.host_time():
                    self.scheduler.settle(result)
                    self._flush()
            self.stats.num_steps += 1
            self._reporter.progress()
        elif not self.scheduler.requests:
            self._reporter.progress()
        if self._profiler.active and self.stats.num_steps >= self._profile_until:
            log.warning("the profile ends by itself after %d steps", PROFILE_STEPS)
            self._end_profile()
        if time.monotonic() > self._next_audit:
            self._next_audit = time.monotonic() + AUDIT_SECONDS
            for finding in self.cache.audit(repair=True):
                log.error("audit: %s", finding)

    def _receive(self, block: bool) -> None:
        if block and not self._socket.poll(IDLE_POLL_MS):
            return
        while True:
            try:
                data = self._socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            with self.stats.host_time():
                self._handle(self._commands.decode(data))
                self._flush()

    def _handle(self, command: EngineCommand) -> None:
        if isinstance(command, Admit):
            request = Request(
                id=command.id,
                prompt=array(command.input_ids, "<i4"),
                params=command.params,
                stop_token_ids=frozenset(command.stop_token_ids),
                max_tokens=command.params.max_tokens,
                priority=command.priority,
                namespace=self._namespace,
                bad_words=tuple(map(tuple, command.bad_words)),
                output_ids=array(command.output_ids, "<i4").tolist(),
            )
            try:
                self.scheduler.add(request)
            except RadixError as error:
                self._send(EngineRejected(command.id, error.code, str(error)))
        elif isinstance(command, Finish):
            for request_id in command.ids:
                self.scheduler.finish(request_id, command.reason)
        elif isinstance(command, EngineStats):
            self._send(EngineReply(command.call, self.stats.snapshot(audit=command.audit)))
        elif isinstance(command, EngineProfile):
            try:
                path = self._start_profile() if command.start else self._profiler.stop()
            except RadixError as error:
                self._send(EngineReply(command.call, "", error.code, str(error)))
            else:
                self._send(EngineReply(command.call, path))

    def _end_profile(self) -> None:
        """If one is being recorded, of which nobody hears."""
        if self._profiler.active:
            try:
                log.info("profile: %s", self._profiler.stop())
            except RadixError as error:
                log.warning("%s", error)

    def _start_profile(self) -> str:
        self._profiler.start()
        self._profile_until = self.stats.num_steps + PROFILE_STEPS
        return ""

    def _flush(self) -> None:
        """Send what the scheduler produced: the outputs as one message of columns."""
        prompt_scores, self.scheduler.prompt_scores = self.scheduler.prompt_scores, []
        for scores in prompt_scores:
            self._send(scores)
        outputs, self.scheduler.outputs = self.scheduler.outputs, []
        if not outputs:
            return
        logprobs = [output.logprobs for output in outputs if output.token is not None]
        self._send(
            Step(
                ids=column([output.id for output in outputs], "<i8"),
                counts=column([output.token is not None for output in outputs], "<i4"),
                finish=column([output.finish for output in outputs], "u1"),
                tokens=column([output.token for output in outputs if output.token is not None], "<i4"),
                receipts=[output.receipt for output in outputs if output.receipt is not None],
                logprobs=logprobs if any(logprobs) else [],
            )
        )

    def _send(self, message: Message) -> None:
        self._socket.send(self._encoder.encode(message))


def bind(address: str) -> tuple[zmq.Context[Any], zmq.Socket[bytes]]:
    """The engine's end of the pair. Unlimited queues: a gateway that stops reading is restarted, with the engine."""
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.linger = 0
    socket.bind(address)
    return context, socket
