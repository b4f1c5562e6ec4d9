import dataclasses

import pytest
import torch

from radix_backend.attention.base import AttentionStep, DecodeRows, PrefillChunk
from radix_backend.attention.kv_pool import KVPool, page_bytes
from radix_backend.attention.torch_native import TorchNative, compile_decode
from radix_backend.loading import read_model_config
from tests.models.tiny import save_tiny

LENGTH, SLOTS, LAYERS = 150, 4, 2


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    return read_model_config(save_tiny(tmp_path_factory.mktemp("tiny")))


class Setup:
    """Random q, k, v for a few requests, their pages scattered over the pool, and what attention must give."""

    def __init__(self, shape, kv_heads, groups, head_dim, page_size, dtype, compiled):
        self.page_size, self.groups = page_size, groups
        pages = -(-LENGTH // page_size)
        model = dataclasses.replace(shape, num_layers=LAYERS, num_kv_heads=kv_heads, head_dim=head_dim)
        pool = KVPool(model, SLOTS * pages, page_size, dtype)
        for layer in range(LAYERS):
            for part in pool.layer(layer):
                part.fill_(torch.nan)  # what nobody wrote must not be read
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randperm(SLOTS * pages, generator=generator).int().view(SLOTS, pages)
        self.backend = TorchNative(pool, compile_decode(pool, kv_heads * groups) if compiled else None)
        width = kv_heads * (groups + 2)
        # Views into one buffer, as a fused projection gives them.
        self.qkv = torch.randn(LAYERS, SLOTS, LENGTH, width, head_dim, generator=generator).to(dtype)
        self.split = [kv_heads * groups, kv_heads, kv_heads]

    def run(self, *sub_batches, layer=1):
        """The output rows of one step, per sub-batch: (slot, cached, tokens), or a list of (slot, cached) decodes."""
        batches, slots, positions, first = [], [], [], 0
        for batch in sub_batches:
            if isinstance(batch, list):
                lengths = torch.tensor([cached + 1 for _, cached in batch], dtype=torch.int32)
                batches.append(DecodeRows(first, torch.tensor([s for s, _ in batch], dtype=torch.int32), lengths))
                slots += [slot for slot, _ in batch]
                positions += [cached for _, cached in batch]
                first += len(batch)
            else:
                slot, cached, tokens = batch
                batches.append(PrefillChunk(first, tokens, slot, cached))
                slots += [slot] * tokens
                positions += range(cached, cached + tokens)
                first += tokens
        slots, positions = (torch.tensor(values, dtype=torch.int32) for values in (slots, positions))
        plan = self.backend.plan(AttentionStep(self.table, slots, positions, batches))
        q, k, v = self.qkv[layer, slots.long(), positions.long()].split(self.split, dim=1)
        return self.backend.attend(plan, layer, q, k, v)

    def expected(self, slot, positions, layer=1):
        q, k, v = (x.float() for x in self.qkv[layer, slot].split(self.split, dim=1))
        k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        scores.masked_fill_(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)[positions].flatten(1)


HEADS = [(2, 3, 64), (1, 8, 128), (3, 1, 24)]
variants = pytest.mark.parametrize(
    ("heads", "page_size", "dtype", "compiled"),
    [(heads, size, torch.float32, compiled) for heads in HEADS for size in (1, 7, 16) for compiled in (True, False)]
    + [(HEADS[0], 16, torch.bfloat16, compiled) for compiled in (True, False)],
)


def check(actual, expected):
    tolerance = 1e-5 if actual.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


@variants
def test_chunks_then_decodes_equal_full_attention(shape, heads, page_size, dtype, compiled):
    setup = Setup(shape, *heads, page_size, dtype, compiled)
    check(setup.run((2, 0, 100)), setup.expected(2, range(100)))
    check(setup.run((2, 100, 3)), setup.expected(2, range(100, 103)))
    check(setup.run((2, 103, 40)), setup.expected(2, range(103, 143)))
    for position in range(143, LENGTH):
        check(setup.run([(2, position)]), setup.expected(2, [position]))


@variants
def test_rows_of_a_mixed_step_do_not_disturb_each_other(shape, heads, page_size, dtype, compiled):
    setup = Setup(shape, *heads, page_size, dtype, compiled)
    setup.run((0, 0, 90))
    setup.run((3, 0, 5))
    out = setup.run([(3, 5), (0, 90)], (1, 0, 70), (2, 0, 9))
    expected = [
        setup.expected(3, [5]),
        setup.expected(0, [90]),
        setup.expected(1, range(70)),
        setup.expected(2, range(9)),
    ]
    check(out, torch.cat(expected))


@variants
def test_kv_of_the_whole_step_is_written_before_anything_attends(shape, heads, page_size, dtype, compiled):
    setup = Setup(shape, *heads, page_size, dtype, compiled)
    shared = 96 // page_size * page_size
    setup.qkv[:, 0, :shared] = setup.qkv[:, 1, :shared] = setup.qkv[:, 2, :shared]
    setup.table[:2, : shared // page_size] = setup.table[2, : shared // page_size]
    # Slots 0 and 1 have computed nothing: their prefix is what slot 2 writes in this very step, after them.
    out = setup.run([(0, shared)], (1, shared, 20), (2, 0, 120))
    expected = [
        setup.expected(0, [shared]),
        setup.expected(1, range(shared, shared + 20)),
        setup.expected(2, range(120)),
    ]
    check(out, torch.cat(expected))


def test_layers_are_apart(shape):
    setup = Setup(shape, *HEADS[0], 16, torch.float32, True)
    setup.run((0, 0, 30), layer=0)
    setup.run((0, 0, 30), layer=1)
    check(setup.run([(0, 30)], layer=0), setup.expected(0, [30], layer=0))


def test_a_decode_gives_the_same_bits_in_any_batch(shape):
    """Its sums are ordered by the row alone, so that greedy streams do not depend on their neighbours."""
    setup = Setup(shape, *HEADS[0], 16, torch.float32, True)
    for slot in range(SLOTS):
        setup.run((slot, 0, 100 + slot))
    alone = torch.cat([setup.run([(slot, 100 + slot)]) for slot in range(SLOTS)])
    together = setup.run([(slot, 100 + slot) for slot in range(SLOTS)])
    beside_prefill = setup.run([(slot, 100 + slot) for slot in range(SLOTS - 1)], (3, 0, 60))
    assert torch.equal(alone, together)
    assert torch.equal(alone[: SLOTS - 1], beside_prefill[: SLOTS - 1])


def test_page_bytes_are_what_the_pool_takes(shape):
    pool = KVPool(shape, 10, 16, torch.bfloat16)
    taken = sum(part.nbytes for layer in range(shape.num_layers) for part in pool.layer(layer))
    assert taken == 10 * page_bytes(shape, 16, torch.bfloat16)
