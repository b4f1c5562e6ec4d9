"""Executes steps on a CUDA device. `launch` only queues work; `settle` waits for one step's tokens."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from radix_backend.attention.cuda import AttentionSetup, Chunks, PrefillBatch
from radix_backend.attention.cuda_backends import cuda_attention, resolve_backends
from radix_backend.attention.cuda_decode import tile_rows
from radix_backend.attention.cuda_extend import tile_tokens
from radix_backend.attention.kv_pool import KVPool
from radix_backend.config import EngineConfig
from radix_backend.layers.cuda_few_rows import MAX_ROWS
from radix_backend.layers.cuda_ops import CudaOps
from radix_backend.loading import Shard, effective_context_len, read_model_config
from radix_backend.loading.checkpoint import Checkpoint
from radix_backend.loading.dummy import DummyWeights
from radix_backend.models.decoder import Decoder, Hidden
from radix_backend.process import Reporter
from radix_backend.protocol import TokenLogprobs
from radix_backend.sampling.cuda import CudaSampler
from radix_backend.sampling.cuda_rules import CudaRules
from radix_backend.sampling.logprobs import score_tokens, token_logprobs
from radix_backend.sampling_params import MAX_LOGPROBS, SamplingParams
from radix_backend.worker.device_state import DeviceState, DeviceStep, Prefill
from radix_backend.worker.graphs import DecodeGraphs, ladder
from radix_backend.worker.interface import Ints, StepPlan, StepResult
from radix_backend.worker.memory import Budget, measure_on_device, plan_pages_on_device
from radix_backend.worker.precision import compute_dtype
from radix_backend.worker.prompt_scores import score_prompt
from radix_backend.worker.ranks import NO_OTHERS, Ranks
from radix_backend.worker.rehearsal import rehearse
from radix_backend.worker.special_rows import SpecialRows

log = logging.getLogger(__name__)

_SPECIAL_ROWS = 64  # sampled at once: each takes four times the vocabulary in f32
_REHEARSED = 128  # tokens of a prompt before there is traffic: the libraries load kernels when they are first needed
_REHEARSED_EVERY = 32  # decode rows: sizes of full steps beside them
_NO_ROWS = np.empty(0, np.int32)
_GRAPH_BYTES = 8 << 20  # what a captured size takes beside its tensors


@dataclass(frozen=True)
class _Scores:
    """Log probabilities under way: what `score_tokens` made."""

    scores: Tensor
    counts: list[int]  # [rows] how many of the likeliest tokens to report
    rows: Ints  # [rows] of the step's tokens; empty: of a prompt


@dataclass(frozen=True)
class _Launched:
    step: DeviceStep
    buffer: int | None  # None: this rank's results are nobody's
    scores: Sequence[_Scores] = ()  # on the CPU, once `buffer` is
    prompt_scores: Sequence[_Scores] = ()


class CudaRunner:
    """`Worker` with a shard of the model on the current CUDA device.

    Collectives of tensor parallel ranks are inside the graphs; what pipeline stages send each other is not.
    On a CPU (``device``) it runs the same kernels in Triton's interpreter, without graphs: only tests want that.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        reporter: Reporter,
        ranks: Ranks = NO_OTHERS,
        device: str = "cuda",
    ) -> None:
        """Loads the model, sizes the KV pool, captures graphs.

        Raises what the checkpoint, settings or memory do not allow.
        """
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._reporter = reporter
        model = read_model_config(model_dir)
        context_len = effective_context_len(config, model)
        self._dtype = compute_dtype(config)
        self._backends = resolve_backends(config.attention_backend, self._dtype, model.head_dim)
        self._ranks, self._shard = ranks, Shard.of(config, model, ranks.rank)
        self._last_buffer = 0
        self._started = time.monotonic()
        free = torch.cuda.mem_get_info()[0] if self._cuda else 0
        if self._cuda:
            ranks.use_peer_memory(config, model.hidden_size, self._dtype)
        self._load(config, model_dir, context_len)
        self._allocate_state(config, context_len)
        part = self._shard.part
        self._attach(KVPool(part, 1, config.page_size, self._dtype, device))
        self.num_pages = ranks.least(self._size_pool(config, context_len, free))
        self._attention.pool = KVPool(part, self.num_pages, config.page_size, self._dtype, device)
        self._graphs: DecodeGraphs | None = None
        if self._cuda and not config.enforce_eager:
            self._capture()
        self._warm_up(config)
        self._log_phase("ready")

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> None:
        pipeline, shard = self._ranks.pipeline, self._shard
        late = pipeline.due_tokens(plan.step, self._device) if pipeline is not None and shard.is_first else ()
        step = self._state.stage(plan, list(late))
        if self._cuda:
            torch.cuda.current_stream().wait_event(self._copied[self._last_buffer])  # the tokens of the last step
        scores: list[_Scores] = []
        prompt_scores: list[_Scores] = []
        if step.num_decode:
            size = self._graphs.padded(step.num_decode) if self._graphs else step.num_decode
            # What a row samples next comes after all that it attends to.
            self._attention.plan_decode(size, step.sample_positions[: step.num_decode])
            if pipeline is not None and not shard.is_first:
                pipeline.receive_hidden(self._hidden[:size])
            with record_function("forward"):
                (self._graphs.forward if self._graphs else self._forward)(size)
            if pipeline is not None and not shard.is_last:
                pipeline.send_hidden(self._hidden[:size].clone())
            else:
                with record_function("sample"):
                    (self._graphs.sample if self._graphs else self._sample)(size)
                scores += self._sample_again(self._logits, step.special, 0)
        if step.prefill is not None:
            with record_function("forward"):
                hidden = self._prefill(step.prefill, whole=bool(step.scored) or not shard.is_last)
            if pipeline is not None and not shard.is_last:
                pipeline.send_hidden(hidden.sum())
            else:
                for span in step.scored:
                    found = score_prompt(self._model, hidden, span, self._reporter.progress)
                    prompt_scores.append(_Scores(found, [span.count] * len(found), _NO_ROWS))
                logits = self._model.logits(hidden, step.prefill.sampled if step.scored else None)
                self._sample_into(logits, step.prefill.sample_slots, step.num_decode)
                scores += self._sample_again(logits, step.prefill.special, step.num_decode)
        if pipeline is not None and shard.is_last:
            pipeline.send_tokens(self._sampled[: len(step.sample_slots)].clone())
        if pipeline is not None and shard.is_first:
            pipeline.expect_tokens(plan.step, step)
        if shard.is_last and shard.tp_rank == 0:
            self._copy_out(step, scores, prompt_scores)
        else:
            self._launched.append(_Launched(step, None))

    def settle(self) -> StepResult:
        launched = self._launched.popleft()
        step = launched.step
        if launched.buffer is None:
            return StepResult(step.number, np.empty(0, np.int32))
        if self._cuda:
            self._copied[launched.buffer].synchronize()
        tokens = self._results[launched.buffer][: len(step.sample_slots)].numpy()[step.order]
        by_row: dict[int, TokenLogprobs] = {}
        for each in launched.scores:
            by_row.update(zip(each.rows.tolist(), token_logprobs(each.scores, each.counts), strict=True))
        logprobs = [by_row.get(row) for row in step.order.tolist()] if by_row else []
        prompt_logprobs = [token_logprobs(each.scores, each.counts) for each in launched.prompt_scores]
        return StepResult(step.number, tokens, logprobs, prompt_logprobs)

    @torch.inference_mode()
    def close(self) -> None:
        if self._ranks.pipeline is not None:
            self._ranks.pipeline.drain(self._device)
        if self._cuda:
            torch.cuda.synchronize()
            self._graphs = None  # NCCL does not let a communicator go that a graph still has in it

    # ── parts of a step ─────────────────────────────────────────────────────────────────────────────────────

    def _forward(self, rows: int) -> None:
        """Compute the first ``rows`` decode rows: logits, or what the next stage goes on with. Can be captured."""
        batch = self._state.begin_decode(rows)
        inputs = batch.token_ids if self._shard.is_first else self._hidden[:rows]
        hidden = self._model.forward(inputs, [self._attention.decode(batch)])
        if self._shard.is_last:
            self._model.logits(hidden, out=self._logits[:rows])
        else:
            self._hidden[:rows].copy_(hidden.sum())

    def _sample(self, rows: int) -> None:
        """Sample from these logits. Can be captured."""
        self._sampler(
            self._logits[:rows],
            self._state.decode_slots[:rows],
            self._state.lengths,
            self._state.settings,
            self._state.token_ids,
            self._sampled[:rows],
        )

    def _prefill(self, prefill: Prefill, whole: bool) -> Hidden:
        """Of all tokens (``whole``), or of those that are sampled."""
        inputs = self._state.begin_prefill(prefill)
        if self._ranks.pipeline is not None and not self._shard.is_first:
            shape = (len(inputs), self._shard.model.hidden_size)
            inputs = self._ranks.pipeline.receive_hidden(torch.empty(shape, device=self._device))
        attends = [self._attention.extend(batch, piece) for piece, batch in enumerate(prefill.pieces)]
        return self._model.forward(inputs, attends, None if whole else prefill.sampled)

    def _sample_into(self, logits: Tensor, slots: Tensor, first: int) -> None:
        """Sample ``logits`` [rows, vocabulary] for ``slots`` [rows] into the step's tokens from ``first`` on."""
        state = self._state
        self._sampler(
            logits, slots, state.lengths, state.settings, state.token_ids, self._sampled[first : first + len(logits)]
        )

    def _sample_again(self, logits: Tensor, special: SpecialRows | None, first: int) -> list[_Scores]:
        """Sample ``special`` rows of ``logits`` [rows, vocabulary] by their rules, in f32, which bf16 would round away.

        They have been sampled like all others: what that has drawn is replaced, among the step's tokens too, of which
        these rows are number ``first`` and following. Returns the log probabilities that are wanted.
        """
        scores: list[_Scores] = []
        if special is None:
            return scores
        state = self._state
        for start in range(0, len(special.rows), self._most_special):
            part = slice(start, start + self._most_special)
            rows, slots, counts = special.rows[part], special.slots[part], special.counts[part]
            own = self._ranks.tp.gather_vocabulary(logits[rows], self._shard.model.vocab_size).float()
            logprobs = torch.log_softmax(own[: len(counts)], dim=-1)
            self._rules(own, slots, special.rules[part], state.lengths, state.token_ids)
            tokens = torch.zeros_like(slots)  # padding, which is left alone, is a token too
            self._whole_sampler(own, slots, state.lengths, state.settings, state.token_ids, tokens)
            self._sampled[first:][rows] = tokens
            if counts:
                found = score_tokens(logprobs, tokens[: len(counts)], max(counts))
                scores.append(_Scores(found, counts, first + special.scored[part]))
        return scores

    def _copy_out(self, step: DeviceStep, scores: Sequence[_Scores], prompt_scores: Sequence[_Scores]) -> None:
        """Send tokens and log probabilities to the CPU beside whatever is launched next."""
        self._last_buffer = (self._last_buffer + 1) % len(self._results)
        count, target = len(step.sample_slots), self._results[self._last_buffer]
        if self._out_stream is not None:
            self._out_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._out_stream):
                target[:count].copy_(self._sampled[:count], non_blocking=True)
                scores, prompt_scores = _copies(scores), _copies(prompt_scores)
                self._copied[self._last_buffer].record()
        else:
            target[:count].copy_(self._sampled[:count])
        self._launched.append(_Launched(step, self._last_buffer, scores, prompt_scores))

    # ── the way to ready ────────────────────────────────────────────────────────────────────────────────────

    def _load(self, config: EngineConfig, model_dir: Path, context_len: int) -> None:
        dummy = config.load_format == "dummy"
        weights = DummyWeights(self._dtype, self._device) if dummy else Checkpoint(model_dir)

        def progress(fraction: float) -> None:
            self._reporter.phase("loading weights", fraction)

        self._model = Decoder(
            self._shard, weights, self._dtype, context_len, CudaOps(), progress, self._device, self._ranks.tp
        )
        self._log_phase("weights loaded")

    def _allocate_state(self, config: EngineConfig, context_len: int) -> None:
        part, vocab_size, device, tp = self._shard.part, self._shard.model.vocab_size, self._device, self._ranks.tp
        group = part.num_heads // part.num_kv_heads
        tokens, rows = tile_tokens(self._dtype, group), tile_rows(group)
        max_bs, steps = config.max_bs, config.steps_in_flight + 2
        self._max_decode = -(-max_bs // config.pp_size)  # rows: each microbatch has its share
        self._state = DeviceState(
            max_bs,
            context_len,
            config.page_size,
            tokens,
            rows,
            device,
            max_steps=steps,
            pieces=tp.pieces,
            has_all_logits=tp.size == 1,
        )
        self._sampler = CudaSampler(max_bs, part.vocab_size, device, self._shard.vocabulary.start, tp)
        self._whole_sampler = self._sampler if tp.size == 1 else CudaSampler(max_bs, vocab_size, device)
        self._most_special = min(max_bs, _SPECIAL_ROWS)
        self._rules = CudaRules(self._most_special, vocab_size, device)
        self._logits = torch.empty(self._max_decode, part.vocab_size, dtype=self._dtype, device=device)
        self._hidden = torch.zeros(self._max_decode, part.hidden_size, device=device)  # in and out of decode graphs
        self._sampled = torch.zeros(max_bs, dtype=torch.int32, device=device)
        self._max_bs, self._max_batched_tokens = max_bs, config.max_batched_tokens
        self._rehearsed = min(_REHEARSED if self._cuda else 2, config.max_batched_tokens, context_len - 1)
        self._results = [torch.zeros(max_bs, dtype=torch.int32, pin_memory=self._cuda) for _ in range(steps)]
        self._copied = [torch.cuda.Event() for _ in range(steps)] if self._cuda else []
        self._out_stream = torch.cuda.Stream() if self._cuda else None
        self._launched: deque[_Launched] = deque()

    def _attach(self, pool: KVPool) -> None:
        part = self._shard.part
        state, rope_table = self._state, self._model.rope_table
        setup = AttentionSetup(
            state.page_table, part.num_heads, self._max_bs, state.max_tiles, rope_table, part.rms_norm_eps
        )
        self._attention = cuda_attention(self._backends, pool, setup)

    @torch.inference_mode()
    def _size_pool(self, config: EngineConfig, context_len: int, free: int) -> int:
        """Pages of the KV pool, after the largest steps have shown what they need beside it."""
        part = self._shard.part
        if not self._cuda:
            return plan_pages_on_device(config, part, self._dtype, context_len, Budget(free, 0, 0))
        self._reporter.phase("measuring memory")
        budget = measure_on_device(free, self._largest_steps)
        graphs = 0 if config.enforce_eager else budget.reserved // 8 + len(ladder(self._max_decode)) * _GRAPH_BYTES
        self._log_phase("memory measured")
        budget = replace(budget, reserved=budget.reserved + graphs)
        return plan_pages_on_device(config, part, self._dtype, context_len, budget)

    def _largest_steps(self) -> None:
        self._pad_prefill(self._max_batched_tokens)
        self._forward(self._max_decode)
        if self._shard.is_last:
            self._sample(self._max_decode)
            self._sample_again(self._logits, self._all_special(), 0)

    def _pad_prefill(self, tokens: int) -> None:
        """A step of so many tokens, all of them padding: nothing is written or attended to."""
        padding = torch.full((tokens,), -1, dtype=torch.int32, device=self._device)
        zeros = torch.zeros_like(padding)
        none = torch.zeros(0, 5, dtype=torch.int32, device=self._device)
        chunks = Chunks(np.empty(0, np.int32), np.empty(0, np.int32), none, none)
        attends = [
            self._attention.extend(PrefillBatch(zeros[rows], padding[rows], none, chunks), piece)
            for piece, rows in enumerate(self._ranks.tp.pieces(tokens))
        ]
        shape = (tokens, self._shard.model.hidden_size)
        inputs = zeros if self._shard.is_first else torch.zeros(shape, device=self._device)
        hidden = self._model.forward(inputs, attends)
        if self._shard.is_last:
            logits = self._model.logits(hidden, zeros[: self._max_bs])
            self._sample_into(logits, padding[: self._max_bs], 0)

    def _all_special(self) -> SpecialRows:
        """As many padding rows as are sampled at once, whose log probabilities are wanted."""
        padding = torch.full((self._most_special,), -1, dtype=torch.int32, device=self._device)
        zeros, rows = torch.zeros_like(padding), np.zeros(self._most_special, np.int32)
        return SpecialRows(zeros, padding, zeros.long(), rows, [MAX_LOGPROBS] * self._most_special)

    @torch.inference_mode()
    def _capture(self) -> None:
        sample = self._sample if self._shard.is_last else None
        self._graphs = DecodeGraphs(ladder(self._max_decode), self._forward, sample, _phase(self._reporter))
        self._log_phase("graphs captured")

    @torch.inference_mode()
    def _warm_up(self, config: EngineConfig) -> None:
        """Compile and load what the first requests would otherwise wait for."""
        for tokens in self._prefill_sizes():
            self._pad_prefill(tokens)
        params = SamplingParams(top_k=2, top_p=0.5, min_p=0.1, seed=0, repetition_penalty=1.1, logprobs=1)
        rehearse(self, config, self._rehearsed, params)

    def _prefill_sizes(self) -> list[int]:
        """Tokens of prefills that load or compile kernels: a product's first use at a size waits for the device."""
        most = self._max_batched_tokens
        sizes = set(range(1, MAX_ROWS + 1))  # each has fused kernels of its own
        if self._cuda:
            sizes |= {1 << power for power in range(most.bit_length())}
            sizes |= {most - rows for rows in range(0, self._max_bs, _REHEARSED_EVERY)}  # full steps, beside decodes
        return sorted(size for size in sizes if 0 < size <= most)

    def _log_phase(self, what: str) -> None:
        log.info("%s: %.1f s after the start", what, time.monotonic() - self._started)


def _copies(scores: Sequence[_Scores]) -> list[_Scores]:
    """``scores`` on their way to pinned memory, in the current stream; the device's are kept until it is done."""
    for each in scores:
        each.scores.record_stream(torch.cuda.current_stream())
    return [replace(each, scores=each.scores.to("cpu", non_blocking=True)) for each in scores]


def _phase(reporter: Reporter) -> Callable[[float], None]:
    def progress(fraction: float) -> None:
        reporter.phase("capturing graphs", fraction)

    return progress
