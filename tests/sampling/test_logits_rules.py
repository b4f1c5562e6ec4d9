"""What requests change in the logits, against the formulas written out token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from radix_backend.sampling.logits_rules import LogitsRules, logits_rules
from radix_backend.sampling_params import SamplingParams
from tests.sampling.plain_rules import apply_plainly

VOCAB = 40


CASES = {
    "repetition": {"repetition_penalty": 1.3},
    "repetition below one": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 0.8},
    "frequency": {"frequency_penalty": 0.4},
    "negative": {"presence_penalty": -1.5, "frequency_penalty": -0.25},
    "bias": {"logit_bias": {3: 2.5, 4: -1e9, 5: math.inf}},
    "min_tokens": {"min_tokens": 6, "max_tokens": 9},
    "all": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {1: -3.0, 7: 1.0, 11: 4.0},
        "min_tokens": 5,
    },
}
BAD_WORDS = [(), ((7,), (1, 2), (9, 9, 4), (2, 1))]


@pytest.mark.parametrize("bad_words", BAD_WORDS, ids=["no bad words", "bad words"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_outputs", [0, 1, 2, 5, 30])
def test_logits_change_as_defined(case, bad_words, num_outputs):
    generator = np.random.default_rng(num_outputs)
    params, stops = SamplingParams(**CASES[case]), (5, 6)
    rules = LogitsRules(params, stops, bad_words)
    for _ in range(20):
        prompt = generator.integers(0, 12, 9).tolist()
        outputs = generator.integers(0, 12, num_outputs).tolist()
        logits = torch.from_numpy(generator.normal(0, 3, VOCAB).astype(np.float32))
        expected = apply_plainly(logits, params, stops, bad_words, prompt, outputs)
        rules.apply(logits, torch.tensor(prompt + outputs, dtype=torch.int32), len(prompt))
        np.testing.assert_allclose(logits.numpy(), np.array(expected, np.float32), rtol=1e-5, atol=1e-5)


def test_a_bad_word_is_excluded_only_behind_its_beginning():
    rules = LogitsRules(SamplingParams(), (), [(3, 4)])
    for outputs, excluded in (([], False), ([3], True), ([3, 4, 3], True), ([3, 5], False)):
        logits = torch.zeros(VOCAB)
        rules.apply(logits, torch.tensor([3, *outputs], dtype=torch.int32), 1)  # the prompt's own 3 does not count
        assert torch.isneginf(logits).nonzero().tolist() == ([[4]] if excluded else [])


def test_a_request_without_rules_has_none():
    for params, stops, bad_words, shifts in (
        (SamplingParams(), (1,), (), None),
        (SamplingParams(min_tokens=1), (1,), (), False),
        (SamplingParams(min_tokens=1), (), (), None),
        (SamplingParams(), (), [(1,)], False),
        (SamplingParams(logit_bias={1: 1.0}), (), (), True),
        (SamplingParams(repetition_penalty=1.1), (), (), True),
    ):
        rules = logits_rules(params, stops, bad_words)
        assert (None if rules is None else rules.shifts) == shifts
