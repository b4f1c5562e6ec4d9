"""Brings metrics to Triton about once a second, off the path of tokens: an update is a round trip to the server.

Triton counts the users of a series by model instance, not together: two instances with the same labels share it, and
the one that is unloaded first takes it away from the other, which then writes to freed memory (core,
src/metric_family.cc). So no two stubs ever have the same series at the same time: instances beyond the first label
theirs with ``model_instance``, and after a reload the new stub waits until the old one has deleted its own (`Turn`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radix_backend.client import EngineClient
from radix_backend.errors import RadixError
from radix_backend.triton.metrics import (
    COUNTER,
    ENGINE,
    ENGINE_RESTARTS,
    ENGINE_UP,
    GAUGE,
    HISTOGRAM,
    ITERATION_TOKENS,
    REQUEST,
    Family,
    Figures,
)
from radix_backend.triton.recorder import Recorder

PUSH_SECONDS = 1.0
# An observation costs the stub about 20 µs of CPU, nearly as much as a response, and Triton takes them one by one. So
# of what happens for every token, or every response, no more than this many are observed a push.
SAMPLES = 1000
_CLOSE_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Identity:
    """Which series are an instance's: ``labels`` of them all, and whether it ``speaks_for_engine``.

    ``args`` are those of Triton's `initialize`, ``groups`` is the model configuration's ``instance_group``.
    """

    def __init__(self, args: Mapping[str, str], groups: list[dict[str, Any]]) -> None:
        name = args["model_instance_name"]
        group: dict[str, Any] = groups[0] if groups else {"name": name}
        self.speaks_for_engine = name in (
            f"{group['name']}_0",
            group["name"],
        )  # older servers do not number a single one
        if args["model_instance_kind"] == "GPU":  # the instances of a group on all its devices have the same name
            device = args["model_instance_device_id"]
            self.speaks_for_engine &= device == str((group.get("gpus") or [device])[0])
            name += f"_gpu{device}"
        self.labels = {"model": args["model_name"], "version": args["model_version"]}
        if not self.speaks_for_engine:
            self.labels["model_instance"] = name


class Publisher:
    """Publishes for one model instance until it is closed."""

    def __init__(self, client: EngineClient, recorder: Recorder, identity: Identity, api: Any) -> None:
        """``api`` is `pb_utils.MetricFamily`."""
        self._client = client
        self._recorder = recorder
        self._identity = identity
        self._api = api
        self._figures: Figures | None = None  # the engine's latest
        self._totals = Totals(time.time())
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="radix-metrics", daemon=True)
        self._thread.start()
        if identity.speaks_for_engine:
            threading.Thread(target=self._poll, name="radix-stats", daemon=True).start()

    def close(self) -> None:
        """Push what is left and delete the series. Close the client afterwards."""
        self._closing.set()
        self._thread.join(_CLOSE_SECONDS)

    def _poll(self) -> None:
        """A thread of its own: the engine may take a while to answer, in a long step."""
        while not self._closing.is_set():
            try:
                self._figures = self._client.stats()
            except RadixError:
                self._figures = None
            self._closing.wait(PUSH_SECONDS)

    def _run(self) -> None:
        turn = Turn(self._identity.labels)
        while not turn.take():
            if self._closing.wait(PUSH_SECONDS):
                return
        try:
            series = _Series(self._api, self._identity)
        except Exception as error:  # Triton's own type; the server may have been started without metrics
            _log.warning("there will be no metrics of this model: %s", error)
            return
        try:
            closing = False
            while not closing:
                closing = self._closing.wait(PUSH_SECONDS)
                self._push(series)
        except Exception:
            _log.exception("metrics of this model stop")
        finally:
            series.delete()
            turn.give_back()

    def _push(self, series: _Series) -> None:
        observed: dict[tuple[Family, str], list[float]] = defaultdict(list)
        for family, value, observation in self._recorder.take():
            observed[family, value].append(observation)
        for (family, value), observations in observed.items():
            metric = series[family, value]
            if family.kind == COUNTER:
                metric.increment(sum(observations))
            else:
                for observation in sample(observations) if family.sampled else observations:
                    metric.observe(observation)
        if self._identity.speaks_for_engine:
            self._push_engine(series)

    def _push_engine(self, series: _Series) -> None:
        up = self._client.status.state == "ready"
        figures = self._figures if up else None
        series[ENGINE_UP, ""].set(float(up))
        for family in ENGINE:
            if family.kind == GAUGE:
                for value, read in (family.read or {}).items():
                    series[family, value].set(read(figures) if figures else 0.0)
        if figures:
            restarts, new = self._totals.advance(figures)
            series[ENGINE_RESTARTS, ""].increment(restarts)
            for family in ENGINE:
                if family.kind == COUNTER and family.read:
                    for value, read in family.read.items():
                        series[family, value].increment(read(new))
            observe_steps(series[ITERATION_TOKENS, ""], new)


class Totals:
    """Turns the engine's totals, which begin at 0 when it restarts, into what is new since the last look."""

    def __init__(self, since: float) -> None:
        """What an engine did that served before ``since`` (Unix seconds) is not counted."""
        self._since = since
        self._start_time: float | None = None
        self._last: Figures = {}

    def advance(self, figures: Figures) -> tuple[int, Figures]:
        """How often the engine was restarted, and how much each figure has grown."""
        start_time, restarts = figures["start_time"], 0
        if start_time != self._start_time:
            restarts = int(self._start_time is not None)
            self._start_time = start_time
            self._last = {} if start_time >= self._since else figures
        new = {name: value - self._last.get(name, 0.0) for name, value in figures.items()}
        self._last = figures
        return restarts, new


