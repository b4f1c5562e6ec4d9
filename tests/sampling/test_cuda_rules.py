"""What requests change in the logits on a GPU, against the formulas written out token by token."""

import numpy as np
import pytest
import torch

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.sampling.cuda_rules import CudaRules, pack_rules
from radix_backend.sampling.logits_rules import LogitsRules
from radix_backend.sampling_params import SamplingParams
from tests.sampling.plain_rules import apply_plainly
from tests.sampling.test_logits_rules import BAD_WORDS, CASES

pytestmark = on_gpu

VOCAB = 3000  # more than a block


def on_device(values, dtype=np.int32):
    return torch.tensor(np.asarray(values, dtype), device=DEVICE)


class Rows:
    """Rows of requests in slots, the last of them first."""

    def __init__(self, seed, numbers):
        """``numbers``: of prompt tokens and outputs of each row."""
        self.generator = np.random.default_rng(seed)
        self.prompts, self.outputs = (
            [self.generator.integers(0, 12, row[part]).tolist() for row in numbers] for part in (0, 1)
        )
        self.slots = list(reversed(range(len(numbers))))
        self.logits = self.generator.normal(0, 3, (len(numbers), VOCAB)).astype(np.float32)
        # The token after a row's last is there already: the plain sampler has drawn it.
        token_ids = np.full((len(numbers), 1 + max(map(sum, numbers))), 1)
        for slot, prompt, outputs in zip(self.slots, self.prompts, self.outputs, strict=True):
            token_ids[slot, : len(prompt) + len(outputs)] = prompt + outputs
        lengths = [sum(numbers[row]) for row in reversed(range(len(numbers)))]
        self.token_ids, self.lengths = on_device(token_ids), on_device(lengths)

    def changed(self, rules, kernel):
        """The logits after ``rules`` [rows], None for those without."""
        packed = [
            None if rule is None else on_device(pack_rules(rule, len(prompt)))
            for rule, prompt in zip(rules, self.prompts, strict=True)
        ]
        addresses = on_device([0 if words is None else words.data_ptr() for words in packed], np.int64)
        logits = on_device(self.logits, np.float32)
        kernel(logits, on_device(self.slots), addresses, self.lengths, self.token_ids)
        return logits.cpu().numpy()


@pytest.mark.parametrize("bad_words", BAD_WORDS, ids=["no bad words", "bad words"])
@pytest.mark.parametrize("case", CASES)
def test_logits_change_as_defined(case, bad_words):
    params, stops = SamplingParams(**CASES[case]), (5, 6)
    rows = Rows(3, [(9, 0), (9, 1), (2, 30), (1, 5), (9, 2)])
    kernel = CudaRules(5, VOCAB, torch.device(DEVICE))
    rules = [LogitsRules(params, stops, bad_words)] * 5
    rules[2] = None
    for _ in range(2):  # the second time finds its table as the first one did
        changed = rows.changed(rules, kernel)
        for row, rule in enumerate(rules):
            expected = rows.logits[row]
            if rule is not None:
                expected = apply_plainly(expected, params, stops, bad_words, rows.prompts[row], rows.outputs[row])
            np.testing.assert_allclose(changed[row], np.array(expected, np.float32), rtol=1e-5, atol=1e-5)


def test_logits_equal_those_of_the_cpu_to_the_last_bit():
    """With lists and histories of more than a block."""
    generator = np.random.default_rng(1)
    biased = generator.permutation(VOCAB)[:2100]
    params = SamplingParams(
        repetition_penalty=1.3,
        presence_penalty=0.7,
        frequency_penalty=0.11,
        min_tokens=5000,
        max_tokens=5000,
        logit_bias={int(token): float(generator.normal()) for token in biased},
    )
    stops = tuple(range(1100))
    bad_words = [tuple(generator.integers(0, 12, 1 + i % 3).tolist()) for i in range(1500)]
    rows = Rows(2, [(1500, 1200), (700, 2500), (2, 1100)])
    rules = LogitsRules(params, stops, bad_words)
    changed = rows.changed([rules] * 3, CudaRules(3, VOCAB, torch.device(DEVICE)))
    for row, (prompt, outputs) in enumerate(zip(rows.prompts, rows.outputs, strict=True)):
        expected = torch.tensor(rows.logits[row])
        rules.apply(expected, torch.tensor(prompt + outputs, dtype=torch.int32), len(prompt))
        assert (changed[row] == expected.numpy()).all()


def test_a_bad_word_is_excluded_only_behind_its_beginning():
    rules, kernel = LogitsRules(SamplingParams(), (), [(3, 4)]), CudaRules(1, VOCAB, torch.device(DEVICE))
    for outputs, excluded in (([], False), ([3], True), ([3, 4, 3], True), ([3, 5], False)):
        rows = Rows(0, [(1, len(outputs))])
        rows.token_ids[0, : 1 + len(outputs)] = on_device([3, *outputs])  # the prompt's own 3 does not count
        rows.prompts = [[3]]
        assert np.isneginf(rows.changed([rules], kernel)[0]).nonzero()[0].tolist() == ([4] if excluded else [])
