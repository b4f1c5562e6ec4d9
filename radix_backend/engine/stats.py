"""The engine's figures: what `Stats` calls answer and, later, what metrics export."""

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
        self._scheduler = scheduler
        self._host_seconds = 0.0

    @contextmanager
    def host_time(self) -> Iterator[None]:
        """CPU time of the loop's thread: what the engine itself costs beside the model."""
        start = time.thread_time()
        try:
            yield
        finally:
            self._host_seconds += time.thread_time() - start

    def snapshot(self, audit: bool = False) -> dict[str, float]:
        """All figures by name. Counts of pages, requests and tokens; totals since the start where named so."""
        scheduler, cache = self._scheduler, self._scheduler.cache
        pool = cache.pool
        figures: dict[str, float] = {
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
            "evicted_tokens_total": cache.num_evicted_tokens,
            "steps_total": self.num_steps,
            "host_seconds_total": self._host_seconds,
        }
        if audit:
            figures["audit_findings"] = len(cache.audit())
        return figures
