"""Situations that have broken engines of this kind, one by one, on the simulated worker."""

from __future__ import annotations

import numpy as np
import pytest

from radix_backend.engine.request import AGING_SECONDS, PROMPT_TOKEN_SECONDS, State
from radix_backend.engine.scheduler import _Rows
from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.protocol import ABORT, LENGTH, STOP
from tests.engine.sim import SimEngine, continuation

PREFIX = [7, 3, 9, 1] * 10  # ten pages of four


def launch_with_running_rows_stalled(engine: SimEngine) -> None:
    """A step in which running requests get no pages (as while pages retire), so that waiting ones are looked at."""
    make_room = engine.scheduler._make_room
    engine.scheduler._make_room = lambda request, count, rows: False  # type: ignore[method-assign]
    assert engine.launch() is None
    engine.scheduler._make_room = make_room  # type: ignore[method-assign]


def assert_nothing_held(engine: SimEngine) -> None:
    cache = engine.cache
    assert cache.audit() == []
    assert not cache.leases
    assert cache.pool.num_retiring == 0
    assert cache.num_available == cache.pool.num_pages


@pytest.mark.parametrize("depth", [1, 2])
def test_one_token_prompt(depth: int) -> None:
    engine = SimEngine()
    request = engine.add([5], max_tokens=9)
    engine.run(depth)
    assert engine.outputs[request] == continuation([5], 9)
    assert engine.finish[request] == LENGTH
    assert_nothing_held(engine)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 17])
def test_max_tokens_is_counted_exactly(max_tokens: int) -> None:
    engine = SimEngine()
    request = engine.add(PREFIX, max_tokens=max_tokens)
    engine.run()
    assert engine.outputs[request] == continuation(PREFIX, max_tokens)
    # a length stop is known in advance: the last token's KV is never computed
    assert engine.worker.num_computed_tokens == len(PREFIX) + max_tokens - 1


def test_stop_token_seen_late_discards_the_overrun() -> None:
    expected = continuation(PREFIX, 12)
    stop = expected[5]
    first = expected.index(stop)
    engine = SimEngine()
    request = engine.add(PREFIX, max_tokens=12, stop=(stop,))
    engine.run()
    assert engine.outputs[request] == expected[: first + 1]
    assert engine.finish[request] == STOP
    assert_nothing_held(engine)


def test_no_stop_is_honoured_before_min_tokens() -> None:
    expected = continuation(PREFIX, 12)
    engine = SimEngine()
    request = engine.add(PREFIX, max_tokens=12, stop=tuple(expected), min_tokens=5)
    engine.run()
    assert engine.outputs[request] == expected[:6]
    assert engine.finish[request] == STOP


def test_abort_while_waiting_is_silent_and_frees_everything() -> None:
    engine = SimEngine(max_bs=1)
    first = engine.add(PREFIX, max_tokens=30)
    second = engine.add([1, 2, 3], max_tokens=30)
    engine.launch()
    engine.scheduler.finish(second, ABORT)
    engine.run()
    assert engine.outputs[first] == continuation(PREFIX, 30)
    assert second not in engine.finish
    assert engine.scheduler.num_waiting == 0
    assert_nothing_held(engine)


def test_abort_during_a_prefill_chunk_keeps_pages_until_the_step_ends() -> None:
    engine = SimEngine(budget=8)
    request = engine.add(PREFIX, max_tokens=30)
    engine.launch()
    engine.launch()
    engine.scheduler.finish(request, ABORT)
    assert engine.cache.audit() == []
    assert engine.cache.num_available < engine.cache.pool.num_pages
    engine.settle()
    engine.settle()
    assert_nothing_held(engine)


