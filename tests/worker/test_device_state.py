"""What is special about rows, in Triton's interpreter or on a GPU."""

import numpy as np
import torch

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.sampling_params import SamplingParams
from radix_backend.worker.device_state import DeviceState
from radix_backend.worker.interface import NewRequest, StepPlan

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
        staged = state.stage(StepPlan(step, [] if step else new, slots=slots, num_tokens=tokens, sample=every))
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
