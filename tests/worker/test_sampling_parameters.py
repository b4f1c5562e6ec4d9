"""Parameters that need the whole model: what the worker samples and reports, against transformers and plain loops."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from radix_backend.config import EngineConfig
from radix_backend.models.decoder import Decoder
from radix_backend.process import Reporter
from radix_backend.protocol import array
from radix_backend.sampling_params import SamplingParams
from radix_backend.worker import create_worker
from radix_backend.worker.batch_state import BatchState
from radix_backend.worker.interface import NewRequest, StepPlan
from tests.models.tiny import VOCAB, load_reference, save_tiny
from tests.sampling.plain_rules import apply_plainly
from tests.worker.driver import Driver


@contextlib.contextmanager
def driver(directory, page_size=16, **settings):
    settings = {"dtype": "float32", "max_bs": 8, "context_len": 400, "kv_cache_memory": 2**22, **settings}
    worker = create_worker(EngineConfig(page_size=page_size, **settings), directory, Reporter())
    try:
        yield Driver(worker, page_size)
    finally:
        worker.close()


def prompt(length, seed=0):
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = save_tiny(tmp_path_factory.mktemp("tiny"), "llama")
    return directory, load_reference(directory)


def reference_logits(reference, tokens):
    with torch.inference_mode():
        return reference(torch.tensor([tokens])).logits[0]


def ruled_greedy(reference, tokens, count, params, stops=(), bad_words=()):
    """Greedy generation with the rules applied in a plain loop, over transformers' logits."""
    outputs = []
    for _ in range(count):
        logits = reference_logits(reference, tokens + outputs)[-1].numpy()
        changed = apply_plainly(logits, params, stops, bad_words, tokens, outputs)
        outputs.append(int(np.argmax(np.array(changed, np.float32))))
    return outputs


# A random model hardly repeats itself: the bias makes it.
BIAS = {token: 25.0 for token in range(40, 48)}
RULES = [
    {"logit_bias": BIAS},
    {"logit_bias": BIAS, "repetition_penalty": 1.4},
    {"logit_bias": BIAS, "presence_penalty": 1.5, "frequency_penalty": 0.7},
    {"logit_bias": BIAS, "frequency_penalty": -2.0},
]


def test_ruled_requests_generate_as_a_plain_loop_does_alone_and_in_a_batch(model):
    directory, reference = model
    expected = [ruled_greedy(reference, prompt(25), 16, SamplingParams(**rules)) for rules in RULES]
    plain = ruled_greedy(reference, prompt(25), 16, SamplingParams())
    assert len({tuple(outputs) for outputs in [*expected, plain]}) == len(RULES) + 1
    with driver(directory) as d:
        rows = [d.new(slot, prompt(25), **rules) for slot, rules in enumerate([*RULES, {}])]
        d.step(*[(row, 25) for row in rows])
        d.decode(*rows, count=15)
    assert [row.outputs for row in rows] == [*expected, plain]


def test_outputs_of_a_request_that_comes_back_still_count_as_outputs(model):
    directory, reference = model
    rules = {"logit_bias": BIAS, "presence_penalty": 1.5, "frequency_penalty": 0.7}
    expected = ruled_greedy(reference, prompt(25), 16, SamplingParams(**rules))
    with driver(directory) as d:
        row = d.new(2, prompt(25) + expected[:9], prompt_len=25, **rules)
        d.step((row, 34))
        d.decode(row, count=6)
    assert row.outputs == expected[9:]


def test_bad_words_are_not_completed(model):
    directory, reference = model
    plain = ruled_greedy(reference, prompt(25), 12, SamplingParams())
    bad_words = ((plain[0],), tuple(plain[3:5]), tuple(plain[6:9]))
    expected = ruled_greedy(reference, prompt(25), 12, SamplingParams(), (), bad_words)
    assert expected != plain
    with driver(directory) as d:
        row = d.new(0, prompt(25), bad_words=bad_words)
        d.step((row, 25))
        d.decode(row, count=11)
    assert row.outputs == expected