def test_aborted_chunks_are_reused() -> None:
    engine = SimEngine(budget=8)
    request = engine.add(PREFIX, max_tokens=30)
    engine.launch()
    engine.scheduler.finish(request, ABORT)
    again = engine.add(PREFIX, max_tokens=3)
    engine.run()
    assert engine.outputs[again] == continuation(PREFIX, 3)
    assert engine.receipts[again].cached_tokens == 8


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("budget", [8, 32, 100])
def test_identical_prompts_at_once_compute_the_prefix_once(depth: int, budget: int) -> None:
    engine = SimEngine(budget=budget)
    requests = [engine.add([*PREFIX, i], max_tokens=3) for i in range(6)]
    engine.run(depth)
    for i, request in enumerate(requests):
        assert engine.outputs[request] == continuation([*PREFIX, i], 3)
    assert engine.worker.num_computed_tokens == len(PREFIX) + 6 * (1 + 2)
    assert [engine.receipts[r].cached_tokens for r in requests] == [0] + [len(PREFIX)] * 5
    assert_nothing_held(engine)


@pytest.mark.parametrize("depth", [1, 2])
def test_full_prefix_hit_computes_at_least_one_token(depth: int) -> None:
    engine = SimEngine()
    for _ in range(3):
        request = engine.add(PREFIX, max_tokens=2)
        engine.run(depth)
        assert engine.outputs[request] == continuation(PREFIX, 2)
    assert engine.receipts[request].cached_tokens == len(PREFIX) - 4
    assert_nothing_held(engine)


@pytest.mark.parametrize("depth", [1, 2])
def test_insert_of_pages_that_exist_remaps_and_releases_the_duplicates(depth: int) -> None:
    engine = SimEngine()
    first = engine.add(PREFIX, max_tokens=20)
    engine.launch()
    second = engine.add(PREFIX, max_tokens=20)  # must compute its last page again: it exists by then
    engine.run(depth)
    assert engine.outputs[first] == engine.outputs[second] == continuation(PREFIX, 20)
    # both generated the same tokens: one copy of their pages is in the tree
    assert engine.cache.tree.num_pages == (len(PREFIX) + 19) // 4
    assert_nothing_held(engine)


def test_remapped_pages_are_told_to_the_worker() -> None:
    engine = SimEngine()
    engine.add(PREFIX, max_tokens=20)
    engine.launch()
    second = engine.add(PREFIX, max_tokens=20)
    plan = engine.launch()
    slot = engine.scheduler.requests[second].slot
    duplicate = plan.page_ids[(plan.page_slots == slot) & (plan.page_index == 9)]
    following = engine.launch()
    remapped = following.page_ids[(following.page_slots == slot) & (following.page_index == 9)]
    assert len(remapped) == 1
    assert remapped[0] != duplicate[0]


@pytest.mark.parametrize("end", ["abort", "retract"])
def test_followers_go_on_when_their_leader_ends(end: str) -> None:
    engine = SimEngine(budget=8)
    leader = engine.add([*PREFIX, 1], max_tokens=2)
    engine.launch()
    followers = [engine.add([*PREFIX, 2 + i], max_tokens=2) for i in range(3)]
    launch_with_running_rows_stalled(engine)
    states = [engine.scheduler.requests[f].state for f in followers]
    assert states == [State.FOLLOWING] * 3
    if end == "abort":
        engine.scheduler.finish(leader, ABORT)
    else:
        engine.scheduler._retract(engine.scheduler.requests[leader], _Rows(99))
    engine.run()
    for i, follower in enumerate(followers):
        assert engine.outputs[follower] == continuation([*PREFIX, 2 + i], 2)
    assert_nothing_held(engine)


def test_a_follower_can_be_aborted() -> None:
    engine = SimEngine(budget=8)
    engine.add([*PREFIX, 1], max_tokens=2)
    engine.launch()
    follower = engine.add([*PREFIX, 2], max_tokens=2)
    launch_with_running_rows_stalled(engine)
    assert engine.scheduler.requests[follower].state is State.FOLLOWING
    engine.scheduler.finish(follower, ABORT)
    engine.run()
    assert engine.scheduler.num_waiting == 0
    assert_nothing_held(engine)


