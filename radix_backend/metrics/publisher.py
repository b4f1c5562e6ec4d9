"""Brings metrics to whoever exposes them, about once a second, off the path of tokens."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Protocol

from radix_backend.client import EngineClient
from radix_backend.errors import RadixError
from radix_backend.metrics.families import (
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
from radix_backend.metrics.recorder import Recorder

PUSH_SECONDS = 1.0
# An observation costs Triton's stub about 20 µs of CPU, nearly as much as a response, and Triton takes them one by one.
# So of what happens for every token, or every response, no more than this many are observed a push.
SAMPLES = 1000
_CLOSE_SECONDS = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """Which series are the publisher's."""

    labels: dict[str, str]  # of them all
    speaks_for_engine: bool = True  # whether what the engine does is among them


class Turn(Protocol):
    """The right to one's series, where another process may still have them."""

    def take(self) -> bool: ...

    def give_back(self) -> None: ...


class Publisher:
    """Publishes for one model instance, or another door, until it is closed."""

    def __init__(
        self, client: EngineClient, recorder: Recorder, identity: Identity, api: Any, turn: Turn | None = None
    ) -> None:
        """``api`` is `pb_utils.MetricFamily` or what does as it does. Nothing is published before ``turn`` comes."""
        self._client = client
        self._recorder = recorder
        self._identity = identity
        self._api = api
        self._turn = turn
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
        while self._turn is not None and not self._turn.take():
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
            if self._turn is not None:
                self._turn.give_back()

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
    """The metrics of one publisher, by family and value of the label. All begin at 0."""

    def __init__(self, api: Any, identity: Identity) -> None:
        """Raises what the API does."""
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
