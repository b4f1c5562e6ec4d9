"""``python -m tests.worker.cuda_rank``: a rank of a CUDA worker, where there is no GPU in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

from tests.cuda import DEVICE  # isort: skip
from radix_backend.config import EngineConfig
from radix_backend.process import Reporter
from radix_backend.worker.cuda_runner import CudaRunner
from radix_backend.worker.interface import Worker
from radix_backend.worker.rank import run
from radix_backend.worker.ranks import Ranks


def make_runner(config: EngineConfig, model_dir: Path, reporter: Reporter, ranks: Ranks) -> Worker:
    return CudaRunner(config, model_dir, reporter, ranks, DEVICE)


if __name__ == "__main__":
    run(make_runner)
