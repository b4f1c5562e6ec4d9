"""Streams of the CUDA worker do not depend on how they were computed: exactly in f32, but for ties in bf16 and fp16.

On a GPU with many requests at once; in Triton's interpreter with a few, and in f32 alone.
"""

import random

import numpy as np
import pytest
import torch

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.protocol import ABORT
from radix_backend.worker import device_state
from tests.engine.sim import SimEngine
from tests.models.ties import assert_equal_or_tied
from tests.models.tiny import greedy, load_reference, save_tiny
from tests.worker.cuda_worker import driver, prompt, worker

pytestmark = on_gpu

GPU = DEVICE == "cuda"
COUNT = 64 if GPU else 4  # requests
OUTPUTS = 16 if GPU else 3
PAGE = 16
# What rounding may shift a logit of these models by. They lie between -10 and 10; bf16 keeps 8 bits, fp16 11. Seen on a
# CPU in bf16: 0.15.
TOLERANCES = {"bfloat16": 0.25, "float16": 0.03}

gpu_alone = pytest.mark.skipif(not GPU, reason="takes a GPU")


def requests():
    """(prompt, sampling): two groups with common prefixes and some of their own; greedy and seeded."""
    stems = [prompt(72, seed=90), prompt(66, seed=91), []] if GPU else [prompt(17, seed=90), []]
    found = []
    for i in range(COUNT):
        sampling = {"temperature": 0.0} if i % 2 else {"temperature": 0.9, "seed": 1000 + i}
        found.append((stems[i % len(stems)] + prompt(2 + 7 * i % (31 if GPU else 9), seed=i), sampling))
    return found


FILTERS = [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05, "repetition_penalty": 1.2}]


def streams(directory, filters=FILTERS[:1], mode="graphs", depth=2, hot=False, alone=False, **settings):
    """The outputs of `requests`, all at once or each ``alone`` and from nothing; ``hot``: for the second time."""
    settings = {"max_bs": COUNT, "kv_cache_memory": 2**24, **settings}
    with worker(directory, mode if GPU else "eager", PAGE, **settings) as runner:
        engine = SimEngine(runner.num_pages, PAGE, max_bs=COUNT, budget=256, worker=runner)
        for _ in range(2 if hot else 1):
            ids = []
            for i, (tokens, sampling) in enumerate(requests()):
                wanted = {**sampling, **filters[i % len(filters)]}
                ids.append(engine.add(tokens, OUTPUTS, namespace=str(i) if alone else "", **wanted))
                if alone:
                    engine.run(depth)
            engine.run(depth)
        if hot:
            assert all(
                engine.receipts[i].cached_tokens == (len(tokens) - 1) // PAGE * PAGE
                for i, (tokens, _) in zip(ids, requests(), strict=True)
            )
    return [engine.outputs[i] for i in ids]


WAYS = {
    "without graphs": {"mode": "eager"},
    "without async scheduling": {"depth": 1},
    "from a hot cache": {"hot": True},
    "alone": {"alone": True},
}
if not GPU:
    del WAYS["without graphs"]


@pytest.fixture(scope="module")
def f32_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("f32"), "qwen3-biased")


@pytest.fixture(scope="module", params=["torch_native", "triton"])
def in_f32(request, f32_model):
    """An attention backend, and the streams that it gives the usual way."""
    settings = {"attention_backend": request.param, "filters": FILTERS}
    return settings, streams(f32_model, **settings)


def test_greedy_streams_in_f32_equal_transformers(f32_model, in_f32):
    reference = load_reference(f32_model)
    for (tokens, sampling), outputs, i in zip(requests(), in_f32[1], range(COUNT), strict=True):
        if not sampling["temperature"] and not FILTERS[i % len(FILTERS)].get("repetition_penalty"):
            assert outputs == greedy(reference, tokens, OUTPUTS)


@pytest.mark.parametrize("way", WAYS)
def test_streams_in_f32_are_the_same_however_they_are_computed(f32_model, in_f32, way):
    settings, usual = in_f32
    assert streams(f32_model, **settings, **WAYS[way]) == usual


@gpu_alone
def test_streams_in_f32_are_the_same_with_and_without_shared_tiles(f32_model, in_f32, monkeypatch):
    settings, usual = in_f32
    monkeypatch.setattr(device_state, "shared_prefixes", lambda *arguments: None)
    assert streams(f32_model, **settings) == usual


@pytest.fixture(scope="module")
def large_heads(tmp_path_factory):
    """A model for which a GPU's default attention backends are those of real models."""
    directory = save_tiny(
        tmp_path_factory.mktemp("bf16"), "qwen3", rounded=torch.bfloat16, head_dim=128, num_attention_heads=4
    )
    return directory, load_reference(directory)


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def in_half(request, large_heads):
    """A dtype, and the streams that it gives the usual way."""
    return request.param, streams(large_heads[0], dtype=request.param)


def assert_tied(reference, dtype, some, others):
    for (tokens, sampling), first, second in zip(requests(), some, others, strict=True):
        assert len(first) == OUTPUTS
        assert_equal_or_tied(reference, tokens, first, second, 2 * TOLERANCES[dtype], **sampling)