def test_a_follower_waits_only_for_what_it_shares() -> None:
    engine = SimEngine(num_pages=200, budget=8)
    engine.add(PREFIX + [2] * 80, max_tokens=1)
    engine.launch()
    follower = engine.add(PREFIX[:16] + [4] * 4, max_tokens=1)
    launch_with_running_rows_stalled(engine)
    assert engine.scheduler.requests[follower].state is State.FOLLOWING
    engine.launch()
    assert engine.scheduler.requests[follower].state is State.WAITING
    engine.run()
    assert engine.outputs[follower] == continuation(PREFIX[:16] + [4] * 4, 1)
    assert engine.receipts[follower].cached_tokens == 16


def test_a_leader_inherits_the_priority_of_its_followers() -> None:
    engine = SimEngine(budget=8)
    leader = engine.add([*PREFIX, 1], max_tokens=2, priority=50)
    engine.launch()
    engine.add([*PREFIX, 2], max_tokens=2, priority=-5)
    launch_with_running_rows_stalled(engine)
    request = engine.scheduler.requests[leader]
    assert request.effective_key < request.key


@pytest.mark.parametrize("depth", [1, 2])
def test_retracted_requests_come_back_and_lose_nothing(depth: int) -> None:
    engine = SimEngine(num_pages=16, page_size=4, max_bs=4)
    prompts = [[i] * 5 for i in range(4)]
    requests = [engine.add(prompt, max_tokens=30) for prompt in prompts]
    engine.run(depth)
    assert engine.scheduler.counters.retractions > 0
    for prompt, request in zip(prompts, requests, strict=True):
        assert engine.outputs[request] == continuation(prompt, 30)
        assert engine.finish[request] == LENGTH
    assert_nothing_held(engine)


def test_a_retracted_request_comes_back_only_with_its_token_in_flight() -> None:
    engine = SimEngine()
    request = engine.add([1, 2, 3], max_tokens=9)
    engine.launch()
    engine.scheduler._retract(engine.scheduler.requests[request], _Rows(99))
    assert engine.launch() is None  # there is room, but a token of it is still to come
    engine.settle()
    plan = engine.launch()
    assert plan is not None
    assert plan.new[0].token_ids.tolist() == [1, 2, 3, *engine.outputs[request]]
    engine.run()
    assert engine.outputs[request] == continuation([1, 2, 3], 9)


def test_retraction_of_a_request_whose_prefix_is_in_the_tree() -> None:
    engine = SimEngine(num_pages=24, page_size=4, max_bs=4)
    requests = [engine.add([*PREFIX, i], max_tokens=30) for i in range(4)]
    engine.run()
    assert engine.scheduler.counters.retractions > 0
    for i, request in enumerate(requests):
        assert engine.outputs[request] == continuation([*PREFIX, i], 30)
    assert_nothing_held(engine)


@pytest.mark.parametrize("depth", [1, 2])
def test_one_sequence_may_fill_the_whole_cache(depth: int) -> None:
    engine = SimEngine(num_pages=8, page_size=4)
    request = engine.add([1, 2, 3], max_tokens=1000)
    engine.run(depth)
    assert engine.finish[request] == LENGTH
    assert engine.outputs[request] == continuation([1, 2, 3], 30)  # 32 positions; the last token needs none
    assert_nothing_held(engine)


def test_prompt_larger_than_the_cache_is_refused() -> None:
    engine = SimEngine(num_pages=8, page_size=4)
    with pytest.raises(InvalidArgument, match=r"32 tokens; accepted: at most 31"):
        engine.add([1] * 32)
    fits = engine.add([1] * 31, max_tokens=5)
    engine.run()
    assert engine.outputs[fits] == continuation([1] * 31, 2)


def test_full_queue_refuses_and_recovers() -> None:
    engine = SimEngine(max_bs=1, queue=2)
    engine.add([1, 2], max_tokens=2)
    engine.launch()
    engine.add([1, 3], max_tokens=2)
    engine.add([1, 4], max_tokens=2)
    with pytest.raises(Unavailable, match="queue is full"):
        engine.add([1, 5], max_tokens=2)
    engine.run()
    late = engine.add([1, 5], max_tokens=2)
    engine.run()
    assert engine.outputs[late] == continuation([1, 5], 2)


