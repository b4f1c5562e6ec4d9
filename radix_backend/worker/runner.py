"""Executes steps on this machine's CPU; in plain torch on any device."""

from __future__ import annotations

import functools
import logging
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.profiler import record_function

from radix_backend.attention.kv_pool import KVPool
from radix_backend.attention.torch_native import TorchNative, compile_decode
from radix_backend.config import EngineConfig
from radix_backend.layers.ops import TorchOps, cpu_ops
from radix_backend.loading import Shard, effective_context_len, read_model_config
from radix_backend.loading.checkpoint import Checkpoint
from radix_backend.loading.dummy import DummyWeights
from radix_backend.models.decoder import Decoder, Norms
from radix_backend.process import Reporter
from radix_backend.protocol import TokenLogprobs
from radix_backend.sampling import SamplingRows, cpu_sampler, torch_native
from radix_backend.sampling.logprobs import score_tokens, token_logprobs
from radix_backend.sampling_params import SamplingParams
from radix_backend.worker.batch_state import BatchState, StepInput
from radix_backend.worker.host import available_cpus
from radix_backend.worker.interface import NewRequest, StepPlan, StepResult
from radix_backend.worker.memory import measure_on_device, plan_pages, plan_pages_on_device
from radix_backend.worker.precision import compute_dtype
from radix_backend.worker.prompt_scores import score_prompt
from radix_backend.worker.ranks import NO_OTHERS, Ranks, use_gpu
from radix_backend.worker.rehearsal import rehearse

log = logging.getLogger(__name__)

# The engine's Python shares the interpreter with the worker thread, which asks for the GIL again after each of some
# hundred operations a step. The default of 5 ms would let one millisecond of scheduling stall every one of them.
_SWITCH_INTERVAL = 50e-6  # seconds


