"""Ranks that are processes and reach each other's memory, as GPUs do: for kernels in Triton's interpreter."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import torch


def run_ranks(size: int, length: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(rank, buffers, barrier, *arguments)`` gives on each rank; each buffer has ``length`` bytes."""
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(size), context.Queue()
    memories = [SharedMemory(create=True, size=length) for _ in range(size)]
    names = [memory.name for memory in memories]
    try:
        ranks = [
            context.Process(target=_rank, args=(rank, names, length, barrier, found, work, *arguments))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        results = {}
        for _ in ranks:
            rank, results[rank], error = found.get(timeout=300)
            assert error is None, error
        for process in ranks:
            process.join()
    finally:
        for memory in memories:
            memory.close()
            memory.unlink()
    return [results[rank] for rank in range(size)]


def _rank(
    rank: int, names: list[str], length: int, barrier: Any, found: Any, work: Callable[..., Any], *arguments: Any
) -> None:
    torch.set_num_threads(1)
    memories = [SharedMemory(name) for name in names]
    buffers = [torch.frombuffer(memory.buf, dtype=torch.uint8)[:length] for memory in memories]
    try:
        with torch.inference_mode():
            found.put((rank, work(rank, buffers, barrier, *arguments), None))
    except Exception:
        found.put((rank, None, traceback.format_exc()))