def test_what_rules_shift_is_not_rounded_to_bf16():
    state = BatchState(max_bs=2, context_len=20, page_size=16)
    one = np.ones(2, np.int32)
    new = [
        NewRequest(slot, np.array([1], np.int32), 1, 0, SamplingParams(**rules), bad_words=((3,),))
        for slot, rules in enumerate(({"logit_bias": {6: 2**-10}}, {}))
    ]
    slots = np.arange(2, dtype=np.int32)
    step = state.apply(StepPlan(1, new, slots=slots, num_tokens=one, sample=one.astype(bool), num_decode=2))
    shifted = state.apply_rules(step, np.arange(2), torch.full((2, VOCAB), 64.0, dtype=torch.bfloat16))
    assert shifted.dtype == torch.float32
    assert shifted.argmax(dim=1).tolist() == [6, 0]
    assert torch.isneginf(shifted).nonzero().tolist() == [[0, 3], [1, 3]]


def entries(scores):
    """(token id, log probability) pairs of a token: itself, then the likeliest."""
    return list(zip(array(scores.token_ids, "<i4").tolist(), array(scores.logprobs, "<f4").tolist(), strict=True))


def check_scores(scores, token, logits, count):
    logprobs = torch.log_softmax(logits, dim=-1)
    (own, value), *likeliest = entries(scores)
    assert own == token
    assert value == pytest.approx(float(logprobs[token]), abs=1e-4)
    assert scores.rank == 1 + int((logits > logits[token] + 1e-5).sum())
    expected = logprobs.topk(count)
    assert [token for token, _ in likeliest] == expected.indices.tolist()
    np.testing.assert_allclose([value for _, value in likeliest], expected.values.numpy(), atol=1e-4)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3}, {"repetition_penalty": 2.0, "top_k": 3}])
def test_logprobs_are_the_models_own_whatever_the_sampler_does(model, sampling):
    directory, reference = model
    with driver(directory) as d:
        row = d.new(0, prompt(25), logprobs=4, **sampling)
        silent = d.new(1, prompt(20, seed=1))
        none = d.new(2, prompt(20, seed=2), logprobs=0)
        d.step((row, 25), (silent, 20), (none, 20))
        d.decode(row, silent, none, count=9)
    logits = reference_logits(reference, prompt(25) + row.outputs)
    assert len(row.logprobs) == len(row.outputs) == 10
    for n, (scores, token) in enumerate(zip(row.logprobs, row.outputs, strict=True)):
        check_scores(scores, token, logits[24 + n], 4)
    assert silent.logprobs == []
    assert [len(entries(scores)) for scores in none.logprobs] == [1] * 10


def test_the_logits_of_a_long_prompt_are_never_in_memory_at_once(model, monkeypatch):
    directory, _ = model
    rows = []

    def whole_logits(self, hidden, which, whole_logits=Decoder.whole_logits):
        rows.append(len(which))
        return whole_logits(self, hidden, which)

    monkeypatch.setattr(Decoder, "whole_logits", whole_logits)
    with driver(directory) as d:
        d.step((d.new(0, prompt(390), prompt_logprobs=1), 390))
        assert sum(map(len, d.prompt_logprobs)) == 389
    assert sum(rows) >= 389
    assert max(rows) <= 64


@pytest.mark.parametrize("chunks", [[150], [1, 149], [70, 1, 79], [16, 17, 117], [1] * 150])
def test_prompt_logprobs_in_any_chunks(model, chunks):
    directory, reference = model
    tokens = prompt(150)
    with driver(directory) as d:
        row = d.new(0, tokens, prompt_logprobs=2)
        other = d.new(3, prompt(9, seed=5))
        d.step((other, 9))
        for chunk in chunks:
            d.step((other, 1), (row, chunk))
        d.decode(row, other, count=3)
        scores = [score for span in d.prompt_logprobs for score in span]
    logits = reference_logits(reference, tokens)
    assert len(scores) == 149
    for position, score in enumerate(scores, 1):
        check_scores(score, tokens[position], logits[position - 1], 2)


def test_prompt_tokens_scored_before_a_retraction_are_not_scored_again(model):
    directory, reference = model
    tokens = prompt(60)
    with driver(directory) as d:
        first = d.new(0, tokens, prompt_logprobs=0)
        d.step((first, 35))
        back = d.new(1, tokens, pages=first.pages[:2], prompt_logprobs=0, num_scored=36)
        d.step((back, 28))
        counts = [len(span) for span in d.prompt_logprobs]
        scores = [score for span in d.prompt_logprobs for score in span]
    assert counts == [35, 24]
    for position, score in enumerate(scores, 1):
        check_scores(score, tokens[position], reference_logits(reference, tokens)[position - 1], 0)
