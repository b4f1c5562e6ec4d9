"""``python -m radix_backend.engine.offline CONFIG_JSON MODEL_DIR``: the engine without doors, for measuring.

Reads one JSON `Workload` a line from stdin, runs it and writes one JSON `Measured` a line to stdout.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from radix_backend.config import EngineConfig
from radix_backend.engine.kv_cache import KVCache
from radix_backend.engine.request import Request
from radix_backend.engine.scheduler import Scheduler
from radix_backend.process import Reporter, setup_logging
from radix_backend.sampling_params import SamplingParams
from radix_backend.worker import create_worker
from radix_backend.worker.interface import Worker


class Workload(msgspec.Struct):
    """Requests that all arrive at once and generate exactly so many tokens each."""

    name: str
    prompts: list[list[int]]
    num_outputs: list[int]
    temperature: float = 0.6


class Measured(msgspec.Struct):
    name: str
    num_requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int  # generated, counted one by one
    seconds: float
    output_tokens_per_second: float
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]  # of a request: time after its first token over the number of those tokens
    num_steps: int
    host_seconds: float  # neither waiting for the device nor idle


class OfflineEngine:
    """Scheduler and worker in this process, with async scheduling."""

    def __init__(self, config: EngineConfig, worker: Worker) -> None:
        self._worker = worker
        self._depth = 1 if config.disable_async_scheduling else 2
        self._ids = itertools.count()
        self.scheduler = Scheduler(
            KVCache(worker.num_pages, config.page_size),
            max_bs=config.max_bs,
            max_batched_tokens=config.max_batched_tokens,
            max_queue_size=config.max_queue_size,
        )

    def run(self, workload: Workload) -> Measured:
        # Tokens reach an engine as arrays: to make these of lists is no part of its work.
        prompts = [np.array(prompt, np.int32) for prompt in workload.prompts]
        started = time.perf_counter()
        cached_before = self.scheduler.counters.cached_tokens
        times: dict[int, list[float]] = {}
        for prompt, count in zip(prompts, workload.num_outputs, strict=True):
            request = self._request(prompt, count, workload.temperature)
            times[request.id] = []
            self.scheduler.add(request)
        num_steps, waited = self._drain(times)
        seconds = time.perf_counter() - started
        output_tokens = sum(len(each) for each in times.values())
        rest = [(each[-1] - each[0]) / (len(each) - 1) for each in times.values() if len(each) > 1]
        return Measured(
            name=workload.name,
            num_requests=len(times),
            prompt_tokens=sum(len(prompt) for prompt in workload.prompts),
            cached_tokens=self.scheduler.counters.cached_tokens - cached_before,
            output_tokens=output_tokens,
            seconds=round(seconds, 4),
            output_tokens_per_second=round(output_tokens / seconds, 1),
            ttft_ms=_summary([each[0] - started for each in times.values()]),
            tpot_ms=_summary(rest),
            num_steps=num_steps,
            host_seconds=round(seconds - waited, 4),
        )

    def _request(self, prompt: npt.NDArray[np.int32], count: int, temperature: float) -> Request:
        number = next(self._ids)
        return Request(
            id=number,
            prompt=prompt,
            params=SamplingParams(max_tokens=count, temperature=temperature, seed=number),
            stop_token_ids=frozenset(),
            max_tokens=count,
        )

    def _drain(self, times: dict[int, list[float]]) -> tuple[int, float]:
        """Run until nothing is left; returns the number of steps and the seconds spent waiting for them."""
        in_flight = num_steps = 0
        waited = 0.0
        while self.scheduler.requests or in_flight:
            plan = self.scheduler.schedule()
            if plan is not None:
                self._worker.launch(plan)
                in_flight += 1
            if in_flight == self._depth or (plan is None and in_flight):
                before = time.perf_counter()
                result = self._worker.settle()
                now = time.perf_counter()
                waited += now - before
                in_flight -= 1
                num_steps += 1
                self.scheduler.settle(result)
                outputs, self.scheduler.outputs = self.scheduler.outputs, []
                for output in outputs:
                    if output.token is not None:
                        times[output.id].append(now)
        return num_steps, waited


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds."""
    if not seconds:
        return {}
    values = np.array(seconds) * 1e3
    percentiles = {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 99)}
    return {"mean": round(float(values.mean()), 3), **percentiles}


def main() -> None:
    config = EngineConfig.parse(msgspec.json.decode(sys.argv[1]))
    setup_logging(config.log_level)
    worker = create_worker(config, Path(sys.argv[2]), Reporter())
    engine = OfflineEngine(config, worker)
    gc.collect()
    gc.freeze()  # what was loaded stays: collections need not look at it again
    for line in sys.stdin:
        measured = engine.run(msgspec.json.decode(line, type=Workload))
        sys.stdout.write(msgspec.json.encode(measured).decode() + "\n")
        sys.stdout.flush()
    worker.close()


if __name__ == "__main__":
    main()
