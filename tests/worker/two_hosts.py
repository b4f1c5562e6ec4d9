"""``python -m tests.worker.two_hosts ENGINE|AGENT …``: two ranks of which one is on another host, without Ray.

``ENGINE MODEL ADDRESS OTHER_ADDRESS ENTER…`` prints what it generates as JSON and then generates for ever. ``ENTER…``
is the command that runs a program on the other host. ``AGENT`` reads its task from stdin, prints how its rank ended.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from radix_backend.config import EngineConfig
from radix_backend.process import Reporter, setup_logging
from radix_backend.worker.agent import Place, RankTask, attend
from radix_backend.worker.interface import Worker
from radix_backend.worker.rank import RankSpec
from tests.engine.sim import SimEngine

# On the other host the model is not where the engine has it: its rank has to look for it again.
ELSEWHERE = "/nowhere/model"


class OneAgent:
    """`Placement` of one rank beside the engine's."""

    def __init__(self, addresses: Sequence[str], enter: Sequence[str]) -> None:
        self._addresses, self._enter = addresses, enter
        self._agent: subprocess.Popen[bytes] | None = None

    def place(self) -> list[Place]:
        return [Place(address, address) for address in self._addresses]

    def start(self, tasks: Sequence[RankTask]) -> None:
        (task,) = tasks
        spec = msgspec.json.decode(task.spec, type=RankSpec)
        spec = msgspec.structs.replace(spec, model_dir=ELSEWHERE)
        task = msgspec.structs.replace(task, spec=msgspec.json.encode(spec))
        self._agent = subprocess.Popen(
            [*self._enter, sys.executable, "-m", "tests.worker.two_hosts", "AGENT"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._agent.stdin is not None
        with self._agent.stdin:
            self._agent.stdin.write(base64.b64encode(msgspec.msgpack.encode(task)))

    def fileno(self) -> int:
        assert self._agent is not None
        assert self._agent.stdout is not None
        return self._agent.stdout.fileno()

    def ended(self) -> list[tuple[int, str]]:
        assert self._agent is not None
        assert self._agent.stdout is not None
        if self._agent.poll() is None:
            return []
        return [(1, self._agent.stdout.read().decode())]

    def close(self) -> None:
        if self._agent is not None:
            self._agent.wait(10)


def small(model: Path, **settings: object) -> EngineConfig:
    sizes = {"max_bs": 4, "context_len": 256, "max_batched_tokens": 64, "kv_cache_memory": 2**22}
    return EngineConfig.parse({"model": str(model), "device": "cpu", "dtype": "float32", **sizes, **settings})


def generate(worker: Worker, pp_size: int = 1) -> list[list[int]]:
    engine = SimEngine(64, 16, 4, 64, worker=worker, pp_size=pp_size)
    ways: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 1.2, "top_k": 40, "top_p": 0.95, "seed": 4},
    ]
    requests = [engine.add(list(range(1 + i, 30 + 9 * i)), 12, **way) for i, way in enumerate(ways)]
    engine.run(pp_size + 1)
    return [engine.outputs[request] for request in requests]


def main() -> None:
    role, *arguments = sys.argv[1:]
    if role == "AGENT":
        task = msgspec.msgpack.decode(base64.b64decode(sys.stdin.read()), type=RankTask)
        print(attend(task), end="")
        return
    from radix_backend.worker.parallel import ParallelWorker
    from radix_backend.worker.remote_executor import RemoteExecutor
    from radix_backend.worker.selection import make_runner

    setup_logging("info")
    directory, address, other, *enter = arguments
    model = Path(directory)
    executor = RemoteExecutor(OneAgent([address, other], enter))
    worker = ParallelWorker(small(model, tp_size=2), model, Reporter(), make_runner, executor)
    print(json.dumps(generate(worker)), flush=True)
    while True:
        generate(worker)


if __name__ == "__main__":
    main()
