"""The first request of a worker, before there is traffic."""

from __future__ import annotations

import numpy as np

from radix_backend.config import EngineConfig
from radix_backend.sampling_params import SamplingParams
from radix_backend.worker.interface import NewRequest, StepPlan, Worker


def rehearse(worker: Worker, config: EngineConfig, prompt_len: int, params: SamplingParams) -> None:
    """Compute a prompt of ``prompt_len`` tokens and one decode. The page that all of it is written to is still free."""
    slot, one, every = np.zeros(1, np.int32), np.ones(1, np.int32), np.ones(1, np.bool_)
    index = np.arange(-(-(prompt_len + 1) // config.page_size), dtype=np.int32)
    pages = np.zeros_like(index)
    first = NewRequest(0, np.zeros(prompt_len, np.int32), prompt_len, 0, params)
    earlier = -config.pp_size  # the second step needs the token of the first
    count = prompt_len * one
    worker.launch(StepPlan(earlier, [first], pages, index, pages, slots=slot, num_tokens=count, sample=every))
    worker.launch(StepPlan(0, slots=slot, num_tokens=one, sample=every, num_decode=1))
    worker.settle()
    worker.settle()
