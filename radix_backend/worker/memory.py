"""How much memory the KV cache gets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from radix_backend.attention.kv_pool import page_bytes
from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.loading import ModelConfig
from radix_backend.worker.host import available_memory

log = logging.getLogger(__name__)

CPU_LIMIT = 2 * 2**30  # bytes a KV cache takes unasked: a CPU's memory is not the engine's alone


@dataclass(frozen=True)
class Budget:
    """Bytes of a device's memory."""

    free: int  # when the engine started
    taken: int  # by weights and state
    reserved: int  # for activations and graphs


def measure_on_device(free: int, compute: Callable[[], None]) -> Budget:
    """What is taken of the ``free`` bytes that there were at first, and what ``compute`` takes for a while."""
    used = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    compute()
    torch.cuda.synchronize()
    activations = torch.cuda.max_memory_allocated() - used
    torch.cuda.empty_cache()
    return Budget(free, free - torch.cuda.mem_get_info()[0], activations)


def plan_pages_on_device(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, context_len: int, budget: Budget
) -> int:
    """As `plan_pages`, on a device whose other needs have been measured."""
    size = page_bytes(model, config.page_size, dtype)
    share = int(config.gpu_memory_utilization * budget.free) - budget.taken - budget.reserved
    why = (
        f"gpu_memory_utilization {config.gpu_memory_utilization} of {budget.free / 2**30:.1f} GiB free, "
        f"less {budget.taken / 2**30:.2f} GiB taken and {budget.reserved / 2**30:.2f} GiB for activations and graphs"
    )
    useful = config.max_bs * -(-context_len // config.page_size) * size
    limits = {share: why, useful: f"all that max_bs {config.max_bs} requests of context_len {context_len} can use"}
    return _pages(config, size, context_len, limits, why)


def plan_pages(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, context_len: int) -> int:
    """Pages of the KV pool, where all ranks share this machine's memory.

    Raises InvalidArgument or Unavailable when not even one request fits.
    """
    size = page_bytes(model, config.page_size, dtype)
    available, weights = available_memory() // config.num_ranks, model.num_parameters * dtype.itemsize
    share = int(config.gpu_memory_utilization * available) - weights
    why = (
        f"gpu_memory_utilization {config.gpu_memory_utilization} of {available / 2**30:.1f} GiB available, less weights"
    )
    useful = config.max_bs * -(-context_len // config.page_size) * size
    limits = {
        share: why,
        useful: f"all that max_bs {config.max_bs} requests of context_len {context_len} can use",
        CPU_LIMIT: "the default limit on a CPU; set kv_cache_memory for more",
    }
    return _pages(config, size, context_len, limits, why)


def _pages(config: EngineConfig, size: int, context_len: int, limits: dict[int, str], share: str) -> int:
    """What ``kv_cache_memory`` allows, or the least of ``limits`` (bytes → what sets it)."""
    if config.kv_cache_memory is not None:
        if config.kv_cache_memory < size:
            raise InvalidArgument(
                f"setting 'kv_cache_memory' is {config.kv_cache_memory}; accepted: at least {size} (one page)"
            )
        pages, why = config.kv_cache_memory // size, "kv_cache_memory"
    else:
        budget = min(limits)
        if budget < size:
            raise Unavailable(
                f"no memory for a KV cache: {share}, leaves {max(budget, 0) / 2**20:.0f} MiB "
                f"for pages of {size / 2**20:.1f} MiB"
            )
        pages, why = budget // size, limits[budget]
    tokens = pages * config.page_size
    log.info("KV cache: %d pages of %d tokens, %.0f MiB (%s)", pages, config.page_size, pages * size / 2**20, why)
    if tokens < context_len:
        log.warning(
            "the KV cache holds %d tokens, fewer than one request may have (context_len %d)", tokens, context_len
        )
    return pages
