"""The sampler in Triton language: the same tokens as `torch_native.sample` draws, with nothing read back.

The noise is evaluated in f32 for all tokens, which is right to about 1e-4, and again as `noise` defines it for the
blocks of tokens that could still win: one block, nearly always. So the winner is exact at the price of f32.

top_k, min_p and top_p become one threshold a row, found by bisection over the bits of the logits, not by sorting. The
mass of top_p is summed in f32: a token whose cumulative probability is within 1e-5 of top_p may count either way.

Importing this module raises ImportError where the triton package is missing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_backend.layers.tensor_parallel import ALONE, TensorParallel

_BLOCK = 2048  # tokens

# Columns of a slot's sampling settings, int32; the f32 among them as their bits.
TEMPERATURE, TOP_K, TOP_P, LOG_MIN_P, SEED_LOW, SEED_HIGH = range(6)
SETTINGS = 8


class CudaSampler:
    """Samples for up to ``max_rows`` rows; runs in a CUDA graph."""

    def __init__(
        self, max_rows: int, vocab_size: int, device: torch.device, first: int = 0, tp: TensorParallel = ALONE
    ) -> None:
        """With several ranks: the vocabulary is this one's, of the tokens from ``first`` on, and nothing filters."""
        self._first, self._tp = first, tp
        self._blocks = triton.cdiv(vocab_size, _BLOCK)
        self._highest = torch.empty(max_rows, self._blocks, dtype=torch.float32, device=device)
        self._thresholds = torch.full((max_rows,), -torch.inf, dtype=torch.float32, device=device)

    def __call__(
        self, logits: Tensor, slots: Tensor, lengths: Tensor, settings: Tensor, token_ids: Tensor, out: Tensor
    ) -> None:
        """Sample a token for each row of ``logits`` [rows, vocabulary] into ``out`` [rows] and the row's slot.

        ``slots`` [rows] int32: a row whose slot is -1 is left alone. ``lengths`` [slots] int32: the token's position,
        where it is put into ``token_ids`` [slots, positions] int32. ``settings`` [slots, SETTINGS] int32.
        """
        rows, vocab = logits.shape
        if not rows:
            return
        alone = self._tp.size == 1
        if alone:
            _threshold[(rows,)](
                logits, slots, settings, self._thresholds, vocab, SETTINGS=SETTINGS, BLOCK=4096, num_warps=16
            )
        candidates = torch.empty(2, rows, dtype=torch.int32, device=logits.device)  # scores' bits, tokens
        _score_blocks[(rows, self._blocks)](
            logits,
            slots,
            lengths,
            settings,
            self._thresholds,
            self._highest,
            vocab,
            self._blocks,
            self._first,
            SETTINGS=SETTINGS,
            BLOCK=_BLOCK,
            num_warps=4,
        )
        _select[(rows,)](
            logits,
            slots,
            lengths,
            settings,
            self._thresholds,
            self._highest,
            token_ids,
            token_ids.stride(0),
            out,
            candidates,
            vocab,
            self._blocks,
            self._first,
            ALONE=alone,
            SETTINGS=SETTINGS,
            BLOCK=_BLOCK,
            BLOCKS_PAD=triton.next_power_of_2(self._blocks),
            num_warps=4,
        )
        if not alone:
            every = self._tp.all_gather(candidates)
            _elect[(rows,)](
                every, slots, lengths, token_ids, token_ids.stride(0), out, rows, RANKS=self._tp.size, num_warps=1
            )


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _fmix32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _row_key(row_settings, position):
    """`noise.row_keys`; the seed's part is mixed already."""
    low = tl.load(row_settings + 4).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(row_settings + 5).to(tl.uint32, bitcast=True).to(tl.uint64)
    return _mix64(((high << 32) | low) + position.to(tl.uint64) * 0xD1342543DE82EF95)


@triton.jit
def _hash32(key, token):
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    return _fmix32(_fmix32(token.to(tl.uint32) ^ low) ^ high)