@gpu_alone
def test_greedy_streams_in_half_precision_part_from_transformers_at_ties(large_heads, in_half):
    reference, (dtype, usual) = large_heads[1], in_half
    for (tokens, sampling), outputs in zip(requests(), usual, strict=True):
        if not sampling["temperature"]:
            expected = greedy(reference, tokens, OUTPUTS)
            assert_equal_or_tied(reference, tokens, expected, outputs, 2 * TOLERANCES[dtype])


@gpu_alone
@pytest.mark.parametrize("way", WAYS)
def test_streams_in_half_precision_part_at_ties_however_they_are_computed(large_heads, in_half, way):
    (directory, reference), (dtype, usual) = large_heads, in_half
    assert_tied(reference, dtype, usual, streams(directory, dtype=dtype, **WAYS[way]))


@gpu_alone
def test_streams_in_half_precision_part_at_ties_without_shared_tiles(large_heads, in_half, monkeypatch):
    (directory, reference), (dtype, usual) = large_heads, in_half
    monkeypatch.setattr(device_state, "shared_prefixes", lambda *arguments: None)
    assert_tied(reference, dtype, usual, streams(directory, dtype=dtype))


@gpu_alone
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_logits_in_half_precision_are_near_those_in_f32(large_heads, dtype):
    directory, reference = large_heads
    tokens = prompt(90)
    with driver(directory, "graphs", dtype=dtype) as d:
        row = d.new(0, tokens, logprobs=20, prompt_logprobs=20)
        d.step((row, len(tokens)))
        d.decode(row, count=OUTPUTS)
    with torch.inference_mode():
        expected = torch.log_softmax(reference(torch.tensor([tokens + row.outputs])).logits[0, :-1], dim=-1).numpy()
    scores = d.prompt_logprobs[0] + row.logprobs
    assert len(scores) == len(expected)
    for ours, theirs in zip(scores, expected, strict=True):
        ids, values = np.frombuffer(ours.token_ids, np.int32), np.frombuffer(ours.logprobs, np.float32)
        assert len(ids) == 21
        np.testing.assert_allclose(values, theirs[ids], rtol=0, atol=TOLERANCES[dtype])


class Operator:
    """Does to an engine whatever may happen to it, at random."""

    def __init__(self, engine, seed, candidates, longest):
        self.engine, self.candidates, self.longest = engine, candidates, longest
        self.random = random.Random(seed)
        self.which = {}  # id → index of its prompt
        self.aborted = set()
        self.in_flight = 0

    def operate(self):
        operation = self.random.choices(["add", "abort", "launch", "settle"], [12, 2, 43, 43])[0]
        getattr(self, operation)()

    def add(self):
        if len(self.engine.scheduler.requests) < 24:
            number = self.random.randrange(len(self.candidates))
            tokens, sampling = self.candidates[number]
            length, priority = self.random.randint(1, self.longest), self.random.randint(-1, 1)
            self.which[self.engine.add(tokens, length, priority=priority, **sampling)] = number

    def abort(self):
        if self.engine.scheduler.requests:
            request = self.random.choice(sorted(self.engine.scheduler.requests))
            self.engine.scheduler.finish(request, ABORT)
            self.engine.take()
            self.aborted.add(request)

    def launch(self):
        if self.in_flight < 2:
            self.in_flight += self.engine.launch() is not None

    def settle(self):
        if self.in_flight:
            self.engine.settle()
            self.in_flight -= 1


def test_pages_and_streams_stay_right_through_random_operations(f32_model):
    rounds, operations, longest, fewest = (10, 1000, 60, 45) if GPU else (1, 100, 8, 12)
    candidates = [(tokens, sampling | FILTERS[i % len(FILTERS)]) for i, (tokens, sampling) in enumerate(requests())]
    retractions = 0
    with worker(f32_model, "graphs" if GPU else "eager", 4, max_bs=8, context_len=180) as runner:
        calm = SimEngine(runner.num_pages, 4, max_bs=8, budget=64, worker=runner)
        ids = [calm.add(tokens, longest, **sampling) for tokens, sampling in candidates]
        calm.run()
        expected = [calm.outputs[i] for i in ids]
        for seed in range(rounds):
            engine = SimEngine(fewest + seed, 4, max_bs=8, budget=48, worker=runner)  # too few pages for eight
            operator = Operator(engine, seed, candidates, longest)
            for _ in range(operations):
                operator.operate()
                assert engine.cache.audit() == []
            while operator.in_flight:
                operator.settle()
            engine.run()
            for request, number in operator.which.items():
                outputs = engine.outputs[request]
                assert outputs == expected[number][: len(outputs)]
                assert outputs or request in operator.aborted
            assert operator.aborted
            retractions += engine.scheduler.counters.retractions
            cache = engine.cache
            assert not cache.leases
            assert cache.pool.num_retiring == 0
            cache.pool.reclaim(cache.tree.evict(cache.pool.num_pages))
            assert cache.pool.num_free == cache.pool.num_pages
    assert retractions >= rounds or not GPU
