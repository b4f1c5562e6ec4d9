"""Ranks on other hosts: placed by somebody else, reached over TCP with keys."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from radix_backend.config import EngineConfig
from radix_backend.errors import Unavailable
from radix_backend.process import Reporter
from radix_backend.worker.agent import Place, RankTask
from radix_backend.worker.channel import SILENCE_SECONDS, Hub
from radix_backend.worker.executor import RankEnded, RankMessage
from radix_backend.worker.rank import RankSpec
from radix_backend.worker.ranks import Meeting, listen

_START_SECONDS = 60.0  # for a rank's agent to be heard of first
_TICK = 0.25  # seconds between looks at clocks
_LAST_WORDS_SECONDS = 0.3  # for what a rank said before its end to arrive: it takes another way than the news of it


class Placement(Protocol):
    """Finds hosts for ranks and runs an agent for each."""

    def place(self) -> list[Place]:
        """By rank; that of rank 0 is on this host. Raises RadixError; nothing is left then."""

    def start(self, tasks: Sequence[RankTask]) -> None:
        """Have an agent attend to each, in its rank's place. The rank's GPU is the only one that it sees."""

    def fileno(self) -> int:
        """Readable when `ended` has news."""

    def ended(self) -> list[tuple[int, str]]:
        """The ranks that have ended since the last call, and how: "exited with status 0". Does not wait.

        Raises EOFError when nobody looks after the agents any more.
        """

    def close(self) -> None:
        """End the agents that are left, and with them their ranks."""


class RemoteExecutor:
    """`Executor` of ranks that a `Placement` places. Rank 0 uses the place it is given."""

    notice_seconds = SILENCE_SECONDS + _LAST_WORDS_SECONDS + 2 * _TICK  # where the network alone tells

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._places: list[Place] = []
        self._left: set[int] = set()  # ranks that have not ended
        self._started_at = self._looked_at = 0.0
        self._heard: dict[int, float] = {}  # when last, by rank
        self._ended: list[tuple[float, RankEnded]] = []  # when it was known
        self._finished = threading.Event()
        self._hub: Hub | None = None

    def start(self, config: EngineConfig, model_dir: Path, reporter: Reporter) -> tuple[Meeting, socket.socket]:
        reporter.phase("placing ranks")
        self._places = self._placement.place()
        try:
            return self._start(config, model_dir)
        except BaseException:
            self.close()
            raise

    def _start(self, config: EngineConfig, model_dir: Path) -> tuple[Meeting, socket.socket]:
        one_host = tp_on_one_host(self._places, config.tp_size)
        if config.all_reduce == "one-shot" and not one_host:
            raise Unavailable(
                "setting 'all_reduce' is 'one-shot', which tensor parallel ranks on different hosts cannot: "
                f"{self.whereabouts}; accepted: auto, nccl"
            )
        gpu = visible_gpu(self._places[0].gpu)
        host = self._places[0].address
        hub = self._hub = Hub(host, range(1, config.num_ranks))
        listener = listen(config, host)
        port = listener.getsockname()[1]

        def task(rank: int) -> RankTask:
            meeting = Meeting(port, host, self._places[rank].address, tp_on_one_host=one_host)
            spec = RankSpec(config, os.fspath(model_dir), rank, hub.door(rank), meeting)
            return RankTask(rank, msgspec.json.encode(spec), hub.door(rank))

        self._left = set(range(1, config.num_ranks))
        self._started_at = self._looked_at = time.monotonic()
        self._placement.start([task(rank) for rank in sorted(self._left)])
        return Meeting(port, host, host, gpu, one_host), listener

    @property
    def whereabouts(self) -> str:
        return ", ".join(f"rank {rank} on {place.address}" for rank, place in enumerate(self._places))

    def send(self, data: bytes) -> None:
        assert self._hub is not None
        self._hub.send(data)

    def receive(self, timeout: float) -> list[RankMessage | RankEnded] | None:
        assert self._hub is not None
        if not self._left and not self._ended:
            self._finished.set()
        if self._finished.is_set():
            return None
        poller = zmq.Poller()
        poller.register(self._hub.reports, zmq.POLLIN)
        poller.register(self._placement.fileno(), zmq.POLLIN)
        poller.poll(int(min(timeout, _TICK) * 1000))
        events: list[RankMessage | RankEnded] = []
        while (message := self._hub.receive()) is not None:
            rank, data = message
            self._heard[rank] = time.monotonic()
            events.append(RankMessage(rank, data))
        self._look_for_ends()
        now = time.monotonic()
        events += [ended for at, ended in self._ended if now - at >= _LAST_WORDS_SECONDS]
        self._ended = [(at, ended) for at, ended in self._ended if now - at < _LAST_WORDS_SECONDS]
        return events

    def _look_for_ends(self) -> None:
        now = time.monotonic()
        if (standstill := now - self._looked_at) > 4 * _TICK:  # of this process, which says nothing of others
            self._heard = {rank: min(at + standstill, now) for rank, at in self._heard.items()}
        self._looked_at = now
        try:
            for rank, how in self._placement.ended():
                self._lose(rank, how)
        except EOFError:
            for rank in list(self._left):
                self._lose(rank, "is lost: the process that watches the ranks on other hosts has ended")
        for rank in list(self._left):
            if rank not in self._heard and now - self._started_at > _START_SECONDS:
                self._lose(rank, f"has not been heard of for {_START_SECONDS:g} s")
            elif now - self._heard.get(rank, now) > SILENCE_SECONDS:
                self._lose(rank, f"is lost: its host does not answer (for {SILENCE_SECONDS:g} s)")

    def _lose(self, rank: int, how: str) -> None:
        if rank in self._left:
            self._left.remove(rank)
            reason = f"rank {rank} on {self._places[rank].address} {how}"
            self._ended.append((time.monotonic(), RankEnded(rank, reason)))

    def end(self, patience: float) -> None:
        self._finished.wait(patience)
        self._finished.set()

    def close(self) -> None:
        self._placement.close()
        if self._hub is not None:
            self._hub.close()


def tp_on_one_host(places: Sequence[Place], tp_size: int) -> bool:
    """Whether the ranks of each stage are."""
    stages = range(0, len(places), tp_size)
    return all(len({place.node for place in places[first : first + tp_size]}) == 1 for first in stages)


def visible_gpu(name: str | None) -> int:
    """The index in this process of a GPU. Raises Unavailable where it is hidden."""
    if name is None:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [each.strip() for each in visible.split(",")]
    if names is not None and name in names:
        return names.index(name)
    if names is None and name.isdecimal():
        return int(name)
    raise Unavailable(
        f"rank 0 was given GPU {name} of this host, which CUDA_VISIBLE_DEVICES={visible or ''} hides from the engine"
    )