@triton.jit
def _rough_noise(hashed):
    """`noise.gumbel` to about 1e-4. Near 0 and near 1 the uniform's distance from them is what must be exact."""
    u = (hashed.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((hashed ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    exponential = tl.where(u < 0.0078125, u * (1.0 + u * (0.5 + u * 0.33333333)), -tl.log(rest))
    return -tl.log(exponential)


@triton.jit
def _noise(hashed):
    """`noise.gumbel`: 1 - u is exact in f64, so that its logarithm is -E to the last bit or so."""
    rest = ((hashed ^ 0xFFFFFFFF).to(tl.float64) + 0.5) * 2.3283064365386962890625e-10
    return (-tl.log(-tl.log(rest))).to(tl.float32)


@triton.jit
def _scaled(logits, token, mask, temperature):
    x = tl.load(logits + token, mask=mask, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, tl.where(temperature > 0, temperature, 1.0) + tl.zeros_like(x))


@triton.jit
def _ordered(x):
    """An integer that orders as the f32 does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _mass(logits, vocab, temperature, highest, threshold, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Of the tokens whose `_ordered` is at least ``threshold``: how many, or the sum of exp(logit - highest)."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = _scaled(logits, token, token < vocab, temperature)
        inside = (_ordered(x) >= threshold) & (token < vocab)
        total += tl.where(inside, 1.0 if COUNT else tl.exp(x - highest), 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _bisect(logits, vocab, temperature, highest, low, target, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The highest threshold from ``low`` on above which `_mass` is at least ``target``."""
    least = low.to(tl.int64)
    most = _ordered(highest).to(tl.int64)
    while least < most:
        middle = (least + most + 1) >> 1
        if _mass(logits, vocab, temperature, highest, middle.to(tl.int32), COUNT, BLOCK) >= target:
            least = middle
        else:
            most = middle - 1
    return least.to(tl.int32)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _threshold(logits, slots, settings, thresholds, vocab, SETTINGS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot >= 0:
        logits += row.to(tl.int64) * vocab
        row_settings = settings + slot * SETTINGS
        temperature = tl.load(row_settings).to(tl.float32, bitcast=True)
        top_k = tl.load(row_settings + 1)
        top_p = tl.load(row_settings + 2).to(tl.float32, bitcast=True)
        log_min_p = tl.load(row_settings + 3).to(tl.float32, bitcast=True)
        limited = (top_k > 0) & (top_k < vocab)
        threshold = tl.full((), float("-inf"), tl.float32)
        if (temperature > 0) & (limited | (top_p < 1) | (log_min_p > float("-inf"))):
            best = tl.full([BLOCK], float("-inf"), tl.float32)
            for start in range(0, vocab, BLOCK):
                token = start + tl.arange(0, BLOCK)
                best = tl.maximum(best, _scaled(logits, token, token < vocab, temperature))
            highest = tl.max(best, axis=0)
            ordered = _ordered(highest + log_min_p)
            if limited:
                ordered = tl.maximum(
                    ordered, _bisect(logits, vocab, temperature, highest, ordered, top_k.to(tl.float32), True, BLOCK)
                )
            if top_p < 1:
                mass = top_p * _mass(logits, vocab, temperature, highest, ordered, False, BLOCK)
                ordered = _bisect(logits, vocab, temperature, highest, ordered, mass, False, BLOCK)
            threshold = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(thresholds + row, threshold)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["slots"])
def _score_blocks(
    logits,
    slots,
    lengths,
    settings,
    thresholds,
    highest,
    vocab,
    blocks,
    first,
    SETTINGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, block = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    if slot >= 0:
        row_settings = settings + slot * SETTINGS
        temperature = tl.load(row_settings).to(tl.float32, bitcast=True)
        token = block * BLOCK + tl.arange(0, BLOCK)
        x = _scaled(logits + row.to(tl.int64) * vocab, token, token < vocab, temperature)
        if temperature > 0:
            hashed = _hash32(_row_key(row_settings, tl.load(lengths + slot)), first + token)
            x = tl.where(x >= tl.load(thresholds + row), x + _rough_noise(hashed), float("-inf"))
        tl.store(highest + row * blocks + block, tl.max(x, axis=0))


# `out` starts anywhere in a step's tokens: one compilation for all alignments.
@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["out", "slots"])
def _select(
    logits,
    slots,
    lengths,
    settings,
    thresholds,
    highest,
    token_ids,
    token_ids_stride,
    out,
    candidates,
    vocab,
    blocks,
    first,
    ALONE: tl.constexpr,
    SETTINGS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot >= 0:
        row_settings = settings + slot * SETTINGS
        temperature = tl.load(row_settings).to(tl.float32, bitcast=True)
        position = tl.load(lengths + slot)
        key = _row_key(row_settings, position)
        threshold = tl.load(thresholds + row)
        every = tl.arange(0, BLOCKS_PAD)
        scores = tl.load(highest + row * blocks + every, mask=every < blocks, other=float("-inf"))
        top = tl.max(scores, axis=0)
        # More than the error of `_rough_noise` and of a sum in f32; the greedy score has no error.
        slack = tl.where(temperature > 0, 1e-3 + tl.abs(top) * 2.4e-7, 0.0)
        hopeful = (scores >= top - slack) & (every < blocks)
        best = tl.full((), float("-inf"), tl.float32)
        winner = tl.full((), 0, tl.int32)
        block = tl.min(tl.where(hopeful, every, BLOCKS_PAD), axis=0)
        while block < BLOCKS_PAD:
            token = block * BLOCK + tl.arange(0, BLOCK)
            x = _scaled(logits + row.to(tl.int64) * vocab, token, token < vocab, temperature)
            if temperature > 0:
                x = tl.where(x >= threshold, x + _noise(_hash32(key, first + token)), float("-inf"))
            score = tl.max(x, axis=0)
            if score > best:
                best = score
                winner = tl.min(tl.where(x == score, token, 2147483647), axis=0)
            block = tl.min(tl.where(hopeful & (every > block), every, BLOCKS_PAD), axis=0)
        if ALONE:
            tl.store(out + row, winner)
            tl.store(token_ids + slot.to(tl.int64) * token_ids_stride + position, winner)
        else:
            tl.store(candidates + row, best.to(tl.int32, bitcast=True))
            tl.store(candidates + tl.num_programs(0) + row, first + winner)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["out", "slots"])
def _elect(candidates, slots, lengths, token_ids, token_ids_stride, out, rows, RANKS: tl.constexpr):
    """``candidates`` [ranks, 2, rows]: what `_select` found on each rank. The highest score wins, the first of several,
    which has the least token."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot >= 0:
        best = tl.load(candidates + row).to(tl.float32, bitcast=True)
        winner = tl.load(candidates + rows + row)
        for rank in tl.static_range(1, RANKS):
            score = tl.load(candidates + 2 * rank * rows + row).to(tl.float32, bitcast=True)
            if score > best:
                best = score
                winner = tl.load(candidates + (2 * rank + 1) * rows + row)
        tl.store(out + row, winner)
        tl.store(token_ids + slot.to(tl.int64) * token_ids_stride + tl.load(lengths + slot), winner)