class Runner:
    """`Worker` with a shard of the model in this process. Steps run in one thread, in the order they were launched.
    Only ranks of the last stage have results.

    That thread also loads the model: every thread that enters a parallel region gets an OpenMP team of its own, and
    with more threads than cores libgomp stops spinning between regions, which doubles the time of a decode step.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        reporter: Reporter,
        ranks: Ranks = NO_OTHERS,
        device: str = "cpu",
        plain: bool = False,
    ) -> None:
        """Loads the model and computes one small step. Raises what the checkpoint, settings or memory do not allow.

        ``plain``: without compiled kernels, as always on a GPU, where that is for want of better ones.
        """
        sys.setswitchinterval(_SWITCH_INTERVAL)
        model = read_model_config(model_dir)
        context_len = effective_context_len(config, model)
        self._dtype, self._device, self._plain = compute_dtype(config), device, plain or device != "cpu"
        self._ranks, self._shard = ranks, Shard.of(config, model, ranks.rank)
        self._reporter = reporter
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[StepResult | BaseException] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        load = functools.partial(self._load, config, model_dir, context_len)
        self._thread = threading.Thread(target=self._serve, args=(load,), name="worker", daemon=True)
        self._thread.start()
        # Allocates what the first steps would otherwise wait for.
        rehearse(self, config, 1, SamplingParams(top_k=2, top_p=0.5, min_p=0.1, seed=0))

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
        if self._ranks.pipeline is not None:
            self._ranks.pipeline.drain(self._device)

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

    def _load(self, config: EngineConfig, model_dir: Path, context_len: int) -> None:
        torch.set_num_threads(min(torch.get_num_threads(), max(available_cpus() // config.num_ranks, 1)))
        dtype, device, part = self._dtype, self._device, self._shard.part
        use_gpu(config, self._ranks.gpu)  # which is each thread's own affair
        free = 0 if device == "cpu" else torch.cuda.mem_get_info()[0]
        if device == "cpu":
            self.num_pages = self._ranks.least(plan_pages(config, part, dtype, context_len))

        def progress(fraction: float) -> None:
            self._reporter.phase("loading weights", fraction)

        dummy = config.load_format == "dummy"
        weights = DummyWeights(dtype, device) if dummy else Checkpoint(model_dir)
        ops = TorchOps() if self._plain else cpu_ops(dtype)
        tp = self._ranks.tp
        self._model = Decoder(self._shard, weights, dtype, context_len, ops, progress, device, tp)
        self._reporter.phase("compiling")  # a moment where the cache of kernels is warm
        self._state = BatchState(config.max_bs, context_len, config.page_size, device)
        # Logits that a request's rules have shifted are f32.
        self._samplers = {
            kind: torch_native.sample if self._plain else cpu_sampler(kind) for kind in {dtype, torch.float32}
        }
        if device != "cpu":
            self._attach(1, config.page_size)
            budget = measure_on_device(free, functools.partial(self._largest_step, config, context_len))
            self.num_pages = self._ranks.least(plan_pages_on_device(config, part, dtype, context_len, budget))
        self._attach(self.num_pages, config.page_size)
        self._reporter.phase("warming up")

    def _attach(self, num_pages: int, page_size: int) -> None:
        part = self._shard.part
        pool = KVPool(part, num_pages, page_size, self._dtype, self._device)
        self._attention = TorchNative(pool, None if self._plain else compile_decode(pool, part.num_heads))

    def _largest_step(self, config: EngineConfig, context_len: int) -> None:
        """The end of the longest prompt, in a pool whose only page is all of its pages, and logits of all rows."""
        num_tokens = min(config.max_batched_tokens, context_len)
        request = NewRequest(
            0, np.zeros(context_len, np.int32), context_len, context_len - num_tokens, SamplingParams()
        )
        slot, every = np.zeros(1, np.int32), np.ones(1, np.bool_)
        number = -2 * config.pp_size  # before the steps that warm up
        self._execute(StepPlan(number, [request], slots=slot, num_tokens=slot + num_tokens, sample=every))
        logits = torch.zeros(config.max_bs, self._model.config.vocab_size, dtype=self._dtype, device=self._device)
        torch.log_softmax(logits.float(), dim=-1)

    def _execute(self, plan: StepPlan) -> StepResult:
        pipeline, shard = self._ranks.pipeline, self._shard
        if pipeline is not None and shard.is_first:
            for earlier, sampled in pipeline.due_tokens(plan.step, self._device):
                self._state.append(earlier, sampled)
        step = self._state.apply(plan)
        attention = self._attention.plan(step.attention)

        def attend(layer: int, heads: torch.Tensor, norms: Norms | None) -> torch.Tensor:
            self._reporter.progress()  # a step of a large model takes seconds
            return self._attention.attend(attention, layer, *self._model.rotated(heads, norms, step.positions))

        inputs = step.token_ids
        if pipeline is not None and not shard.is_first:
            inputs = pipeline.receive_hidden(torch.empty(len(inputs), shard.model.hidden_size, device=self._device))
        with record_function("forward"):
            hidden = self._model.forward(inputs, [attend])
        if pipeline is not None and not shard.is_last:
            pipeline.send_hidden(hidden.sum())
            if shard.is_first:
                pipeline.expect_tokens(plan.step, step)
            return StepResult(plan.step, np.empty(0, np.int32))
        with record_function("sample"):
            tokens, logprobs = self._sample(step, self._model.logits(hidden, step.sampled))
        self._state.append(step, tokens)
        if pipeline is not None:
            pipeline.send_tokens(tokens)
        prompt_logprobs = []
        for span in step.scored:
            scores = score_prompt(self._model, hidden, span, self._reporter.progress)
            prompt_logprobs.append(token_logprobs(scores.cpu(), [span.count] * len(scores)))
        return StepResult(plan.step, tokens.cpu().numpy().astype(np.int32), logprobs, prompt_logprobs)

    def _sample(self, step: StepInput, logits: torch.Tensor) -> tuple[torch.Tensor, list[TokenLogprobs | None]]:
        """Of rows without filters, rules and log probabilities ranks exchange candidates, of others their logits."""
        tp, settings = self._ranks.tp, self._state.sampling_rows(step)
        whole = self._state.ruled(step) | (self._state.logprob_counts(step) >= 0) | settings.filters
        if tp.size == 1 or whole.all():
            everything = tp.gather_vocabulary(logits, self._shard.model.vocab_size)
            return self._sample_whole(step, np.arange(len(logits)), everything, settings)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        rows = np.flatnonzero(~whole)
        index = torch.from_numpy(rows).to(logits.device)
        first = self._shard.vocabulary.start
        tokens[index] = tp.elect(*self._samplers[logits.dtype](logits[index], settings.take(rows), first))
        if not whole.any():
            return tokens, []
        rows = np.flatnonzero(whole)
        index = torch.from_numpy(rows).to(logits.device)
        everything = tp.gather_vocabulary(logits[index], self._shard.model.vocab_size)
        tokens[index], logprobs = self._sample_whole(step, rows, everything, settings.take(rows))
        return tokens, logprobs

    def _sample_whole(
        self, step: StepInput, rows: npt.NDArray[np.int64], logits: torch.Tensor, settings: SamplingRows
    ) -> tuple[torch.Tensor, list[TokenLogprobs | None]]:
        """The tokens of these ``rows`` of the step, and the log probabilities of all its rows, if any has some.

        ``logits`` [rows, vocabulary] and ``settings`` are of these rows.
        """
        counts = self._state.logprob_counts(step)[rows]
        reported = np.flatnonzero(counts >= 0)
        logprobs = torch.log_softmax(logits[reported.tolist()].float(), dim=-1) if len(reported) else None
        logits = self._state.apply_rules(step, rows, logits)
        tokens, _ = self._samplers[logits.dtype](logits, settings)
        if logprobs is None:
            return tokens, []
        theirs = counts[reported].tolist()
        scores = score_tokens(logprobs, tokens[reported.tolist()], max(theirs))
        by_row = dict(zip(rows[reported].tolist(), token_logprobs(scores.cpu(), theirs), strict=True))
        return tokens, [by_row.get(row) for row in range(len(step.sample_slots))]
