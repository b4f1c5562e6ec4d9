"""``python -m radix_backend.worker.measure_collectives``: how fast ranks of this machine talk to each other.

On GPUs calls are replayed from a CUDA graph, as a decode step makes them; elsewhere gloo is measured.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from radix_backend.config import EngineConfig
from radix_backend.layers.ops import TorchOps
from radix_backend.layers.tensor_parallel import TensorParallel
from radix_backend.process import PARENT_PID, die_with_parent
from radix_backend.worker.ranks import Meeting, Ranks, join, listen, own_gpu

_SIZES = [8 << 10 << shift for shift in range(10)]  # bytes: 8 KiB to 4 MiB
_WIDTH = 4096
_CALLS = 20  # in a graph
_REPLAYS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of all-reduce in bf16, and of sending to the next rank.")
    parser.add_argument("--ranks", type=int, default=2, help="(default: 2)")
    parser.add_argument("--device-ids", default="", help="GPUs, such as 0,1 (default: the first ones)")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = {"device_ids": arguments.device_ids} if arguments.device_ids else {}
    config = EngineConfig.parse({"tp_size": arguments.ranks, "device": device, "all_reduce": "nccl", **ids})
    if arguments.rank:
        die_with_parent()
        _measure(join(config, arguments.rank, Meeting(arguments.port, gpu=own_gpu(config, arguments.rank))))
        return
    listener = listen(config)
    port = listener.getsockname()[1]
    command = [sys.executable, "-m", "radix_backend.worker.measure_collectives", *sys.argv[1:]]
    environment = os.environ | {PARENT_PID: str(os.getpid())}
    others = [
        subprocess.Popen([*command, f"--rank={rank}", f"--port={port}"], env=environment)
        for rank in range(1, arguments.ranks)
    ]
    _measure(join(config, 0, Meeting(port, gpu=own_gpu(config, 0)), listener))
    for process in others:
        process.wait()


def _measure(ranks: Ranks) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    tp = ranks.tp
    columns = {"nccl" if cuda else "gloo": _times(tp, device)}
    if cuda:
        for name, sizes in (
            ("one-shot", {"one_shot_bytes": _SIZES[-1]}),
            ("two-shot", {"one_shot_bytes": 0}),
            ("", {}),
        ):
            tp.use_peer_memory(_WIDTH, torch.bfloat16, **sizes)
            dist.barrier()
            if name:
                columns[name] = _times(tp, device)
        columns["auto, with norm"] = [_with_norm(tp, _tensor(size, device)) for size in _SIZES]
    columns["send"] = [_timed(_bounce, ranks.rank, _tensor(size, device)) / 2 for size in _SIZES]
    if ranks.rank == 0:
        print("| KiB |" + "".join(f" {name} µs |" for name in columns) + " send GB/s |")
        print("|---|" + "---|" * (len(columns) + 1))
        for size, *times in zip(_SIZES, *columns.values(), strict=True):
            cells = [f"{size >> 10}", *(f"{each:.1f}" for each in times), f"{size / times[-1] / 1e3:.1f}"]
            print(f"| {' | '.join(cells)} |")
    dist.barrier()
    ranks.close()


def _times(tp: TensorParallel, device: torch.device) -> list[float]:
    return [_timed(tp.all_reduce, _tensor(size, device), graph=device.type == "cuda") for size in _SIZES]


def _tensor(size: int, device: torch.device) -> Tensor:
    """[rows, width] bf16"""
    return torch.zeros(size // 2 // _WIDTH, _WIDTH, dtype=torch.bfloat16, device=device)


def _with_norm(tp: TensorParallel, x: Tensor) -> float:
    residual, weight = torch.zeros_like(x, dtype=torch.float32), x.new_ones(_WIDTH)
    return _timed(tp.add_rms_norm, TorchOps(), residual, x, weight, 1e-6, graph=True)


def _bounce(rank: int, x: Tensor) -> None:
    """From rank 0 to rank 1, and back."""
    if rank == 0:
        dist.send(x, 1)
        dist.recv(x, 1)
    elif rank == 1:
        dist.recv(x, 0)
        dist.send(x, 0)


def _timed(function: Callable[..., object], *arguments: object, graph: bool = False) -> float:
    """Microseconds a call."""
    call = functools.partial(function, *arguments)
    call()
    replay: Callable[[], object] = call
    calls = 1
    if graph:
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, capture_error_mode="thread_local"):
            for _ in range(_CALLS):
                call()
        replay, calls = captured.replay, _CALLS
    replay()
    _synchronize()
    started = time.perf_counter()
    for _ in range(_REPLAYS):
        replay()
    _synchronize()
    return (time.perf_counter() - started) / _REPLAYS / calls * 1e6


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
