"""``python -m tests.engine.stopped_rank MODEL``: of a worker's two ranks one is stopped; its process id is printed."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from radix_backend.config import EngineConfig
from radix_backend.process import Reporter, setup_logging
from radix_backend.worker import create_worker, parallel
from tests.engine.sim import SimEngine

if __name__ == "__main__":
    parallel.STEP_SECONDS = 0.5
    setup_logging("info")
    config = EngineConfig(device="cpu", tp_size=2, max_bs=2, context_len=64, kv_cache_memory=2**20)
    worker = create_worker(config, Path(sys.argv[1]), Reporter())
    (other,) = psutil.Process().children()
    print(other.pid, flush=True)
    other.suspend()
    engine = SimEngine(worker=worker)
    engine.add([1, 2, 3])
    engine.run()
