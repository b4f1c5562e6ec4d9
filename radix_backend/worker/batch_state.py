"""What the worker remembers of each slot between steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from radix_backend.attention.base import AttentionStep, DecodeRows, PrefillChunk
from radix_backend.sampling.base import SamplingRows
from radix_backend.sampling.logits_rules import LogitsRules, logits_rules
from radix_backend.sampling.noise import row_keys
from radix_backend.worker.interface import NewRequest, StepPlan
from radix_backend.worker.prompt_scores import PromptScores, ScoredSpan

_NONE = -1  # no log probabilities wanted


@dataclass(frozen=True)
class StepInput:
    """One step, ready for the model."""

    number: int
    token_ids: Tensor  # [tokens] int32
    positions: Tensor  # [tokens] int32
    attention: AttentionStep
    sampled: Tensor  # [sampling rows] int64: index of the token whose logits are sampled
    sample_slots: npt.NDArray[np.int32]  # [sampling rows]
    sample_positions: npt.NDArray[np.int64]  # [sampling rows]: of the token that is sampled
    scored: list[ScoredSpan]


class BatchState:
    """Columns indexed by slot.

    Lengths are the CPU's: how far a step advances a request is known when it is planned. Only token ids depend on
    what was sampled, and they stay where the model reads them: with page tables, on its ``device``.
    """

    def __init__(self, max_bs: int, context_len: int, page_size: int, device: str = "cpu") -> None:
        # One more than context_len: the token sampled after a prompt that fills it has a place.
        self.token_ids = torch.zeros(max_bs, context_len + 1, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(max_bs, -(-(context_len + 1) // page_size), dtype=torch.int32, device=device)
        self._num_computed = np.zeros(max_bs, np.int64)
        self._prompt_len = np.zeros(max_bs, np.int64)
        self._seeds = np.zeros(max_bs, np.int64)
        self._temperature = np.zeros(max_bs, np.float32)
        self._top_k = np.zeros(max_bs, np.int32)
        self._top_p = np.ones(max_bs, np.float32)
        self._min_p = np.zeros(max_bs, np.float32)
        self._rules: list[LogitsRules | None] = [None] * max_bs
        self._logprobs = np.full(max_bs, _NONE)
        self._prompt_scores = PromptScores(max_bs)
        self._entered = np.full(max_bs, np.iinfo(np.int64).min)  # step with which the slot's request came

    def apply(self, plan: StepPlan) -> StepInput:
        """Take the plan's deltas and advance its rows."""
        for request in plan.new:
            self._enter(request)
            self._entered[request.slot] = plan.step
        self.page_table[self._move(plan.page_slots), self._move(plan.page_index)] = self._move(plan.page_ids)
        return self._advance(plan)

    def _move(self, column: npt.NDArray[Any]) -> Tensor:
        """To the device."""
        return torch.from_numpy(column).to(self.token_ids.device)

    def _enter(self, request: NewRequest) -> None:
        slot, params = request.slot, request.params
        self.token_ids[slot, : len(request.token_ids)] = torch.tensor(request.token_ids, dtype=torch.int32)
        self._num_computed[slot] = request.num_computed
        self._prompt_len[slot] = request.prompt_len
        self._seeds[slot] = params.seed or 0
        self._temperature[slot] = params.temperature
        self._top_k[slot] = max(params.top_k, 0)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._rules[slot] = logits_rules(params, request.stop_token_ids, request.bad_words, self.token_ids.device)
        self._logprobs[slot] = _NONE if params.logprobs is None else params.logprobs
        self._prompt_scores.enter(request)

    def _advance(self, plan: StepPlan) -> StepInput:
        slots, counts = plan.slots, plan.num_tokens
        cached = self._num_computed[slots]
        self._num_computed[slots] = cached + counts
        ends = np.cumsum(counts)
        token_slots = np.repeat(slots, counts)
        positions = np.arange(len(token_slots)) - np.repeat(ends - counts - cached, counts)
        slot_index, position_index = self._move(token_slots), self._move(positions)
        sample_slots = slots[plan.sample]
        return StepInput(
            number=plan.step,
            token_ids=self.token_ids[slot_index, position_index],
            positions=position_index.int(),
            attention=AttentionStep(
                self.page_table, slot_index, position_index.int(), _sub_batches(plan, cached, ends - counts)
            ),
            sampled=self._move(ends[plan.sample] - 1),
            sample_slots=sample_slots,
            sample_positions=self._num_computed[sample_slots],
            scored=self._prompt_scores.spans(slots, cached, counts, self.token_ids),
        )

    def sampling_rows(self, step: StepInput) -> SamplingRows:
        slots = step.sample_slots
        return SamplingRows(
            temperature=self._temperature[slots],
            top_k=self._top_k[slots],
            top_p=self._top_p[slots],
            min_p=self._min_p[slots],
            keys=row_keys(self._seeds[slots], step.sample_positions),
        )

    def logprob_counts(self, step: StepInput) -> npt.NDArray[np.int64]:
        """[sampling rows] how many of the likeliest tokens to report beside the sampled one; negative: nothing."""
        return self._logprobs[step.sample_slots]

    def ruled(self, step: StepInput) -> npt.NDArray[np.bool_]:
        """[sampling rows] whether a row has `LogitsRules`."""
        return np.array([self._rules[slot] is not None for slot in step.sample_slots.tolist()], np.bool_)

    def apply_rules(self, step: StepInput, rows: npt.NDArray[np.int64], logits: Tensor) -> Tensor:
        """Apply the `LogitsRules` of these sampling rows. Returns ``logits`` [rows, vocabulary], in f32 if bf16 would
        round what they change."""
        slots, positions = step.sample_slots[rows].tolist(), step.sample_positions[rows].tolist()
        ruled = [(row, slot, self._rules[slot]) for row, slot in enumerate(slots)]
        active = [(row, slot, rules) for row, slot, rules in ruled if rules is not None]
        if any(rules.shifts for _, _, rules in active):
            logits = logits.float()
        for row, slot, rules in active:
            rules.apply(logits[row], self.token_ids[slot, : positions[row]], int(self._prompt_len[slot]))
        return logits

    def append(self, step: StepInput, tokens: Tensor) -> None:
        """Put the sampled ``tokens`` [sampling rows] where the next step reads them.

        They may come when later steps have been applied: a slot that has another request by then is left alone.
        """
        (same,) = np.nonzero(self._entered[step.sample_slots] <= step.number)
        slots, positions = self._move(step.sample_slots[same]), self._move(step.sample_positions[same])
        self.token_ids[slots, positions] = tokens[self._move(same)].int()


def _sub_batches(
    plan: StepPlan, cached: npt.NDArray[np.int64], firsts: npt.NDArray[np.int64]
) -> list[DecodeRows | PrefillChunk]:
    decodes = plan.num_decode
    batches: list[DecodeRows | PrefillChunk] = []
    if decodes:
        lengths = torch.from_numpy((cached[:decodes] + 1).astype(np.int32))
        batches.append(DecodeRows(0, torch.from_numpy(plan.slots[:decodes].copy()), lengths))
    for row in range(decodes, len(plan.slots)):
        num_tokens, slot = int(plan.num_tokens[row]), int(plan.slots[row])
        batches.append(PrefillChunk(int(firsts[row]), num_tokens, slot, int(cached[row])))
    return batches
