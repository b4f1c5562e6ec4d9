"""Scheduler and real CPU worker together: whatever the engine does with a request, its f32 token stream is the same."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from radix_backend.config import EngineConfig
from radix_backend.process import Reporter
from radix_backend.worker import create_worker
from tests.engine.sim import SimEngine
from tests.models.tiny import VOCAB, greedy, load_reference, save_tiny

GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 4242}
PLAIN_SEEDED: dict[str, Any] = {"temperature": 0.8, "seed": 7}
WAYS = pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PLAIN_SEEDED], ids=["greedy", "filtered", "plain"])


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen2", "mistral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), request.param, seed=11)


@contextlib.contextmanager
def engine(
    model: Path, num_pages: int = 64, page_size: int = 16, max_bs: int = 8, budget: int = 64
) -> Iterator[SimEngine]:
    config = EngineConfig(
        device="cpu", dtype="float32", max_bs=max_bs, context_len=256, page_size=page_size, kv_cache_memory=2**24
    )
    worker = create_worker(config, model, Reporter())
    try:
        yield SimEngine(num_pages, page_size, max_bs, budget, worker=worker)
    finally:
        worker.close()


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def alone(model: Path, tokens: list[int], count: int, sampling: dict[str, Any]) -> list[int]:
    """The stream of a request that has a fresh engine for itself."""
    with engine(model) as one:
        request = one.add(tokens, count, **sampling)
        one.run(depth=1)
        return one.outputs[request]


def test_greedy_is_what_transformers_says(model: Path) -> None:
    assert alone(model, prompt(50, 1), 24, GREEDY) == greedy(load_reference(model), prompt(50, 1), 24)


@WAYS
def test_cold_hot_and_chunked_prefills_give_one_stream(model: Path, sampling: dict[str, Any]) -> None:
    tokens = prompt(70, 2)
    expected = alone(model, tokens, 20, sampling)
    for page_size, budget in ((16, 64), (16, 17), (1, 64), (7, 9)):
        with engine(model, num_pages=1024 // page_size, page_size=page_size, budget=budget) as e:
            streams = []
            for _ in range(2):
                request = e.add(tokens, 20, **sampling)
                e.run()
                streams.append(e.outputs[request])
            assert streams == [expected, expected]
            assert e.receipts[request].cached_tokens == 69 // page_size * page_size


@WAYS
def test_a_batch_of_32_changes_no_stream(model: Path, sampling: dict[str, Any]) -> None:
    tokens = prompt(40, 3)
    expected = alone(model, tokens, 20, sampling)
    with engine(model, num_pages=512, max_bs=32) as e:
        others = [e.add(prompt(5 + 3 * i, 100 + i), 10 + i, temperature=1.0, seed=i) for i in range(15)]
        request = e.add(tokens, 20, **sampling)
        others += [e.add(tokens[:i] + prompt(9, 200 + i), 10 + i, temperature=0.0) for i in range(16)]
        e.run()
        assert e.outputs[request] == expected
        assert all(e.finish[other] for other in others)


@WAYS
def test_retraction_and_return_change_no_stream(model: Path, sampling: dict[str, Any]) -> None:
    prompts = [prompt(20 + i, 300 + i) for i in range(4)]
    expected = [alone(model, tokens, 60, sampling) for tokens in prompts]
    with engine(model, num_pages=12, max_bs=4) as e:
        requests = [e.add(tokens, 60, **sampling) for tokens in prompts]
        e.run()
        assert e.scheduler.counters.retractions > 0
        assert [e.outputs[request] for request in requests] == expected


@WAYS
def test_a_resumed_request_goes_on_as_if_nothing_had_happened(model: Path, sampling: dict[str, Any]) -> None:
    tokens = prompt(33, 4)
    expected = alone(model, tokens, 20, sampling)
    with engine(model) as e:
        request = e.add(tokens, 20, output_ids=tuple(expected[:7]), **sampling)
        e.run()
        assert e.outputs[request] == expected[7:]


@pytest.mark.parametrize("budget", [64, 600, 2000])
def test_64_requests_compute_a_shared_prefix_once(model: Path, budget: int) -> None:
    shared = prompt(150, 5)
    prompts = [shared + prompt(1 + i % 7, 400 + i) for i in range(64)]
    with engine(model, num_pages=700, max_bs=64, budget=budget) as e:
        requests = [e.add(tokens, 3, **GREEDY) for tokens in prompts]
        e.run()
        cached = [e.receipts[request].cached_tokens for request in requests]
        assert sorted(cached) == [0] + [150 // 16 * 16] * 63
    assert e.outputs[requests[9]] == alone(model, prompts[9], 3, GREEDY)
