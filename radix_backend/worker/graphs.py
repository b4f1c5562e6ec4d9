"""CUDA graphs of a decode step, over a ladder of batch sizes.

A step is two graphs, the forward pass and sampling: rows whose logits change before they are sampled (penalties,
excluded words) come between the two.
"""

from __future__ import annotations

import bisect
import gc
from collections.abc import Callable

import torch


def ladder(max_bs: int) -> list[int]:
    """Batch sizes worth a graph: a step is padded to the next one."""
    sizes = {1, 2, 4, max_bs, *range(8, min(max_bs, 64), 8), *range(64, min(max_bs, 256), 16), *range(256, max_bs, 32)}
    return sorted(size for size in sizes if size <= max_bs)


class DecodeGraphs:
    """Calls ``forward(rows)`` and ``sample(rows)`` by replaying what they launched when they were captured."""

    def __init__(
        self,
        sizes: list[int],
        forward: Callable[[int], None],
        sample: Callable[[int], None] | None,
        progress: Callable[[float], None],
    ) -> None:
        """Captures all sizes, the largest first: smaller ones then fit into its memory. Not every rank samples."""
        self._sizes = sizes
        self._graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}
        parts = [forward] if sample is None else [forward, sample]
        pool = torch.cuda.graph_pool_handle()
        for number, size in enumerate(reversed(sizes)):
            for part in parts:
                part(size)  # compiles and allocates what must not be captured
            torch.cuda.synchronize()
            self._graphs[size] = [_capture(part, size, pool) for part in parts]
            for graph in self._graphs[size]:
                graph.replay()  # the first launch takes memory on the device, and may wait for it to be idle
            progress((number + 1) / len(sizes))
        gc.collect()

    def padded(self, rows: int) -> int:
        """The captured size that takes so many rows."""
        return self._sizes[bisect.bisect_left(self._sizes, rows)]

    def forward(self, size: int) -> None:
        self._graphs[size][0].replay()

    def sample(self, size: int) -> None:
        self._graphs[size][1].replay()


def _capture(function: Callable[[int], None], size: int, pool: object) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # Other threads may do as they like meanwhile: NCCL's watchdog looks at its events.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        function(size)
    return graph
