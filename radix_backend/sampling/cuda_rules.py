"""`LogitsRules` in Triton language: nothing is read back, and only logits that change are touched.

Penalties need to know how often each token has occurred. They are counted anew in every step, in a table that is all
zeros before and after: each token of the request adds to its entry, then each takes what it finds there and leaves
zero, so that one of several equal tokens applies the penalty for all. That costs two passes over the request's tokens,
where counts kept from step to step would cost a vocabulary (600 KB) for every request with penalties, and one more
thing to be right after a retraction.

Importing this module raises ImportError where the triton package is missing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from radix_backend.sampling.logits_rules import LogitsRules

_BLOCK = 1024
_LARGEST = 2**31 - 1


def pack_rules(rules: LogitsRules, prompt_len: int) -> npt.NDArray[np.int32]:
    """A request's rules as `CudaRules` reads them: a header of eight words, then the lists that it gives the sizes of.

    Biased tokens, their biases (f32), stop tokens, the end of each bad word among all their tokens, these tokens.
    """
    penalties = np.array([rules.repetition, rules.presence, rules.frequency], np.float32).view(np.int32)
    sizes = [len(rules.bias), len(rules.stops), len(rules.bad_words)]
    parts = [
        [prompt_len, min(rules.min_tokens, _LARGEST)],
        penalties,
        sizes,
        list(rules.bias),
        np.array(list(rules.bias.values()), np.float32).view(np.int32),
        rules.stops,
        np.cumsum([len(word) for word in rules.bad_words]),
        [token for word in rules.bad_words for token in word],
    ]
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


class CudaRules:
    """Applies rules to up to ``max_rows`` rows at once."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._counts = torch.zeros(max_rows, vocab_size, dtype=torch.int32, device=device)

    def __call__(self, logits: Tensor, slots: Tensor, rules: Tensor, lengths: Tensor, token_ids: Tensor) -> None:
        """Change ``logits`` [rows, vocabulary] f32 of the tokens that come next in ``slots`` [rows] int32.

        ``rules`` [rows] int64: addresses of `pack_rules` on the device; 0: none. ``lengths`` [slots] int32: of each
        slot's tokens, in ``token_ids`` [slots, positions] int32.
        """
        _change[(len(logits),)](
            logits,
            slots,
            rules,
            lengths,
            token_ids,
            token_ids.stride(0),
            self._counts,
            logits.shape[1],
            BLOCK=_BLOCK,
            num_warps=8,
            enable_fp_fusion=False,  # rounded as on a CPU
        )


@triton.jit(do_not_specialize_on_alignment=["slots", "rules"])
def _change(logits, slots, rules, lengths, token_ids, token_ids_stride, counts, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    address = tl.load(rules + row)
    if address != 0:
        words = address.to(tl.pointer_type(tl.int32))
        slot = tl.load(slots + row).to(tl.int64)
        length = tl.load(lengths + slot)
        logits += row * vocab
        counts += row * vocab
        tokens = token_ids + slot * token_ids_stride
        prompt_len, min_tokens = tl.load(words), tl.load(words + 1)
        repetition = tl.load(words + 2).to(tl.float32, bitcast=True)
        presence = tl.load(words + 3).to(tl.float32, bitcast=True)
        frequency = tl.load(words + 4).to(tl.float32, bitcast=True)
        num_biases, num_stops, num_words = tl.load(words + 5), tl.load(words + 6), tl.load(words + 7)
        biased = words + 8
        stops = biased + 2 * num_biases
        ends = stops + num_stops
        _add_biases(logits, biased, num_biases, BLOCK)
        tl.debug_barrier()  # what one thread writes, another reads
        if length - prompt_len < min_tokens:
            _exclude(logits, stops, num_stops, BLOCK)
        _exclude_bad_words(logits, ends, num_words, tokens, prompt_len, length, BLOCK)
        tl.debug_barrier()
        if (repetition != 1) | (presence != 0) | (frequency != 0):
            first = tl.where(repetition != 1, 0, prompt_len)
            _count(counts, tokens, first, prompt_len, length, BLOCK)
            tl.debug_barrier()
            _penalize(logits, counts, tokens, first, length, repetition, presence, frequency, BLOCK)


@triton.jit
def _add_biases(logits, biased, count, BLOCK: tl.constexpr):
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        token = tl.load(biased + i, mask=i < count, other=0)
        bias = tl.load(biased + count + i, mask=i < count, other=0).to(tl.float32, bitcast=True)
        tl.store(logits + token, tl.load(logits + token, mask=i < count) + bias, mask=i < count)


@triton.jit
def _exclude(logits, excluded, count, BLOCK: tl.constexpr):
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        token = tl.load(excluded + i, mask=i < count, other=0)
        tl.store(logits + token, float("-inf"), mask=i < count)


@triton.jit
def _exclude_bad_words(logits, ends, count, tokens, prompt_len, length, BLOCK: tl.constexpr):
    """The last token of each word whose other tokens are the latest outputs."""
    spelling = ends + count
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        there = i < count
        last = tl.load(ends + i, mask=there, other=1) - 1
        begin = tl.load(ends + i - 1, mask=there & (i > 0), other=0)
        said = there
        for back in range(1, tl.max(tl.where(there, last - begin, 0), axis=0) + 1):
            inside = there & (last - back >= begin)
            wanted = tl.load(spelling + last - back, mask=inside, other=0)
            output = length - back >= prompt_len
            latest = tl.load(tokens + length - back, mask=output, other=0)
            said = said & ((~inside) | ((wanted == latest) & output))
        tl.store(logits + tl.load(spelling + last, mask=there, other=0), float("-inf"), mask=said)


@triton.jit
def _count(counts, tokens, first, prompt_len, length, BLOCK: tl.constexpr):
    """Of each token from ``first`` on: bit 30 if the prompt holds it, plus how many outputs are it."""
    for start in range(first, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        token = tl.load(tokens + i, mask=i < length, other=0)
        tl.atomic_or(counts + token, 1073741824, mask=i < tl.minimum(prompt_len, length), sem="relaxed")
        tl.atomic_add(counts + token, 1, mask=(i >= prompt_len) & (i < length), sem="relaxed")


@triton.jit
def _penalize(logits, counts, tokens, first, length, repetition, presence, frequency, BLOCK: tl.constexpr):
    for start in range(first, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        token = tl.load(tokens + i, mask=i < length, other=0)
        count = tl.atomic_xchg(counts + token, 0, mask=i < length, sem="relaxed")
        mine = (i < length) & (count != 0)
        x = tl.load(logits + token, mask=mine, other=0)
        x = tl.where(x > 0, tl.div_rn(x, repetition + tl.zeros_like(x)), x * repetition)
        outputs = count & 1073741823
        x = tl.where(outputs > 0, x - (frequency * outputs.to(tl.float32) + presence), x)
        tl.store(logits + token, x, mask=mine)