def test_priority_is_served_first_but_waiting_outweighs_it() -> None:
    engine = SimEngine(max_bs=1)
    engine.add([1], max_tokens=2)
    engine.launch()
    normal = engine.add([2], max_tokens=2)
    urgent = engine.add([3], max_tokens=2, priority=-1)
    engine.now += AGING_SECONDS + 1
    late_urgent = engine.add([4], max_tokens=2, priority=-1)
    engine.run()
    assert [r for r in engine.finish if r in (normal, urgent, late_urgent)] == [urgent, normal, late_urgent]


def test_of_those_that_come_together_the_short_prompts_are_served_first() -> None:
    engine = SimEngine(num_pages=200, max_bs=1)
    engine.add([1], max_tokens=2)
    engine.launch()
    long = engine.add([2] * 200, max_tokens=2)
    short = engine.add([3], max_tokens=2)  # 1 ms later
    engine.now += 200 * PROMPT_TOKEN_SECONDS
    late = engine.add([4], max_tokens=2)
    engine.run()
    assert [r for r in engine.finish if r in (long, short, late)] == [short, long, late]


def test_decodes_are_never_stalled_by_a_long_prompt() -> None:
    engine = SimEngine(num_pages=200, budget=16)
    stream = engine.add([1, 2], max_tokens=20)
    engine.launch()
    engine.add([5] * 200, max_tokens=1)
    while engine.scheduler.requests.get(stream) is not None:
        plan = engine.launch()
        if stream in engine.scheduler.requests and plan is not None and engine.worker.queue:
            request = engine.scheduler.requests[stream]
            assert request.slot in plan.slots or request.remaining_tokens == 0
        engine.settle()
    assert engine.outputs[stream] == continuation([1, 2], 20)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_resumed_outputs_are_prefilled_but_stay_outputs(page_size: int) -> None:
    expected = continuation(PREFIX, 10)
    engine = SimEngine(page_size=page_size)
    request = engine.add(PREFIX, max_tokens=10, output_ids=tuple(expected[:6]))
    engine.run()
    assert engine.outputs[request] == expected[6:]
    assert engine.receipts[request].num_output_tokens == 10
    assert engine.receipts[request].resumed


def test_resumed_request_that_was_complete_ends_at_once() -> None:
    engine = SimEngine()
    request = engine.add(PREFIX, max_tokens=3, output_ids=(1, 2, 3))
    assert engine.finish[request] == LENGTH
    engine.run()
    assert_nothing_held(engine)


def test_namespaces_never_share() -> None:
    engine = SimEngine()
    engine.add(PREFIX, max_tokens=2, namespace="a")
    engine.run()
    other = engine.add(PREFIX, max_tokens=2, namespace="b")
    same = engine.add([*PREFIX, 1], max_tokens=2, namespace="a")
    engine.run()
    assert engine.receipts[other].cached_tokens == 0
    assert engine.receipts[same].cached_tokens == len(PREFIX)


def test_stop_from_the_gateway_is_answered_with_a_receipt() -> None:
    engine = SimEngine()
    request = engine.add([1, 2, 3], max_tokens=30)
    engine.launch()
    engine.launch()
    engine.settle()
    engine.scheduler.finish(request, STOP)
    engine.take()
    assert engine.finish[request] == STOP
    assert engine.receipts[request].num_output_tokens == 1
    engine.run()
    assert_nothing_held(engine)


def test_a_released_slot_is_reused_while_its_last_step_runs() -> None:
    engine = SimEngine(max_bs=1)
    first = engine.add([1, 2, 3], max_tokens=30)
    engine.launch()
    engine.launch()
    engine.scheduler.finish(first, ABORT)
    second = engine.add([4, 5, 6], max_tokens=30)
    engine.run()
    assert engine.outputs[second] == continuation([4, 5, 6], 30)


def test_plan_columns_are_int32() -> None:
    engine = SimEngine()
    engine.add(PREFIX, max_tokens=2)
    plan = engine.launch()
    for name in ("page_slots", "page_index", "page_ids", "slots", "num_tokens"):
        assert getattr(plan, name).dtype == np.int32


