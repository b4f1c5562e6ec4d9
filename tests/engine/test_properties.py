"""The page invariant and the token streams under random interleavings with steps in flight."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from radix_backend.engine.page_pool import FREE, LEASED, PageError, PagePool
from radix_backend.errors import InvalidArgument
from radix_backend.protocol import ABORT, LENGTH, STOP
from tests.engine.sim import SimEngine, continuation

# Prompts that share prefixes of several lengths: a stem cut somewhere, then a tail from a tiny alphabet.
STEMS = [[1, 2, 3, 4, 5, 6, 7, 8] * 4, [1, 2, 3, 4, 9, 9, 9, 9] * 4]
prompts = st.builds(
    lambda stem, cut, tail: (stem[:cut] + tail) or [0],
    st.sampled_from(STEMS),
    st.integers(0, 32),
    st.lists(st.integers(0, 2), max_size=6),
)


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 2, 4, 16]),
        num_tokens=st.integers(40, 160),
        max_bs=st.integers(1, 5),
        budget=st.integers(5, 48),
        pp_size=st.integers(1, 3),
    )
    def build(self, page_size: int, num_tokens: int, max_bs: int, budget: int, pp_size: int) -> None:
        self.engine = SimEngine(max(2, num_tokens // page_size), page_size, max_bs, budget, pp_size=pp_size)
        self.live: dict[int, tuple[list[int], int, tuple[int, ...]]] = {}
        self.aborted: set[int] = set()
        self.scored: set[int] = set()

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 25),
        priority=st.integers(-2, 2),
        stop=st.lists(st.integers(0, 49), max_size=4),
        resumed=st.integers(0, 6),
        scored=st.booleans(),
    )
    def add(
        self, prompt: list[int], max_tokens: int, priority: int, stop: list[int], resumed: int, scored: bool
    ) -> None:
        outputs = continuation(prompt, min(resumed, max_tokens - 1))
        if scored or any(token in stop for token in outputs):
            outputs = []
        try:
            wanted = {"prompt_logprobs": 0} if scored else {}
            request = self.engine.add(prompt, max_tokens, priority, tuple(stop), tuple(outputs), **wanted)
        except InvalidArgument:
            return
        if scored:
            self.scored.add(request)
        self.live[request] = (prompt, max_tokens, tuple(stop))
        self.engine.outputs[request] = list(outputs)

    @precondition(lambda self: len(self.engine.worker.queue) < 3)
    @rule()
    def launch(self) -> None:
        self.engine.launch()

    @precondition(lambda self: bool(self.engine.worker.queue))
    @rule()
    def settle(self) -> None:
        self.engine.settle()

    @rule(data=st.data(), reason=st.sampled_from([ABORT, STOP]))
    def end(self, data: st.DataObject, reason: int) -> None:
        running = sorted(self.engine.scheduler.requests)
        if running:
            request = data.draw(st.sampled_from(running))
            self.engine.scheduler.finish(request, reason)
            self.engine.take()
            self.aborted.add(request)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        assert self.engine.cache.audit() == []

    @invariant()
    def waiting_requests_hold_nothing(self) -> None:
        running = set(self.engine.scheduler.running)
        waiting = [r for r in self.engine.scheduler.requests.values() if r not in running]
        assert len(waiting) == self.engine.scheduler.num_waiting
        assert all(request.lease is None for request in waiting)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        engine.run()
        for request, (prompt, max_tokens, stop) in self.live.items():
            expected = continuation(prompt, max_tokens)
            ends = [i for i, token in enumerate(expected) if token in stop]
            expected = expected[: ends[0] + 1] if ends else expected
            got = engine.outputs[request]
            positions = list(range(1, len(prompt))) if request in self.scored else []
            found = engine.scored.get(request, [])
            assert found == (positions if got else positions[: len(found)])  # each once, in order, whatever was cached
            assert got == expected[: len(got)]
            if request not in self.aborted:
                fills_cache = len(prompt) + len(got) > engine.cache.pool.num_pages * engine.cache.page_size - 1
                assert got == expected or (engine.finish[request] == LENGTH and fills_cache)
        cache = engine.cache
        assert not cache.leases
        assert cache.pool.num_retiring == 0
        evicted = cache.tree.evict(cache.pool.num_pages)
        cache.pool.reclaim(evicted)
        assert cache.pool.num_free == cache.pool.num_pages


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(prompts, st.integers(1, 20)), min_size=1, max_size=12),
    page_size=st.sampled_from([1, 4, 16]),
    budget=st.integers(8, 64),
)
def test_async_and_sync_scheduling_give_the_same_streams(
    requests: list[tuple[list[int], int]], page_size: int, budget: int
) -> None:
    streams = []
    for depth in (1, 2, 3):
        engine = SimEngine(240 // page_size, page_size, max_bs=6, budget=budget)
        ids = [engine.add(prompt, max_tokens) for prompt, max_tokens in requests]
        engine.run(depth)
        streams.append([engine.outputs[i] for i in ids])
    assert streams[0] == streams[1] == streams[2]
    assert streams[0] == [continuation(prompt, max_tokens) for prompt, max_tokens in requests]


def test_a_wrong_move_raises_at_once() -> None:
    pool = PagePool(4)
    pages = pool.lease(2)
    pool.publish(pages[:1])
    with pytest.raises(PageError, match="is tree, not leased"):
        pool.retire(pages, 1)
    with pytest.raises(PageError, match="is leased, not tree"):
        pool.reclaim(pages[1:])
    with pytest.raises(PageError, match="pages wanted"):
        pool.lease(3)


def test_the_audit_finds_and_quarantines_a_lost_page() -> None:
    engine = SimEngine()
    request = engine.add([1, 2, 3, 4, 5], max_tokens=9)
    engine.launch()
    lost = engine.scheduler.requests[request].lease.table.pop()
    assert engine.cache.pool.state(lost) == LEASED
    assert engine.cache.audit(repair=True) == [f"page {lost}: recorded as leased, found in: nowhere"]
    assert engine.cache.audit() == []
    assert engine.cache.num_quarantined == 1


def test_a_quarantined_free_page_is_never_leased() -> None:
    pool = PagePool(3)
    pool.quarantine(1)
    assert pool.state(1) != FREE
    assert sorted(pool.lease(2)) == [0, 2]