def sample(observations: list[float]) -> list[float]:
    """At most SAMPLES of them, drawn at random: quantiles and the mean stay what they are, but for noise."""
    return observations if len(observations) <= SAMPLES else random.sample(observations, SAMPLES)


def observe_steps(histogram: Any, new: Figures) -> None:
    """The engine counts its steps by bucket, with the sum of each: observing the mean is exact in counts and sum."""
    for name, total in new.items():
        prefix, _, bound = name.partition("_sum_le_")
        if prefix == "iteration_tokens" and bound and total:
            count = round(new[f"iteration_tokens_le_{bound}"])
            for _ in range(count):
                histogram.observe(total / count)


class _Series:
    """The metrics of one instance in Triton, by family and value of the label. All begin at 0."""

    def __init__(self, api: Any, identity: Identity) -> None:
        """Raises TritonModelException."""
        self._families = []  # a Metric does not keep its family alive
        self._metrics: dict[tuple[Family, str], Any] = {}
        for family in (ENGINE + REQUEST) if identity.speaks_for_engine else REQUEST:
            made = api(name=family.name, description=family.help, kind=getattr(api, family.kind.upper()))
            self._families.append(made)
            arguments = {"buckets": list(family.buckets)} if family.kind == HISTOGRAM else {}
            for value in family.values:
                labels = identity.labels | ({family.label: value} if family.label else {})
                self._metrics[family, value] = made.Metric(labels=labels, **arguments)

    def __getitem__(self, key: tuple[Family, str]) -> Any:
        return self._metrics[key]

    def delete(self) -> None:
        """Metrics first: Triton must not see a family go that has some."""
        self._metrics.clear()
        self._families.clear()


class Turn:
    """The right to the series of these labels, held by one stub of a server at a time.

    It is an abstract socket address, which the kernel frees with the process, however that ends.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        server = os.getppid()
        with contextlib.suppress(OSError):  # process ids alone are no names where containers share a network
            stat = Path(f"/proc/{server}/stat").read_text()
            server_start = stat.rpartition(")")[2].split()[19]
            labels = {**labels, "server_start": server_start}
        key = repr((os.getuid(), server, sorted(labels.items())))
        self._address = "\0radix-metrics-" + hashlib.sha256(key.encode()).hexdigest()
        self._socket: socket.socket | None = None

    def take(self) -> bool:
        """False while another stub has it."""
        held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            held.bind(self._address)
        except OSError:
            held.close()
            return False
        self._socket = held
        return True

    def give_back(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
