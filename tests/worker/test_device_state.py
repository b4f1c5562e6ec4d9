"""What is special about rows, in Triton's interpreter or on a GPU."""

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.attention.cuda_extend import cut
from radix_backend.sampling_params import SamplingParams
from radix_backend.worker.device_state import DeviceState
from radix_backend.worker.interface import NewRequest, StepPlan
from tests.engine.sim import SimEngine

pytestmark = on_gpu


def steps_that_are_special(count, **sampling):
    """Of a prompt's only step and the decodes that follow."""
    state = DeviceState(2, 64, 16, 8, 8, torch.device(DEVICE))
    params = SamplingParams(seed=0, max_tokens=20, **sampling)
    new = [NewRequest(1, np.arange(5, dtype=np.int32), 5, 0, params, stop_token_ids=(3,))]
    slots, every = np.array([1], np.int32), np.ones(1, np.bool_)
    special = []
    for step in range(count):
        tokens = np.array([1 if step else 5], np.int32)
        plan = StepPlan(
            step, [] if step else new, slots=slots, num_tokens=tokens, sample=every, num_decode=int(step > 0)
        )
        staged = state.stage(plan)
        rows = staged.special if step else staged.prefill.special
        special.append(rows is not None)
        if rows is not None:
            assert (rows.rows.tolist(), rows.slots.tolist()) == ([0], [1])
            assert bool(rows.rules[0]) == ("logprobs" not in sampling)
            assert rows.counts == ([sampling["logprobs"]] if "logprobs" in sampling else [])
    return special


def test_a_minimum_of_tokens_is_special_until_it_is_reached():
    assert steps_that_are_special(5, min_tokens=3) == [True, True, True, False, False]


def test_penalties_and_log_probabilities_are_special_to_the_end():
    assert steps_that_are_special(4, min_tokens=1, presence_penalty=0.5) == [True] * 4
    assert steps_that_are_special(4, logprobs=1) == [True] * 4
    assert steps_that_are_special(4) == [False] * 4


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sets(st.integers(1, 30), max_size=4))
def test_pieces_of_chunks_are_the_chunks(counts, cuts):
    num_tokens = np.array(counts, np.int32)
    ends = num_tokens.cumsum(dtype=np.int32)
    bounds = [0, *sorted(each for each in cuts if each < ends[-1]), int(ends[-1])]
    found = []
    for start, stop in itertools.pairwise(bounds):
        chosen, begins, taken = cut(ends - num_tokens, ends, slice(start, stop))
        assert begins[0] == start
        assert taken.sum() == stop - start
        for chunk, begin, count in zip(chosen, begins, taken, strict=True):
            found += [(chunk, token) for token in range(begin, begin + count)]
    assert found == [(chunk, token) for token, chunk in enumerate(np.repeat(np.arange(len(counts)), counts))]


def test_a_step_in_pieces_is_the_whole_step():
    def halves(tokens):
        return [slice(0, tokens // 2), slice(tokens // 2, tokens)]

    state = DeviceState(2, 64, 16, 4, 8, torch.device(DEVICE), pieces=halves)
    params = SamplingParams(seed=0, max_tokens=20)
    new = [NewRequest(slot, np.arange(count, dtype=np.int32), count, 0, params) for slot, count in ((1, 5), (0, 9))]
    slots, tokens, every = np.array([1, 0], np.int32), np.array([5, 9], np.int32), np.ones(2, np.bool_)
    prefill = state.stage(StepPlan(0, new, slots=slots, num_tokens=tokens, sample=every)).prefill
    assert prefill.positions.tolist() == [*range(5), *range(9)]
    assert prefill.slots.tolist() == [1] * 5 + [0] * 9
    assert state.begin_prefill(prefill).tolist() == [*range(5), *range(9)]
    assert state.lengths.tolist() == [9, 5]
    assert prefill.sampled.tolist() == [4, 13]
    first, second = prefill.pieces
    assert (first.positions.tolist(), first.slots.tolist()) == ([*range(5), 0, 1], [1] * 5 + [0] * 2)
    assert (second.positions.tolist(), second.slots.tolist()) == ([*range(2, 9)], [0] * 7)
    assert (first.chunks.num_tokens.tolist(), first.chunks.lengths.tolist()) == ([5, 2], [5, 2])
    assert (second.chunks.num_tokens.tolist(), second.chunks.lengths.tolist()) == ([7], [9])
    # First token of the piece, number of tokens, end of its KV, slot, KV before it.
    assert sorted(first.tiles.tolist()) == [[0, 4, 4, 1, 0], [4, 1, 5, 1, 4], [5, 2, 2, 0, 0]]
    assert sorted(second.tiles.tolist()) == [[0, 4, 6, 0, 2], [4, 3, 9, 0, 6]]
    assert second.chunks.device_slots.tolist() == [0]
    assert second.chunks.device_lengths.tolist() == [9]


def test_whoever_fills_a_page_comes_before_its_readers():
    """One of them has a single token left, as a prompt that equals another's."""
    state = DeviceState(8, 64, 16, 4, 8, torch.device(DEVICE), pieces=lambda tokens: [slice(0, 20), slice(20, tokens)])
    engine = SimEngine(num_pages=20, page_size=16, max_bs=8, budget=100)
    other = [engine.add(list(range(10 * i, 10 * i + 9)), 1) for i in range(1, 3)]
    prompt = list(range(33))
    writer, reader = (engine.add(prompt, 1, temperature=0.0, prompt_logprobs=scored) for scored in (1, None))
    scored = engine.add([*range(32), 45], 1, temperature=0.0, prompt_logprobs=1)  # as if alone: it reads no cached page
    plan = engine.scheduler.schedule()
    by_id = {each: request.slot for each, request in engine.scheduler.requests.items()}
    assert plan.num_decode == 0
    assert dict(zip(plan.slots.tolist(), plan.num_tokens.tolist(), strict=True))[by_id[reader]] == 1
    step = state.stage(plan)
    lying = [(slot, len(list(group))) for slot, group in itertools.groupby(step.prefill.slots.tolist())]
    assert lying == list(zip(plan.slots.tolist(), plan.num_tokens.tolist(), strict=True))
    slots = [slot for slot, _ in lying]
    assert slots.index(by_id[reader]) > slots.index(by_id[writer])
    assert set(slots) == {by_id[each] for each in (*other, writer, reader, scored)}
    assert step.prefill.sampled.tolist() == (np.cumsum(plan.num_tokens) - 1).tolist()
    assert step.sample_slots[step.order].tolist() == plan.slots[plan.sample].tolist()
    wanted = [slot for slot in slots if slot in (by_id[writer], by_id[scored])]
    spans = [step.prefill.slots[span.tokens.start : span.tokens.stop].tolist() for span in step.scored]
    assert [set(span) for span in spans] == [{slot} for slot in wanted]
