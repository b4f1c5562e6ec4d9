"""`/metrics`: what the publisher of metrics takes for Triton's API, over the Prometheus client library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Registry:
    """Families and their series, in the manner of `pb_utils.MetricFamily`."""

    COUNTER, GAUGE, HISTOGRAM = Counter, Gauge, Histogram

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call] # Triton has no such series
        self._registry = CollectorRegistry()

    def __call__(self, name: str, description: str, kind: type[Any]) -> _Family:
        return _Family(name, description, kind, self._registry)

    def page(self) -> bytes:
        return prometheus_client.generate_latest(self._registry)


class _Family:
    def __init__(self, name: str, description: str, kind: type[Any], registry: CollectorRegistry) -> None:
        self._declaration = (name, description)
        self._kind = kind
        self._registry = registry
        self._made: Any = None

    def Metric(self, labels: Mapping[str, str], buckets: Sequence[float] = ()) -> _Metric:  # noqa: N802 (Triton's)
        if self._made is None:
            options = {"buckets": buckets} if self._kind is Histogram else {}
            self._made = self._kind(*self._declaration, tuple(labels), registry=self._registry, **options)
        return _Metric(self._made.labels(**labels))


class _Metric:
    def __init__(self, series: Any) -> None:
        self._series = series

    def increment(self, value: float) -> None:
        self._series.inc(value)

    def set(self, value: float) -> None:
        self._series.set(value)

    def observe(self, value: float) -> None:
        self._series.observe(value)
