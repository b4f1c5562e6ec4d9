"""Several ranks of the CUDA worker: on GPUs with graphs, elsewhere in Triton's interpreter over gloo."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.config import EngineConfig
from radix_backend.layers.cuda_sequence_parallel import LEAST_ROWS
from tests.models.tiny import save_tiny
from tests.worker.cuda_ranks import LONG, few, long, many, on_ranks, some
from tests.worker.cuda_worker import MODES, worker

LAYOUTS = [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]
GPUS = torch.cuda.device_count()
RANKS, LIKELIEST = "prompts' ranks", "likeliest"  # see tests.worker.test_parallel.streams

pytestmark = on_gpu


def settings(tp_size: int, pp_size: int, mode: str, **others: Any) -> EngineConfig:
    sizes = {"max_bs": 8, "context_len": 256, "kv_cache_memory": 2**22, "max_batched_tokens": 64, **others}
    layout = {"tp_size": tp_size, "pp_size": pp_size}
    return EngineConfig(dtype="float32", enforce_eager=mode == "eager", **layout, **sizes).on_device("cuda")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Heads and KV heads for four ranks.
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
    sizes = {"max_position_embeddings": LONG["context_len"], **heads}
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3-biased", seed=11, **sizes)


@pytest.mark.skipif(DEVICE != "cuda", reason="takes minutes in the interpreter")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
def test_streams_are_those_of_one_gpu(model: Path, tp_size: int, pp_size: int, mode: str) -> None:
    if tp_size * pp_size > GPUS:
        pytest.skip(f"needs {tp_size * pp_size} GPUs")
    with worker(model, mode, context_len=256) as alone:
        expected = many(alone, 1)
    found = on_ranks(many, settings(tp_size, pp_size, mode), model)
    # Sums are made in another order there, so tokens that are as likely as each other may change places.
    for name in (RANKS, LIKELIEST):
        pairs = zip(found.pop(name).values(), expected.pop(name).values(), strict=True)
        assert all(sum(map(operator.ne, theirs, own)) <= 1 for theirs, own in pairs)
    assert found == expected


@pytest.mark.skipif(DEVICE == "cuda", reason="GPUs have the test above")
def test_streams_in_the_interpreter_are_those_of_one_process(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "qwen3-biased", seed=11)
    with worker(directory) as alone:
        expected = few(alone, 1)
    assert on_ranks(few, settings(2, 2, "eager"), directory) == expected


@pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize("all_reduce", ["nccl", "one-shot"])
def test_both_kinds_of_all_reduce_give_one_stream(model: Path, all_reduce: str) -> None:
    with worker(model, "graphs", context_len=256) as alone:
        expected = some(alone, 1)
    assert on_ranks(some, settings(2, 1, "graphs", all_reduce=all_reduce), model) == expected


@pytest.mark.skipif(DEVICE != "cuda", reason="takes minutes in the interpreter")
@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (2, 2), (4, 1)])
def test_ranks_share_the_rows_of_long_prompts(model: Path, tp_size: int, pp_size: int) -> None:
    assert LONG["max_batched_tokens"] >= LEAST_ROWS
    if tp_size * pp_size > GPUS:
        pytest.skip(f"needs {tp_size * pp_size} GPUs")
    with worker(model, "graphs", **LONG) as alone:
        expected = long(alone, 1)
    assert on_ranks(long, settings(tp_size, pp_size, "graphs", **LONG), model) == expected
