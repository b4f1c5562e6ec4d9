"""Executes steps on this machine's CPU."""

from __future__ import annotations

import functools
import logging
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.profiler import record_function

from radix_backend.attention.kv_pool import KVPool
from radix_backend.attention.torch_native import TorchNative, compile_decode
from radix_backend.config import EngineConfig
from radix_backend.layers.ops import cpu_ops
from radix_backend.loading import ModelConfig, effective_context_len, read_model_config
from radix_backend.loading.checkpoint import Checkpoint
from radix_backend.loading.dummy import DummyWeights
from radix_backend.models.decoder import Decoder, Norms
from radix_backend.process import Reporter
from radix_backend.protocol import TokenLogprobs
from radix_backend.sampling import cpu_sampler
from radix_backend.sampling.logprobs import token_logprobs
from radix_backend.sampling_params import SamplingParams
from radix_backend.worker.batch_state import BatchState, StepInput
from radix_backend.worker.host import available_cpus
from radix_backend.worker.interface import Ints, NewRequest, StepPlan, StepResult
from radix_backend.worker.memory import plan_pages
from radix_backend.worker.prompt_scores import score_prompt

log = logging.getLogger(__name__)

# The engine's Python shares the interpreter with the worker thread, which asks for the GIL again after each of some
# hundred operations a step. The default of 5 ms would let one millisecond of scheduling stall every one of them.
_SWITCH_INTERVAL = 50e-6  # seconds


class Runner:
    """`Worker` with the model in this process. Steps run in one thread, in the order they were launched.

    That thread also loads the model: every thread that enters a parallel region gets an OpenMP team of its own, and
    with more threads than cores libgomp stops spinning between regions, which doubles the time of a decode step.
    """

    def __init__(self, config: EngineConfig, model_dir: Path, reporter: Reporter) -> None:
        """Loads the model and computes one small step. Raises what the checkpoint, settings or memory do not allow."""
        sys.setswitchinterval(_SWITCH_INTERVAL)
        model = read_model_config(model_dir)
        context_len = effective_context_len(config, model)
        dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
        self.num_pages = plan_pages(config, model, dtype, context_len)
        self._reporter = reporter
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[StepResult | BaseException] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        load = functools.partial(self._load, config, model, model_dir, dtype, context_len)
        self._thread = threading.Thread(target=self._serve, args=(load,), name="worker", daemon=True)
        self._thread.start()
        self._warm_up(config.page_size)

    def launch(self, plan: StepPlan) -> None:
        self._raise_failure()
        self._plans.put(plan)

    def settle(self) -> StepResult:
        self._raise_failure()
        result = self._results.get()
        if isinstance(result, StepResult):
            return result
        self._failure = result
        raise result

    def close(self) -> None:
        """Waits for the steps that were launched."""
        self._plans.put(None)
        self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _serve(self, load: Callable[[], None]) -> None:
        try:
            with torch.inference_mode():
                load()
                while (plan := self._plans.get()) is not None:
                    self._results.put(self._execute(plan))
        except BaseException as error:
            # What the batch state holds now is anybody's guess: nothing more is executed.
            self._results.put(error)

    def _load(
        self, config: EngineConfig, model: ModelConfig, model_dir: Path, dtype: torch.dtype, context_len: int
    ) -> None:
        torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))

        def progress(fraction: float) -> None:
            self._reporter.phase("loading weights", fraction)

        dummy = config.load_format == "dummy"
        weights = DummyWeights(dtype, "cpu") if dummy else Checkpoint(model_dir)
        self._model = Decoder(model, weights, dtype, context_len, cpu_ops(dtype), progress)
        self._reporter.phase("compiling")  # a moment where the cache of kernels is warm
        self._state = BatchState(config.max_bs, context_len, config.page_size)
        pool = KVPool(model, self.num_pages, config.page_size, dtype)
        self._attention = TorchNative(pool, compile_decode(pool, model.num_heads))
        # Logits that a request's rules have shifted are f32.
        self._samplers = {kind: cpu_sampler(kind) for kind in {dtype, torch.float32}}
        self._reporter.phase("warming up")

    def _execute(self, plan: StepPlan) -> StepResult:
        step = self._state.apply(plan)
        attention = self._attention.plan(step.attention)

        def attend(layer: int, heads: torch.Tensor, norms: Norms | None) -> torch.Tensor:
            self._reporter.progress()  # a step of a large model takes seconds
            return self._attention.attend(attention, layer, *self._model.rotated(heads, norms, step.positions))

        with record_function("forward"):
            hidden = self._model.forward(step.token_ids, attend)
            logits = self._model.logits(hidden, step.sampled)
        with record_function("sample"):
            tokens, logprobs = self._sample(step, logits)
        prompt_logprobs = [score_prompt(self._model, hidden, span, self._reporter.progress) for span in step.scored]
        return StepResult(plan.step, tokens, logprobs, prompt_logprobs)

    def _sample(self, step: StepInput, logits: torch.Tensor) -> tuple[Ints, list[TokenLogprobs | None]]:
        if not len(step.sampled):
            return np.empty(0, np.int32), []
        counts = self._state.logprob_counts(step)
        reported = [row for row, count in enumerate(counts) if count >= 0]
        logprobs = torch.log_softmax(logits[reported].float(), dim=-1) if reported else None
        logits = self._state.apply_rules(step, logits)
        tokens = self._samplers[logits.dtype](logits, self._state.sampling_rows(step))
        self._state.append(step, tokens)
        sampled: Ints = tokens.numpy().astype(np.int32)
        if logprobs is None:
            return sampled, []
        theirs = token_logprobs(logprobs, tokens[reported], [counts[row] for row in reported])
        by_row = dict(zip(reported, theirs, strict=True))
        return sampled, [by_row.get(row) for row in range(len(counts))]

    def _warm_up(self, page_size: int) -> None:
        """Allocate what the first steps would otherwise wait for. The page written to is still free."""
        params = SamplingParams(top_k=2, top_p=0.5, min_p=0.1, seed=0)
        first = NewRequest(0, np.zeros(1, np.int32), 1, 0, params)
        slot, one, every = np.zeros(1, np.int32), np.ones(1, np.int32), np.ones(1, np.bool_)
        index = np.arange(-(-2 // page_size), dtype=np.int32)
        pages = np.zeros_like(index)
        self.launch(StepPlan(0, [first], pages, index, pages, slots=slot, num_tokens=one, sample=every))
        self.launch(StepPlan(0, slots=slot, num_tokens=one, sample=every, num_decode=1))
        self.settle()
        self.settle()
