"""What a CUDA worker remembers of each slot between steps: token ids, lengths, page tables, sampling settings.

All of it lives on the device and advances there. The CPU keeps only what follows from the plans it was given: how many
tokens each slot has, and whose sampling is special.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from radix_backend.attention.cuda import Chunks, DecodeBatch, PrefillBatch
from radix_backend.attention.cuda_decode import CASCADE_ROWS, DecodeTiles
from radix_backend.attention.cuda_extend import cut, tiles
from radix_backend.attention.shared_prefix import SharedPrefixes, shared_prefixes
from radix_backend.sampling.cuda import LOG_MIN_P, SEED_HIGH, SEED_LOW, SETTINGS, TEMPERATURE, TOP_K, TOP_P
from radix_backend.sampling.noise import seed_keys
from radix_backend.worker.cuda_deltas import NEW, apply_deltas, begin_decode
from radix_backend.worker.interface import Ints, NewRequest, StepPlan
from radix_backend.worker.prompt_scores import PromptScores, ScoredSpan
from radix_backend.worker.special_rows import SpecialRows, SpecialState
from radix_backend.worker.staging import Staging

_STAGING_WORDS = 1 << 20
_MIN_SHARED = 64  # tokens; a shorter prefix is not worth a tile


@dataclass(frozen=True)
class Prefill:
    positions: Tensor  # [tokens] int32
    slots: Tensor  # [tokens] int32
    pieces: list[PrefillBatch]  # of the tokens, one after the other
    sampled: Tensor  # [sampling chunks] int32: index of the token whose logits are sampled
    sample_slots: Tensor  # [sampling chunks] int32
    special: SpecialRows | None


@dataclass(frozen=True)
class DeviceStep:
    """A step as it was staged. Decode rows are `DeviceState.decode_slots`, padded with -1."""

    number: int
    num_decode: int
    prefill: Prefill | None
    sample_slots: Ints  # of decode rows, then of chunks
    sample_positions: npt.NDArray[np.int64]  # of the tokens that they sample
    order: npt.NDArray[np.int64]  # where among these the plan's sampling rows are
    special: SpecialRows | None  # of the decode rows
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
        self,
        max_bs: int,
        context_len: int,
        page_size: int,
        tile_tokens: int,
        tile_rows: int,
        device: torch.device,
        max_steps: int = 4,
        pieces: Callable[[int], list[slice]] = lambda tokens: [slice(0, tokens)],
        has_all_logits: bool = True,
    ) -> None:
        """``tile_tokens``: of the tiles that chunks are cut into for attention; ``tile_rows``: of those of decodes.
        ``max_steps``: in flight, and the one being staged. ``pieces``: of so many tokens of prefill, by default one.
        ``has_all_logits``: no other rank has a part of them."""
        self._page_size, self._tile_tokens, self._tile_rows = page_size, tile_tokens, tile_rows
        self._pieces = pieces
        self._staging = Staging(_STAGING_WORDS, device, max_steps)

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
        # What was staged for slots in the order of a plan, and in which order: microbatches take turns.
        self._arranged: dict[bytes, tuple[Ints, npt.NDArray[np.int64] | None]] = {}
        self._most_arranged = max_steps
        self._num_computed = np.zeros(max_bs, np.int64)
        self._prompt_len = np.zeros(max_bs, np.int64)
        self._special = SpecialState(max_bs, self._staging, device, filters=not has_all_logits)
        self._prompt_scores = PromptScores(max_bs)
        self._entered = np.full(max_bs, np.iinfo(np.int64).min)  # step with which the slot's request came

    def stage(self, plan: StepPlan, late: Sequence[tuple[DeviceStep, Tensor]] = ()) -> DeviceStep:
        """Queue the plan's deltas and what its rows need to know.

        ``late``: earlier steps with the tokens [sampling rows] int32 that another stage has sampled for them.
        """
        self._staging.begin()
        for request in plan.new:
            self._enter(request)
            self._entered[request.slot] = plan.step
        decode_rows, chunk_rows = np.split(np.arange(len(plan.slots)), [plan.num_decode])
        decode_rows = decode_rows[self._arrange(plan, plan.slots[decode_rows])]
        self._staging.put(self._rows.words)
        deltas = self._put_deltas(plan)
        rules = self._special.put_rules()
        cached = self._num_computed[plan.slots]
        self._num_computed[plan.slots] += plan.num_tokens
        special = self._put_special(plan.slots[decode_rows])
        prefill = self._put_prefill(plan, chunk_rows, cached[chunk_rows].astype(np.int32)) if len(chunk_rows) else None
        places = [self._put_places(earlier) for earlier, _ in late]
        self._staging.copy()
        for (slots, positions, rows), (_, tokens) in zip(places, late, strict=True):
            self.token_ids[slots, positions] = tokens[rows]
        if deltas is not None:
            apply_deltas(*deltas, self.token_ids, self.page_table, self.lengths, self.settings)
        for target, staged in rules:
            target.copy_(staged)
        sampled = np.concatenate([decode_rows, chunk_rows[plan.sample[chunk_rows]]])
        sample_slots = plan.slots[sampled]
        return DeviceStep(
            number=plan.step,
            num_decode=len(decode_rows),
            prefill=prefill,
            sample_slots=sample_slots,
            sample_positions=self._num_computed[sample_slots],
            order=np.argsort(sampled),
            special=special,
            scored=self._prompt_scores.spans(
                plan.slots[chunk_rows], cached[chunk_rows], plan.num_tokens[chunk_rows], self.token_ids
            ),
        )

    def _arrange(self, plan: StepPlan, slots: Ints) -> npt.NDArray[np.int64] | slice:
        """Put decode rows that share pages together; returns the order they got."""
        remapped = plan.page_index * self._page_size < self._num_computed[plan.page_slots]
        self._tables[plan.page_slots, plan.page_index] = plan.page_ids
        if plan.new or remapped.any() or len(self._arranged) >= self._most_arranged:
            self._arranged.clear()  # look for tiles again
        decodes = slots.tobytes()
        if decodes in self._arranged:
            self._rows.words[:], order = self._arranged[decodes]
        else:
            shared = None
            if len(slots) >= CASCADE_ROWS and self._tile_rows > 1:
                full = self._num_computed[slots] // self._page_size
                least = -(-_MIN_SHARED // self._page_size)
                shared = shared_prefixes(self._tables[slots], full, self._tile_rows, least)
            order = None if shared is None else shared.order
            self._rows.fill(slots, shared, self._tile_rows)
            self._arranged[decodes] = self._rows.words.copy(), order
        return slice(None) if order is None else order

    def begin_decode(self, rows: int) -> DecodeBatch:
        """Read what the first ``rows`` decode rows compute next, and advance them. Can be captured."""
        batch = self._decode
        begin_decode(batch, self.lengths, self.token_ids, rows, self._page_size)
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
        for piece in prefill.pieces:  # of a chunk in several the last one has its end
            self.lengths[piece.chunks.device_slots] = piece.chunks.device_lengths
        return self.token_ids[prefill.slots, prefill.positions]

    # ── what is staged ──────────────────────────────────────────────────────────────────────────────────────

    def _put_deltas(self, plan: StepPlan) -> tuple[Tensor, Tensor, Tensor] | None:
        if not plan.new and not len(plan.page_ids):
            return None
        news = np.zeros((len(plan.new), NEW), np.int32)
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
        positions = put(np.arange(ends[-1], dtype=np.int32) - np.repeat(firsts - cached, counts))
        by_token = put(np.repeat(slots, counts))
        pieces = []
        for tokens in self._pieces(int(ends[-1])):
            chosen, begins, num_tokens = cut(firsts, ends, tokens)
            before = cached[chosen] + begins - firsts[chosen]
            tile_list = tiles(begins - tokens.start, num_tokens, slots[chosen], before, self._tile_tokens)
            lengths = before + num_tokens
            chunks = Chunks(num_tokens, lengths, put(slots[chosen]), put(lengths))
            pieces.append(PrefillBatch(positions[tokens], by_token[tokens], put(tile_list), chunks))
        return Prefill(
            positions=positions,
            slots=by_token,
            pieces=pieces,
            sampled=put(ends[sample] - 1),
            sample_slots=put(slots[sample]),
            special=self._put_special(slots[sample]),
        )

    def _put_places(self, step: DeviceStep) -> Tensor:
        """[3, rows]: where the step's tokens belong and which they are, but for slots that have other requests now."""
        (rows,) = np.nonzero(self._entered[step.sample_slots] <= step.number)
        places = (step.sample_slots[rows], step.sample_positions[rows], rows)
        return self._staging.put(np.stack(places).astype(np.int32))

    def _put_special(self, slots: Ints) -> SpecialRows | None:
        """Of rows that sample a token for ``slots``; the step has advanced them."""
        return self._special.put(slots, self._num_computed[slots] - self._prompt_len[slots])

    def _enter(self, request: NewRequest) -> None:
        slot = request.slot
        self._num_computed[slot] = request.num_computed
        self._prompt_len[slot] = request.prompt_len
        self._special.enter(request)
        self._prompt_scores.enter(request)


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
