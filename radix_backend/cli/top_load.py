"""What an engine does in an interval, seen through a server's metrics or asked of the engine itself."""

from __future__ import annotations

import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from radix_backend.client import EngineClient
from radix_backend.errors import Unavailable
from radix_backend.metrics.families import ENGINE

_ANSWER_SECONDS = 5.0
_USAGE = "radix:kv_cache_usage_perc"

Values = Mapping[str, float]  # of metrics, by name


class Load(msgspec.Struct):
    """Shares are from 0 to 1."""

    requests_running: int
    requests_waiting: int
    kv_cache_usage: float
    prefix_cache_hit_rate: float | None  # of the interval's prompt tokens, or of all where it has none
    prompt_tokens_per_second: float
    generation_tokens_per_second: float
    preemptions_total: int

    @classmethod
    def between(cls, before: Values, after: Values, seconds: float) -> Load:
        """Raises Unavailable when the engine was started again in between."""
        new = {name: after[name] - before[name] for name in after}
        asked, hits = "radix:prefix_cache_queries_total", "radix:prefix_cache_hits_total"
        if new[asked] < 0:
            raise Unavailable("the engine was started again")
        cached = new if new[asked] else after
        return cls(
            requests_running=round(after["radix:num_requests_running"]),
            requests_waiting=round(after["radix:num_requests_waiting"]),
            kv_cache_usage=after[_USAGE],
            prefix_cache_hit_rate=cached[hits] / cached[asked] if cached[asked] else None,
            prompt_tokens_per_second=new["radix:prompt_tokens_total"] / seconds,
            generation_tokens_per_second=new["radix:generation_tokens_total"] / seconds,
            preemptions_total=round(after["radix:num_preemptions_total"]),
        )


class Loads:
    """One interval after the other."""

    def __init__(self, look: Callable[[], Values], interval: float) -> None:
        """``interval`` is in seconds."""
        self._look = look
        self._interval = interval
        self._last: tuple[float, Values] | None = None

    def next(self) -> Load:
        """Waits for the end of the interval. Raises what ``look`` does; the next one begins anew then."""
        started, before = self._last or (time.monotonic(), self._look())
        self._last = None
        time.sleep(self._interval)
        ended, after = self._last = time.monotonic(), self._look()
        return Load.between(before, after, ended - started)


def ask(client: EngineClient) -> Values:
    """The engine's own figures, under the names of the metrics that are made from them. Raises Unavailable."""
    figures = client.stats()
    values = {family.name: family.read[""](figures) for family in ENGINE if family.read and "" in family.read}
    return values | {"radix:generation_tokens_total": figures["generation_tokens_total"]}


def scrape(url: str) -> Values:
    """A server's metrics: sums over its models, of the cache's usage the highest. Raises Unavailable."""
    url = url.rstrip("/").removesuffix("/metrics").removesuffix("/v1") + "/metrics"
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_SECONDS) as answer:
            page = answer.read().decode()
    except (OSError, ValueError) as error:
        raise Unavailable(f"{url}: {error}") from None
    values: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == _USAGE:
                values[_USAGE] = max(values[_USAGE], sample.value)
            elif sample.name.startswith("radix:"):
                values[sample.name] += sample.value
    if _USAGE not in values:
        raise Unavailable(f"{url} shows no metrics of this backend: no such model is loaded there")
    return values