def test_a_prompt_to_be_scored_is_computed_although_it_is_cached() -> None:
    engine = SimEngine()
    engine.add(list(range(20)), max_tokens=3)
    engine.run()
    scored = engine.add(list(range(20)), max_tokens=3, prompt_logprobs=1)
    engine.run()
    assert engine.scored[scored] == list(range(1, 20))
    assert engine.receipts[scored].cached_tokens == 0
    assert engine.cache.audit() == []
    again = engine.add(list(range(20)), max_tokens=3)
    engine.run()
    assert engine.receipts[again].cached_tokens == 16


def test_a_prompt_that_is_scored_does_not_wait_for_a_leader_of_its_prefix() -> None:
    engine = SimEngine(budget=12)
    leader = engine.add(list(range(30)), max_tokens=3)
    scored = engine.add(list(range(30)), max_tokens=3, prompt_logprobs=1)
    engine.run()
    assert engine.scored == {scored: list(range(1, 30))}
    assert engine.outputs[leader] == engine.outputs[scored]


@pytest.mark.parametrize("launched", [1, 2, 3])
def test_a_prompt_retracted_half_way_is_scored_once(launched: int) -> None:
    engine = SimEngine(budget=8)
    scored = engine.add(list(range(23)), max_tokens=12, prompt_logprobs=1)
    for _ in range(launched):
        engine.launch()
    engine.scheduler._retract(engine.scheduler.requests[scored], _Rows(99))
    engine.run()
    assert engine.receipts[scored].retractions == 1
    assert engine.scored == {scored: list(range(1, 23))}
    assert engine.outputs[scored] == continuation(list(range(23)), 12)
    # What was scored before may come from the cache; with all chunks launched that is the whole prompt.
    assert engine.worker.num_computed_tokens < 23 + 12 + 8


def test_pipeline_stages_get_equal_microbatches_of_different_requests() -> None:
    engine = SimEngine(num_pages=200, max_bs=12, budget=200, pp_size=3)
    requests = [engine.add([i] * 5, max_tokens=9) for i in range(10)]
    first = engine.launch()
    assert first is not None
    assert len(first.slots) == 10
    engine.settle()
    plans = [engine.launch() for _ in range(3)]
    assert [len(plan.slots) for plan in plans if plan is not None] == [4, 4, 2]
    slots = [slot for plan in plans if plan is not None for slot in plan.slots.tolist()]
    assert sorted(slots) == list(range(10))
    following = engine.launch()  # before any of them has settled
    assert following is not None
    assert following.step == plans[0].step + 3
    assert following.slots.tolist() == plans[0].slots.tolist()
    engine.run(depth=4)
    assert [engine.outputs[request] for request in requests] == [continuation([i] * 5, 9) for i in range(10)]


@pytest.mark.parametrize(("ahead", "in_flight"), [(0, 1), (1, 2)])
def test_a_stream_alone_is_one_token_ahead_in_a_pipeline_too(ahead: int, in_flight: int) -> None:
    engine = SimEngine(num_pages=200, max_bs=12, budget=200, pp_size=3, ahead=ahead)
    request = engine.add([7] * 5, max_tokens=9)
    most = 0
    while engine.scheduler.requests:
        while engine.launch() is not None:
            most = max(most, len(engine.scheduler._launched))
        engine.settle()
    while engine.scheduler.has_steps_in_flight:
        engine.settle()
    assert most == in_flight
    assert engine.outputs[request] == continuation([7] * 5, 9)


def test_a_prompt_that_comes_meanwhile_fills_the_pipeline() -> None:
    engine = SimEngine(num_pages=200, max_bs=12, budget=200, pp_size=3)
    engine.add([7] * 5, max_tokens=9)
    first, second = engine.launch(), engine.launch()
    assert first is not None
    assert second is not None
    assert second.step == first.step + 3
    engine.add([8] * 5, max_tokens=9)
    third = engine.launch()
    assert third is not None
    assert third.step == second.step + 1
    assert third.num_tokens.tolist() == [5]
    engine.run(depth=4)
