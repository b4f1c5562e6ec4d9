"""Several ranks of the CUDA worker: on GPUs with graphs, elsewhere in Triton's interpreter over gloo."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.config import EngineConfig
from radix_backend.process import Reporter
from radix_backend.worker.executor import LocalExecutor
from radix_backend.worker.interface import Worker
from radix_backend.worker.parallel import ParallelWorker
from tests.engine.sim import SimEngine
from tests.models.tiny import save_tiny
from tests.worker.cuda_rank import make_runner
from tests.worker.cuda_worker import MODES, prompt, worker
from tests.worker.test_parallel import WAYS, streams

LAYOUTS = [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]
GPUS = torch.cuda.device_count()

pytestmark = on_gpu


@contextlib.contextmanager
def ranks(directory: Path, tp_size: int, pp_size: int, mode: str, **settings: Any) -> Iterator[Worker]:
    settings = {"dtype": "float32", "max_bs": 8, "context_len": 256, "kv_cache_memory": 2**22, **settings}
    config = EngineConfig(
        tp_size=tp_size, pp_size=pp_size, enforce_eager=mode == "eager", max_batched_tokens=64, **settings
    ).on_device("cuda")
    made = ParallelWorker(config, directory, Reporter(), make_runner, LocalExecutor(("-m", "tests.worker.cuda_rank")))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Heads and KV heads for four ranks.
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3-biased", seed=11, **heads)


@pytest.mark.skipif(DEVICE != "cuda", reason="takes minutes in the interpreter")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
def test_streams_are_those_of_one_gpu(model: Path, tp_size: int, pp_size: int, mode: str) -> None:
    if tp_size * pp_size > GPUS:
        pytest.skip(f"needs {tp_size * pp_size} GPUs")
    with worker(model, mode, context_len=256) as alone:
        expected = streams(alone, 1, 2)
    with ranks(model, tp_size, pp_size, mode) as made:
        assert streams(made, pp_size, pp_size + 1) == expected


@pytest.mark.skipif(DEVICE == "cuda", reason="GPUs have the test above")
def test_streams_in_the_interpreter_are_those_of_one_process(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, "qwen3-biased", seed=11)

    def generate(made: Worker, pp_size: int) -> list[list[int]]:
        engine = SimEngine(40, 16, 4, 48, worker=made, pp_size=pp_size)
        requests = [engine.add(prompt(3 + 13 * i, i), 2, **way) for i, way in enumerate(WAYS)]
        engine.run(pp_size + 1)
        return [engine.outputs[request] for request in requests]

    with worker(directory) as alone:
        expected = generate(alone, 1)
    with ranks(directory, 2, 2, "eager") as made:
        assert generate(made, 2) == expected


@pytest.mark.skipif(GPUS < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize("all_reduce", ["nccl", "one-shot"])
def test_both_kinds_of_all_reduce_give_one_stream(model: Path, all_reduce: str) -> None:
    def generate(made: Worker) -> list[list[int]]:
        engine = SimEngine(64, 16, 8, 64, worker=made)
        requests = [engine.add(prompt(3 + 13 * i, i), 20, **way) for i, way in enumerate(WAYS)]
        engine.run()
        return [engine.outputs[request] for request in requests]

    with worker(model, "graphs", context_len=256) as alone:
        expected = generate(alone)
    with ranks(model, 2, 1, "graphs", all_reduce=all_reduce) as made:
        assert generate(made) == expected
