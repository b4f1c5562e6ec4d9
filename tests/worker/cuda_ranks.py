"""``python -m tests.worker.cuda_ranks CONFIG_JSON MODEL_DIR WORK FILE``: an engine on several ranks, for one test.

In a process of its own: a rank that is lost takes the engine's process with it, what hangs can be killed, and torch's
symmetric memory can be met once a process only. Pickles what it generates to FILE: NCCL too writes to stdout.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tests.worker.cuda_rank import make_runner  # isort: skip
from radix_backend.config import EngineConfig
from radix_backend.process import Reporter, setup_logging
from radix_backend.worker.executor import LocalExecutor
from radix_backend.worker.interface import Worker
from radix_backend.worker.parallel import ParallelWorker
from tests.engine.sim import SimEngine
from tests.worker.cuda_worker import prompt
from tests.worker.test_parallel import WAYS, streams

LONG = {"context_len": 2048, "kv_cache_memory": 2**27, "max_batched_tokens": 12288}  # the settings of `long`
LONG_PAGES = 1024
HANG_SECONDS = 300.0  # the interpreter takes minutes


def few(made: Worker, pp_size: int, length: int = 2) -> list[list[int]]:
    engine = SimEngine(64, 16, 8, 64, worker=made, pp_size=pp_size)
    requests = [engine.add(prompt(3 + 13 * i, i), length, **way) for i, way in enumerate(WAYS)]
    engine.run(pp_size + 1)
    return [engine.outputs[request] for request in requests]


def many(made: Worker, pp_size: int) -> dict[str, Any]:
    return streams(made, pp_size, pp_size + 1)


def some(made: Worker, pp_size: int) -> list[list[int]]:
    return few(made, pp_size, 20)


def long(made: Worker, pp_size: int) -> list[list[int]]:
    """Prompts that fill steps. The longest of the first is there twice: the second reads its pages, but for a token."""
    engine = SimEngine(LONG_PAGES, 16, 8, LONG["max_batched_tokens"], worker=made, pp_size=pp_size)
    lengths = [*(1100 + 40 * i for i in range(6)), 1409, 1409, *(1420 + 40 * i for i in range(5))]
    requests = [engine.add(prompt(length, length), 12, **WAYS[i % len(WAYS)]) for i, length in enumerate(lengths)]
    engine.run(pp_size + 1)
    return [engine.outputs[request] for request in requests]


WORK: dict[str, Callable[[Worker, int], Any]] = {each.__name__: each for each in (few, some, many, long)}


def on_ranks(work: Callable[[Worker, int], Any], config: EngineConfig, directory: Path) -> Any:
    """What ``work`` gives on that many ranks."""
    with tempfile.NamedTemporaryFile() as found:
        arguments = [msgspec.json.encode(config).decode(), str(directory), work.__name__, found.name]
        command = [sys.executable, "-m", "tests.worker.cuda_ranks", *arguments]
        subprocess.run(command, timeout=HANG_SECONDS, check=True)
        return pickle.load(found)


def main() -> None:
    config_json, directory, work, file = sys.argv[1:]
    config = msgspec.json.decode(config_json, type=EngineConfig)
    setup_logging(config.log_level)
    executor = LocalExecutor(("-m", "tests.worker.cuda_rank"))
    made = ParallelWorker(config, Path(directory), Reporter(), make_runner, executor)
    found = WORK[work](made, config.pp_size)
    made.close()
    Path(file).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main()
