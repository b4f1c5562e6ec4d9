"""What a CUDA worker remembers of each slot between steps: token ids, lengths, page tables, sampling settings.

All of it lives on the device and advances there. The CPU keeps only what follows from the plans it was given: how many
tokens each slot has, and which stop tokens are to be masked.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_backend.attention.cuda import Chunks, DecodeBatch, PrefillBatch
from radix_backend.attention.cuda_decode import CASCADE_ROWS, DecodeTiles
from radix_backend.attention.cuda_extend import tiles
from radix_backend.attention.shared_prefix import SharedPrefixes, shared_prefixes
from radix_backend.sampling.cuda import LOG_MIN_P, SEED_HIGH, SEED_LOW, SETTINGS, TEMPERATURE, TOP_K, TOP_P
from radix_backend.sampling.logits_rules import LogitsRules, logits_rules
from radix_backend.sampling.noise import seed_keys
from radix_backend.worker.batch_state import ScoredSpan
from radix_backend.worker.interface import Ints, NewRequest, StepPlan
from radix_backend.worker.staging import Staging

_STAGING_WORDS = 1 << 20
_NEW = 4 + SETTINGS  # words of a new request: slot, its first token in the block, tokens, length, settings
_BLOCK = 1024
_MIN_SHARED = 64  # tokens; a shorter prefix is not worth a tile
_NONE = -1  # no log probabilities wanted


@dataclass(frozen=True)
class PromptScores:
    """A prompt whose tokens are to be scored."""

    tokens: Tensor  # [prompt] int64, on the CPU
    num_scored: int  # leading tokens that need no scores
    count: int  # of the likeliest tokens to report for each


@dataclass(frozen=True)
class Prefill:
    batch: PrefillBatch
    sampled: Tensor  # [sampling chunks] int32: index of the token whose logits are sampled
    sample_slots: Tensor  # [sampling chunks] int32


@dataclass(frozen=True)
class DeviceStep:
    """A step as it was staged. Decode rows are `DeviceState.decode_slots`, padded with -1."""

    num_decode: int
    prefill: Prefill | None
    sample_slots: Ints  # of decode rows, then of chunks
    sample_positions: npt.NDArray[np.int64]  # of the tokens that they sample
    order: npt.NDArray[np.int64]  # where among these the plan's sampling rows are
    scored: list[ScoredSpan]


class _DecodeRows:
    """Decode rows and what they share, as they are staged: one array of fixed size."""

    def __init__(self, max_bs: int, max_tiles: int) -> None:
        self.sizes = [max_bs, max_bs, max_bs, max_tiles, max_tiles, max_tiles]
        self.words = np.zeros(sum(self.sizes), np.int32)
        self._slots, self._skips, self._places, self._firsts, self._counts, self._ends = np.split(
            self.words, np.cumsum(self.sizes)[:-1]
        )
        self.fill(np.empty(0, np.int32), None, 1)

    def fill(self, slots: Ints, shared: SharedPrefixes | None, tile_rows: int) -> None:
        """``slots`` as in the plan; what is written is in the order of ``shared``."""
        self._slots[:] = -1
        self._skips[:] = 0
        self._places[:] = -1
        self._ends[:] = 0
        if shared is None:
            self._slots[: len(slots)] = slots
            return
        self._slots[: len(slots)] = slots[shared.order]
        tiles = len(shared.firsts)
        self._firsts[:tiles], self._counts[:tiles] = shared.firsts, shared.counts
        ends = np.cumsum(shared.pages)
        self._ends[:tiles], self._ends[tiles:] = ends, ends[-1]
        before = np.cumsum(shared.counts) - shared.counts
        member = np.arange(shared.counts.sum()) - np.repeat(before, shared.counts)
        rows = np.repeat(shared.firsts, shared.counts) + member
        self._skips[rows] = np.repeat(shared.pages, shared.counts)
        self._places[rows] = np.repeat(np.arange(tiles) * tile_rows, shared.counts) + member


class DeviceState:
    def __init__(
        self, max_bs: int, context_len: int, page_size: int, tile_tokens: int, tile_rows: int, device: torch.device
    ) -> None:
        """``tile_tokens``: of the tiles that chunks are cut into for attention; ``tile_rows``: of those of decodes."""
        self._page_size, self._tile_tokens, self._tile_rows = page_size, tile_tokens, tile_rows
        self._staging = Staging(_STAGING_WORDS, device)
        self._max_bs = max_bs

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        # One more than context_len: the token sampled after a prompt that fills it has a place.
        self.token_ids = zeros(max_bs, context_len + 1)
        self.page_table = zeros(max_bs, -(-(context_len + 1) // page_size))
        self.lengths = zeros(max_bs)  # tokens whose KV has been computed
        self.settings = zeros(max_bs, SETTINGS)
        self._staging.begin()
        # First in every block, so that they always lie at the same address: captured graphs read them there.
        self.max_tiles = max(max_bs // 2, 1)
        self._rows = _DecodeRows(max_bs, self.max_tiles)
        staged = self._staging.put(self._rows.words)
        self._staging.copy()
        self.decode_slots, skips, places, firsts, counts, ends = staged.split(self._rows.sizes)
        tiles = DecodeTiles(firsts, counts, ends, skips, places)
        self._decode = DecodeBatch(zeros(max_bs), zeros(max_bs), self.decode_slots, zeros(max_bs), zeros(max_bs), tiles)
        self._tables = np.zeros((max_bs, self.page_table.shape[1]), np.int32)  # the page table, on the CPU
        self._last_decodes: Ints | None = None  # slots in the order of the plan; None: look for tiles again
        self._last_order: npt.NDArray[np.int64] | None = None
        self._num_computed = np.zeros(max_bs, np.int64)
        self._prompt_len = np.zeros(max_bs, np.int64)
        self._rules: list[LogitsRules | None] = [None] * max_bs
        self._logprobs = np.full(max_bs, _NONE)
        self._special_until = np.zeros(max_bs, np.int64)  # outputs: before, it has rules or log probabilities
        self._prompts: list[PromptScores | None] = [None] * max_bs
        self._device = device

    def stage(self, plan: StepPlan) -> DeviceStep:
        """Queue the plan's deltas and what its rows need to know."""
        self._staging.begin()
        new_slots = np.array([request.slot for request in plan.new], np.int32)
        for request in plan.new:
            self._enter(request)
        # A request's first row may read pages that this step fills, though it be a single token: it is a chunk.
        decodes = plan.sample & (plan.num_tokens == 1) & ~np.isin(plan.slots, new_slots)
        decode_rows, chunk_rows = np.flatnonzero(decodes), np.flatnonzero(~decodes)
        decode_rows = decode_rows[self._arrange(plan, plan.slots[decode_rows])]
        self._staging.put(self._rows.words)
        deltas = self._put_deltas(plan)
        cached = self._num_computed[plan.slots]
        self._num_computed[plan.slots] += plan.num_tokens
        prefill = self._put_prefill(plan, chunk_rows, cached[chunk_rows].astype(np.int32)) if len(chunk_rows) else None
        self._staging.copy()
        if deltas is not None:
            self._apply(*deltas)
        sampled = np.concatenate([decode_rows, chunk_rows[plan.sample[chunk_rows]]])
        sample_slots = plan.slots[sampled]
        return DeviceStep(
            num_decode=len(decode_rows),
            prefill=prefill,
            sample_slots=sample_slots,
            sample_positions=self._num_computed[sample_slots],
            order=np.argsort(sampled),
            scored=self._scored_spans(plan, chunk_rows, cached),
        )

    def _arrange(self, plan: StepPlan, slots: Ints) -> npt.NDArray[np.int64] | slice:
        """Put decode rows that share pages together; returns the order they got."""
        remapped = plan.page_index * self._page_size < self._num_computed[plan.page_slots]
        self._tables[plan.page_slots, plan.page_index] = plan.page_ids
        if plan.new or remapped.any() or self._last_decodes is None or not np.array_equal(slots, self._last_decodes):
            shared = None
            if len(slots) >= CASCADE_ROWS and self._tile_rows > 1:
                full = self._num_computed[slots] // self._page_size
                least = -(-_MIN_SHARED // self._page_size)
                shared = shared_prefixes(self._tables[slots], full, self._tile_rows, least)
            self._last_order = None if shared is None else shared.order
            self._rows.fill(slots, shared, self._tile_rows)
            self._last_decodes = slots
        return slice(None) if self._last_order is None else self._last_order

    def is_special(self, slots: Ints) -> bool:
        """Whether a row needs more between its logits and its token than sampling settings say."""
        return bool((self._num_outputs(slots) < self._special_until[slots]).any())

    def rules(self, slots: Ints) -> list[tuple[int, LogitsRules]]:
        """Rows whose logits change before they are sampled."""
        counts = self._num_outputs(slots).tolist()
        theirs = ((row, self._rules[slot]) for row, slot in enumerate(slots.tolist()))
        return [(row, rules) for row, rules in theirs if rules is not None and counts[row] < rules.until]

    def _num_outputs(self, slots: Ints) -> npt.NDArray[np.int64]:
        """Before the token that the step samples."""
        return self._num_computed[slots] - self._prompt_len[slots]

    def apply_rules(self, rules: LogitsRules, logits: Tensor, slot: int, position: int) -> None:
        """Change ``logits`` [vocabulary] of the token at ``position``."""
        rules.apply(logits, self.token_ids[slot, :position], int(self._prompt_len[slot]))

    def logprob_counts(self, slots: Ints) -> list[int]:
        """[rows] how many of the likeliest tokens to report beside the sampled one; negative: nothing."""
        counts: list[int] = self._logprobs[slots].tolist()
        return counts

    def begin_decode(self, rows: int) -> DecodeBatch:
        """Read what the first ``rows`` decode rows compute next, and advance them. Can be captured."""
        batch = self._decode
        _begin_decode[(1,)](
            batch.slots,
            self.lengths,
            self.token_ids,
            self.token_ids.stride(0),
            batch.token_ids,
            batch.positions,
            batch.lengths,
            batch.page_ends,
            batch.tiles.skips,
            rows,
            ROWS_PAD=triton.next_power_of_2(self._max_bs),
            PAGE=self._page_size,
            num_warps=4,
        )
        return DecodeBatch(
            batch.token_ids[:rows],
            batch.positions[:rows],
            batch.slots[:rows],
            batch.lengths[:rows],
            batch.page_ends[:rows],
            batch.tiles,
        )

    def begin_prefill(self, prefill: Prefill) -> Tensor:
        """Advance the chunks; returns their token ids [tokens] int32."""
        chunks = prefill.batch.chunks
        self.lengths[chunks.device_slots] = chunks.device_lengths
        return self.token_ids[prefill.batch.slots, prefill.batch.positions]

    # ── what is staged ──────────────────────────────────────────────────────────────────────────────────────

    def _put_deltas(self, plan: StepPlan) -> tuple[Tensor, Tensor, Tensor] | None:
        if not plan.new and not len(plan.page_ids):
            return None
        news = np.zeros((len(plan.new), _NEW), np.int32)
        first = 0
        for row, request in zip(news, plan.new, strict=True):
            row[:4] = request.slot, first, len(request.token_ids), request.num_computed
            row[4:] = _settings(request)
            first += len(request.token_ids)
        tokens = np.concatenate([request.token_ids for request in plan.new]) if plan.new else np.empty(0, np.int32)
        pages = np.stack([plan.page_slots, plan.page_index, plan.page_ids])
        return self._staging.put(news), self._staging.put(tokens), self._staging.put(pages)

    def _put_prefill(self, plan: StepPlan, rows: npt.NDArray[np.int64], cached: Ints) -> Prefill:
        put = self._staging.put
        slots, counts, sample = plan.slots[rows], plan.num_tokens[rows], plan.sample[rows]
        ends = np.cumsum(counts, dtype=np.int32)
        firsts = ends - counts
        positions = np.arange(ends[-1], dtype=np.int32) - np.repeat(firsts - cached, counts)
        lengths = cached + counts
        batch = PrefillBatch(
            positions=put(positions),
            slots=put(np.repeat(slots, counts)),
            tiles=put(tiles(firsts, counts, slots, cached, self._tile_tokens)),
            chunks=Chunks(counts, lengths, put(slots), put(lengths)),
        )
        return Prefill(
            batch=batch,
            sampled=put(ends[sample] - 1),
            sample_slots=put(slots[sample]),
        )

    def _enter(self, request: NewRequest) -> None:
        slot, params = request.slot, request.params
        self._num_computed[slot] = request.num_computed
        self._prompt_len[slot] = request.prompt_len
        self._rules[slot] = logits_rules(params, request.stop_token_ids, request.bad_words, self._device)
        rules = self._rules[slot]
        until = 0 if rules is None else rules.until
        self._special_until[slot] = until if params.logprobs is None else sys.maxsize
        self._logprobs[slot] = _NONE if params.logprobs is None else params.logprobs
        self._prompts[slot] = None
        if params.prompt_logprobs is not None:
            prompt = torch.from_numpy(request.token_ids[: request.prompt_len].astype(np.int64))
            self._prompts[slot] = PromptScores(prompt, max(request.num_scored, 1), params.prompt_logprobs)

    def _scored_spans(
        self, plan: StepPlan, rows: npt.NDArray[np.int64], cached: npt.NDArray[np.int64]
    ) -> list[ScoredSpan]:
        spans, end = [], 0
        for row in rows.tolist():
            end += int(plan.num_tokens[row])
            prompt = self._prompts[plan.slots[row]]
            if prompt is None:
                continue
            after = int(cached[row]) + int(plan.num_tokens[row])
            first, last = max(int(cached[row]) + 1, prompt.num_scored), min(after + 1, len(prompt.tokens))
            if first < last:
                stop = end - (after + 1 - last)
                successors = prompt.tokens[first:last].to(self._device)
                spans.append(ScoredSpan(range(stop - len(successors), stop), successors, prompt.count))
        return spans

    def _apply(self, news: Tensor, tokens: Tensor, pages: Tensor) -> None:
        num_pages = pages.shape[1]
        _apply[(len(news) + triton.cdiv(num_pages, _BLOCK),)](
            news,
            tokens,
            pages,
            len(news),
            num_pages,
            self.token_ids,
            self.token_ids.stride(0),
            self.page_table,
            self.page_table.stride(0),
            self.lengths,
            self.settings,
            NEW=_NEW,
            SETTINGS=SETTINGS,
            BLOCK=_BLOCK,
            num_warps=4,
        )


def _settings(request: NewRequest) -> Ints:
    params = request.params
    row = np.zeros(SETTINGS, np.int32)
    with np.errstate(divide="ignore"):
        floats = np.array([params.temperature, params.top_p, params.min_p], np.float32)
        floats[2] = np.log(floats[2])
    row[[TEMPERATURE, TOP_P, LOG_MIN_P]] = floats.view(np.int32)
    row[TOP_K] = max(params.top_k, 0)
    row[[SEED_LOW, SEED_HIGH]] = seed_keys(np.array([params.seed or 0])).view(np.int32)
    return row


@triton.jit(do_not_specialize=["num_new", "num_pages"])
def _apply(
    news,
    tokens,
    pages,
    num_new,
    num_pages,
    token_ids,
    token_ids_stride,
    page_table,
    page_table_stride,
    lengths,
    settings,
    NEW: tl.constexpr,
    SETTINGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if program < num_new:
        new = news + program * NEW
        slot, first, count = tl.load(new).to(tl.int64), tl.load(new + 1), tl.load(new + 2)
        tl.store(lengths + slot, tl.load(new + 3))
        setting = tl.arange(0, SETTINGS)
        tl.store(settings + slot * SETTINGS + setting, tl.load(new + 4 + setting))
        for start in range(0, count, BLOCK):
            token = tl.load(tokens + first + start + i, mask=start + i < count)
            tl.store(token_ids + slot * token_ids_stride + start + i, token, mask=start + i < count)
    else:
        write = (program - num_new) * BLOCK + i
        there = write < num_pages
        of = tl.load(pages + write, mask=there, other=0).to(tl.int64)
        index = tl.load(pages + num_pages + write, mask=there, other=0)
        page = tl.load(pages + 2 * num_pages + write, mask=there, other=0)
        tl.store(page_table + of * page_table_stride + index, page, mask=there)


@triton.jit(do_not_specialize=["rows"])
def _begin_decode(
    slots,
    lengths,
    token_ids,
    token_ids_stride,
    row_tokens,
    row_positions,
    row_lengths,
    page_ends,
    skips,
    rows,
    ROWS_PAD: tl.constexpr,
    PAGE: tl.constexpr,
):
    row = tl.arange(0, ROWS_PAD)
    there = row < rows
    slot = tl.load(slots + row, mask=there, other=-1)
    live = slot >= 0
    position = tl.load(lengths + slot, mask=live, other=0)
    token = tl.load(token_ids + slot.to(tl.int64) * token_ids_stride + position, mask=live, other=0)
    tl.store(row_tokens + row, token, mask=there)
    tl.store(row_positions + row, position, mask=there)
    tl.store(row_lengths + row, tl.where(live, position + 1, 0), mask=there)
    pages = tl.where(live, (position + PAGE) // PAGE - tl.load(skips + row, mask=live, other=0), 0)
    tl.store(page_ends + row, tl.cumsum(pages, axis=0), mask=there)
    tl.store(lengths + slot, position + 1, mask=live)
