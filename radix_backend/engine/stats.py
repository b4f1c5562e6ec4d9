"""The engine's figures: what `Stats` calls answer and the doors' metrics are made from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from radix_backend.engine.page_pool import FREE, LEASED, QUARANTINED, RETIRING, TREE
from radix_backend.engine.scheduler import Scheduler


class Stats:
    """Counts what the scheduler and the cache do not count themselves."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.num_steps = 0
        self._start_time = time.time()
        self._launches: dict[int, list[int]] = {}  # bucket → steps, tokens
        self._scheduler = scheduler
        self._host_seconds = 0.0

    def count_launch(self, num_tokens: int) -> None:
        """A step of ``num_tokens`` (1 or more) was launched."""
        bucket = self._launches.setdefault((num_tokens - 1).bit_length(), [0, 0])
        bucket[0] += 1
        bucket[1] += num_tokens

    @contextmanager
    def host_time(self) -> Iterator[None]:
        """CPU time of the loop's thread: what the engine itself costs beside the model."""
        start = time.thread_time()
        try:
            yield
        finally:
            self._host_seconds += time.thread_time() - start

    def snapshot(self, audit: bool = False) -> dict[str, float]:
        """All figures by name. Counts of pages, requests and tokens; totals since the start where named so.

        ``start_time`` is in Unix seconds. ``iteration_tokens_le_<2**n>`` counts the steps of more than ``2**(n - 1)``
        and at most ``2**n`` tokens, ``iteration_tokens_sum_le_<2**n>`` is the sum of their tokens.
        """
        scheduler, cache = self._scheduler, self._scheduler.cache
        pool = cache.pool
        figures: dict[str, float] = {
            "start_time": self._start_time,
            "requests_running": len(scheduler.running),
            "requests_waiting": scheduler.num_waiting,
            "pages": pool.num_pages,
            "page_size": cache.page_size,
            "pages_free": pool.count(FREE),
            "pages_tree": pool.count(TREE),
            "pages_leased": pool.count(LEASED),
            "pages_retiring": pool.count(RETIRING),
            "pages_quarantined": pool.count(QUARANTINED),
            "pages_evictable": cache.tree.num_evictable,
            "prompt_tokens_total": scheduler.counters.prompt_tokens,
            "cached_tokens_total": scheduler.counters.cached_tokens,
            "generation_tokens_total": scheduler.counters.generation_tokens,
            "retractions_total": scheduler.counters.retractions,
            "resumed_total": scheduler.counters.resumed,
            "evicted_tokens_total": cache.num_evicted_tokens,
            "steps_total": self.num_steps,
            "host_seconds_total": self._host_seconds,
        }
        for power, (steps, tokens) in self._launches.items():
            figures[f"iteration_tokens_le_{2**power}"] = steps
            figures[f"iteration_tokens_sum_le_{2**power}"] = tokens
        if audit:
            figures["audit_findings"] = len(cache.audit())
        return figures
