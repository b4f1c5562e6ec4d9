"""Several ranks on gloo: whatever the layout, streams are those of one process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from radix_backend.config import EngineConfig
from radix_backend.process import Reporter
from radix_backend.worker import create_worker
from radix_backend.worker.interface import Worker
from tests.engine.sim import SimEngine
from tests.models.ties import assert_equal_or_tied
from tests.models.tiny import VOCAB, load_reference, save_tiny

LAYOUTS = [(2, 1), (1, 2), (2, 2), (1, 3)]
KINDS: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "qwen3": {"vocab_size": 321}}
GREEDY: dict[str, Any] = {"temperature": 0.0}
PLAIN: dict[str, Any] = {"temperature": 0.8, "seed": 7}
FILTERED: dict[str, Any] = {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 4242}
RULED: dict[str, Any] = {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.3, "logit_bias": {3: 2.0}}
SCORED: dict[str, Any] = {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1}
TIE = 0.5  # what rounding in bf16 may shift the difference of two logits of these models by
WAYS = [GREEDY, PLAIN, FILTERED, RULED, SCORED]


@contextlib.contextmanager
def worker(model: Path, tp_size: int, pp_size: int, **settings: Any) -> Iterator[Worker]:
    settings = {"dtype": "float32", "max_bs": 8, "context_len": 256, "kv_cache_memory": 2**22, **settings}
    config = EngineConfig(device="cpu", tp_size=tp_size, pp_size=pp_size, max_batched_tokens=64, **settings)
    made = create_worker(config, model, Reporter())
    try:
        yield made
    finally:
        made.close()


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def streams(made: Worker, pp_size: int, depth: int) -> dict[str, Any]:
    """What a worker generates in situations that must not matter, by situation."""
    found: dict[str, Any] = {}
    engine = SimEngine(64, 16, 8, 64, worker=made, pp_size=pp_size)
    shared = prompt(40, 1)
    prompts = [shared + prompt(1 + 9 * i % 31, i) if i % 2 else prompt(3 + 17 * i % 90, i) for i in range(10)]

    def run(requests: list[int]) -> list[list[int]]:
        engine.run(depth)
        return [engine.outputs[request] for request in requests]

    def add(length: int) -> list[int]:
        return [engine.add(tokens, length, **WAYS[i % len(WAYS)]) for i, tokens in enumerate(prompts)]

    found["cold"] = run(add(8))
    found["hot"] = run(add(8))
    found["prompts' ranks"] = engine.scored
    found["likeliest"] = {id: [(own.rank, own.token_ids) for own in tokens] for id, tokens in engine.logprobs.items()}
    victims = [engine.add(prompt(30, 70 + i), 40, **PLAIN) for i in range(3)]
    survivors = add(5)
    for victim in victims:
        for _ in range(4):
            engine.launch()
            if engine.scheduler.has_steps_in_flight:
                engine.settle()
        engine.scheduler.finish(victim, 3)
        engine.take()
    found["beside aborts"] = run(survivors)
    engine = SimEngine(12, 16, 4, 64, worker=made, pp_size=pp_size)
    engine.scheduler._step = engine.cache.settled_step = 10_000
    crowded = [engine.add(prompt(20 + i, 300 + i), 60, **WAYS[i]) for i in range(4)]
    engine.run(depth)
    assert engine.scheduler.counters.retractions > 0
    found["retracted"] = [engine.outputs[request] for request in crowded]
    return found


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(
        tmp_path_factory.mktemp("tiny"), request.param, seed=11, num_hidden_layers=4, **KINDS[request.param]
    )


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, Any]:
    with worker(model, 1, 1) as made:
        return streams(made, 1, 2)


@pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
def test_streams_are_those_of_one_process(model: Path, expected: dict[str, Any], tp_size: int, pp_size: int) -> None:
    with worker(model, tp_size, pp_size) as made:
        assert streams(made, pp_size, pp_size + 1) == expected


def test_ranks_may_have_the_same_kv_head(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "mistral", seed=11)  # with one
    with worker(directory, 1, 1) as alone:
        expected = streams(alone, 1, 2)
    with worker(directory, 2, 1) as made:
        assert streams(made, 1, 2) == expected


def test_in_bf16_a_first_difference_between_layouts_is_a_tie(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, rounded=torch.bfloat16, num_hidden_layers=4)
    prompts = [prompt(5 + 11 * i, i) for i in range(6)]
    found = []
    for tp_size, pp_size in ((1, 1), (2, 2)):
        with worker(directory, tp_size, pp_size, dtype="bfloat16") as made:
            engine = SimEngine(64, 16, 8, 64, worker=made, pp_size=pp_size)
            requests = [engine.add(tokens, 10, **GREEDY) for tokens in prompts]
            engine.run(pp_size + 1)
            found.append([engine.outputs[request] for request in requests])
    reference = load_reference(directory)
    for tokens, one, ranks in zip(prompts, *found, strict=True):
        assert_equal_or_tied(reference, tokens, one, ranks, TIE)
