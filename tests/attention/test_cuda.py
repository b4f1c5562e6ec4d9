"""The Triton-language kernels against plain torch, in f64."""

import pytest
import torch

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.attention.cuda_decode import CudaDecode, DecodeShape, DecodeTiles, tile_rows
from radix_backend.attention.cuda_extend import extend, tile_tokens, tiles
from radix_backend.attention.cuda_kv_write import rotate_and_write
from radix_backend.layers.ops import TorchOps
from radix_backend.layers.rope import cos_sin_table
from radix_backend.loading.model_config import Rope

pytestmark = on_gpu

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the norm


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def paged(lengths, kv_heads, page_size, head_dim, dtype):
    """A pool in which these requests' pages lie scattered, NaN where nothing was written, and their page table."""
    counts = [-(-length // page_size) for length in lengths]
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(sum(counts) + 3, generator=generator).to(torch.int32)
    keys, values = torch.randn(2, len(order), kv_heads, page_size, head_dim, generator=generator).to(dtype)
    table = torch.full((len(lengths), max([*counts, 1])), 10**6, dtype=torch.int32)
    for slot, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[slot, :count], order = order[:count], order[count:]
        if length % page_size:
            for pool in (keys, values):
                pool[table[slot, count - 1], :, length % page_size :] = torch.nan
    return keys.to(DEVICE), values.to(DEVICE), table.to(DEVICE)


def gathered(pool, table, slot, length):
    """[length, kv_heads, head_dim] f64."""
    pages = table[slot, : -(-length // pool.shape[2])].long()
    return pool[pages].transpose(1, 2).flatten(0, 1)[:length].double()


def reference(q, keys, values, table, slot, length):
    """Attention of the last ``len(q)`` of ``length`` tokens."""
    k, v = gathered(keys, table, slot, length), gathered(values, table, slot, length)
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("thd,nhd->htn", q.double(), k.repeat_interleave(group, 1)) / q.shape[2] ** 0.5
    later = torch.ones(len(q), length, dtype=torch.bool, device=DEVICE).triu(length - len(q) + 1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("htn,nhd->thd", weights, v.repeat_interleave(group, 1))


def assert_near(actual, expected, dtype):
    assert float((actual.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]


SHAPES = [(2, 1, 64), (16, 8, 128), (14, 2, 64), (6, 2, 24)]  # heads, kv_heads, head_dim


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("lengths", [[1], [200], [0, 5, 130, 0, 16, 17, 33, 1, 300, 0]])
@pytest.mark.parametrize("shares", [1, 7])
def test_decode_equals_torch(lengths, heads, kv_heads, head_dim, page_size, dtype, shares):
    if DEVICE == "cpu" and (dtype != torch.float32 or kv_heads == 8):
        pytest.skip("slow in the interpreter")
    keys, values, table = paged(lengths, kv_heads, page_size, head_dim, dtype)
    q = randn(len(lengths), heads + 1, head_dim, dtype=dtype)[:, :heads]  # rows apart
    ends = torch.tensor([-(-length // page_size) for length in lengths]).cumsum(0).to(DEVICE, torch.int32)
    slots = ints(*[slot if length else -1 for slot, length in enumerate(lengths)])
    shape = DecodeShape(shares, 32 if dtype == torch.float32 else 64, 4, 2)
    out = torch.full((len(lengths), heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    CudaDecode(16, heads, keys, shape)(q, keys, values, table, slots, ints(*lengths), ends, out)
    for row, length in enumerate(lengths):
        if length:
            assert_near(out[row], reference(q[row : row + 1], keys, values, table, row, length)[0], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("shares", [1, 7])
@pytest.mark.parametrize("groups", [[], [(0, 2, 80)], [(1, 4, 96), (5, 2, 16), (8, 2, 160)]])
def test_decode_that_reads_shared_pages_once_equals_torch(groups, shares, heads, kv_heads, head_dim, page_size, dtype):
    if DEVICE == "cpu" and (dtype != torch.float32 or kv_heads == 8):
        pytest.skip("slow in the interpreter")
    lengths = [97, 161, 97, 190, 100, 40, 33, 0, 170, 161]
    keys, values, table = paged(lengths, kv_heads, page_size, head_dim, dtype)
    skips, places = torch.zeros(10, dtype=torch.int32), torch.full((10,), -1, dtype=torch.int32)
    firsts, counts, pages = torch.zeros(3, 4, dtype=torch.int32)
    for tile, (first, count, tokens) in enumerate(groups):
        firsts[tile], counts[tile], pages[tile] = first, count, tokens // page_size
        rows = slice(first, first + count)
        skips[rows] = tokens // page_size
        places[rows] = tile * tile_rows(heads // kv_heads) + torch.arange(count)
        table[rows, : tokens // page_size] = table[first, : tokens // page_size].clone()
    q = randn(len(lengths), heads + 1, head_dim, dtype=dtype)[:, :heads]
    own = torch.tensor([-(-length // page_size) for length in lengths]) - skips
    slots = ints(*[slot if length else -1 for slot, length in enumerate(lengths)])
    ends = [each.cumsum(0).to(DEVICE, torch.int32) for each in (own, pages)]
    shape = DecodeShape(shares, 32 if dtype == torch.float32 else 64, 4, 2)
    out = torch.full((len(lengths), heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    shared = DecodeTiles(firsts.to(DEVICE), counts.to(DEVICE), ends[1], skips.to(DEVICE), places.to(DEVICE))
    decode = CudaDecode(16, heads, keys, shape, max_tiles=4)
    decode(q, keys, values, table, slots, ints(*lengths), ends[0], out, shared)
    for row, length in enumerate(lengths):
        if length:
            assert_near(out[row], reference(q[row : row + 1], keys, values, table, row, length)[0], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("chunks", [[(1, 0)], [(150, 0)], [(3, 40), (1, 99), (70, 16), (129, 1)]])
def test_extend_equals_torch(chunks, heads, kv_heads, head_dim, page_size, dtype):
    if DEVICE == "cpu" and (dtype != torch.float32 or kv_heads == 8):
        pytest.skip("slow in the interpreter")
    counts, cached = torch.tensor(chunks, dtype=torch.int32).T.numpy()
    firsts = counts.cumsum(dtype="int32") - counts
    keys, values, table = paged((counts + cached).tolist(), kv_heads, page_size, head_dim, dtype)
    q = randn(int(counts.sum()), heads + 1, head_dim, dtype=dtype)[:, :heads]
    slots = torch.arange(len(chunks), dtype=torch.int32).numpy()
    todo = torch.from_numpy(tiles(firsts, counts, slots, cached, tile_tokens(dtype, heads // kv_heads))).to(DEVICE)
    out = torch.full(q.shape, torch.nan, dtype=dtype, device=DEVICE)
    extend(q, keys, values, table, todo, out)
    for slot, (count, before) in enumerate(chunks):
        rows = slice(int(firsts[slot]), int(firsts[slot]) + count)
        assert_near(out[rows], reference(q[rows], keys, values, table, slot, before + count), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_rotation_and_write_equal_torch(heads, kv_heads, head_dim, normed, dtype):
    table = cos_sin_table(Rope(10000.0), head_dim, 64).to(DEVICE)
    page_table = torch.arange(12, dtype=torch.int32, device=DEVICE).flip(0).view(3, 4).contiguous()
    keys = torch.zeros(12, kv_heads, 16, head_dim, dtype=dtype, device=DEVICE)
    values = torch.zeros_like(keys)
    slots, positions = ints(0, 2, -1, 2), ints(17, 5, 0, 63)
    buffer = randn(4, heads + 2 * kv_heads, head_dim, dtype=dtype)
    norms = (randn(head_dim, dtype=dtype, seed=1), randn(head_dim, dtype=dtype, seed=2)) if normed else None
    expected = buffer.clone()
    TorchOps().norm_and_rotate(expected[:, : heads + kv_heads], norms, heads, 1e-6, positions, table)
    rotate_and_write(buffer, heads, norms, 1e-6, positions, table, slots, page_table, keys, values)
    assert_near(buffer[:, :heads], expected[:, :heads].double(), dtype)
    written = torch.zeros(12, 16, dtype=torch.bool, device=DEVICE)
    for token in (0, 1, 3):
        page, offset = int(page_table[slots[token], positions[token] // 16]), int(positions[token] % 16)
        assert_near(keys[page, :, offset], expected[token, heads : heads + kv_heads].double(), dtype)
        assert torch.equal(values[page, :, offset], buffer[token, heads + kv_heads :])
        written[page, offset] = True
    assert torch.equal((keys != 0).any(3).any(1), written)
