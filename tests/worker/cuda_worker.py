"""A CUDA worker for a test: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import contextlib

import torch

from tests.cuda import DEVICE  # isort: skip
from radix_backend.config import EngineConfig
from radix_backend.process import Reporter
from radix_backend.worker.cuda_runner import CudaRunner
from tests.models.tiny import VOCAB
from tests.worker.driver import Driver

MODES = ["graphs", "eager"] if DEVICE == "cuda" else ["eager"]


@contextlib.contextmanager
def worker(directory, mode="eager", page_size=16, **settings):
    settings = {"dtype": "float32", "max_bs": 8, "context_len": 200, "kv_cache_memory": 2**22, **settings}
    config = EngineConfig(page_size=page_size, enforce_eager=mode == "eager", **settings).on_device("cuda")
    runner = CudaRunner(config, directory, Reporter(), device=DEVICE)
    try:
        yield runner
    finally:
        runner.close()


@contextlib.contextmanager
def driver(directory, mode="eager", page_size=16, **settings):
    with worker(directory, mode, page_size, **settings) as runner:
        yield Driver(runner, page_size)


def prompt(length, seed=0):
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
