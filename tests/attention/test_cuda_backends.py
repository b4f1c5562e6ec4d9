"""Every attention of the CUDA worker against plain torch in f64: on a GPU, or in Triton's interpreter."""

import importlib.util
import itertools
import sys

import numpy as np
import pytest
import torch

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.attention.cuda import AttentionSetup, Chunks, DecodeBatch, PrefillBatch
from radix_backend.attention.cuda_backends import Backends, cuda_attention, resolve_backends
from radix_backend.attention.cuda_decode import DecodeTiles
from radix_backend.attention.cuda_extend import cut, tile_tokens, tiles
from radix_backend.errors import InvalidArgument, Unsupported
from radix_backend.layers.rope import cos_sin_table
from radix_backend.loading.model_config import Rope
from tests.attention.test_cuda import assert_near, ints, paged, randn, reference

pytestmark = on_gpu

needs_flashinfer = pytest.mark.skipif(
    DEVICE != "cuda" or importlib.util.find_spec("flashinfer") is None, reason="needs a GPU and flashinfer"
)
FLASHINFER = [
    pytest.param(name, torch.bfloat16, marks=needs_flashinfer) for name in ("flashinfer-fa2", "flashinfer-fa3", "auto")
]
KINDS = [("triton", torch.float32), ("torch_native", torch.float32), ("torch_native", torch.bfloat16), *FLASHINFER]
SHAPES = [(4, 2, 64), (14, 2, 64), (16, 8, 128)]  # heads, kv_heads, head_dim


class Pool:
    """A pool's one layer."""

    def __init__(self, keys, values):
        self._layer = keys, values

    def layer(self, index):
        return self._layer


class Case:
    """An attention over scattered pages, in which requests have ``lengths`` tokens."""

    def __init__(self, name, dtype, shape, lengths, page_size, max_rows=16):
        self.name, self.dtype, (self.heads, self.kv_heads, self.head_dim) = name, dtype, shape
        self.page_size = page_size
        self.keys, self.values, self.table = paged(lengths, self.kv_heads, page_size, self.head_dim, dtype)
        self.table[self.table >= len(self.keys)] = 0
        rope = cos_sin_table(Rope(10000.0), self.head_dim, 512).to(DEVICE)
        pool = Pool(self.keys, self.values)
        backends = Backends("triton", "flashinfer-fa3") if name == "auto" else Backends(name, name)
        self.attention = cuda_attention(backends, pool, AttentionSetup(self.table, self.heads, max_rows, 4, rope, 1e-6))

    def projections(self, tokens, seed=0):
        return randn(tokens, self.heads + 2 * self.kv_heads, self.head_dim, dtype=self.dtype, seed=seed)

    def rows(self, slots, lengths):
        lengths = torch.tensor(lengths)
        ends = (-(-lengths // self.page_size)).cumsum(0)
        columns = (torch.zeros(len(slots)), (lengths - 1).clamp(min=0), torch.tensor(slots), lengths, ends)
        unused = DecodeTiles(*[ints(*[value] * size) for value, size in ((0, 4), (0, 4), (0, 4), (0, 8), (-1, 8))])
        return DecodeBatch(*[column.to(DEVICE, torch.int32) for column in columns], unused)

    def assert_rows(self, out, heads, slots, lengths):
        """``heads`` were normed and rotated in place."""
        for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
            if length:
                q = heads[row : row + 1, : self.heads]
                expected = reference(q, self.keys, self.values, self.table, slot, length)
                assert_near(out[row].view(self.heads, -1), expected[0], self.dtype)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_decode_equals_torch(name, dtype, shape, page_size):
    if DEVICE == "cpu" and shape != SHAPES[0]:
        pytest.skip("slow in the interpreter")
    lengths = [130, 16, 17, 1, 300]
    case = Case(name, dtype, shape, lengths, page_size)
    slots, lengths = [*range(5), -1, -1, -1], [*lengths, 0, 0, 0]
    heads = case.projections(8)
    case.attention.plan_decode(8, np.array(lengths[:5], np.int64))
    out = case.attention.decode(case.rows(slots, lengths))(0, heads, None)
    case.assert_rows(out, heads, slots, lengths)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("chunks", "cuts"),
    [
        ([(1, 0)], []),
        ([(150, 0)], []),
        ([(150, 0)], [50, 82]),
        ([(3, 40), (1, 99), (70, 16), (129, 1)], []),
        ([(3, 40), (1, 99), (70, 16), (129, 1)], [4, 100]),
    ],
)
@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_extend_equals_torch(name, dtype, chunks, cuts, shape, page_size):
    if DEVICE == "cpu" and shape != SHAPES[0]:
        pytest.skip("slow in the interpreter")
    counts, cached = torch.tensor(chunks, dtype=torch.int32).T.numpy()
    lengths, firsts = counts + cached, counts.cumsum(dtype="int32") - counts
    case = Case(name, dtype, shape, lengths.tolist(), page_size)
    slots = np.arange(len(chunks), dtype=np.int32)
    positions = np.concatenate([np.arange(before, before + count) for count, before in chunks])
    heads = case.projections(int(counts.sum()))
    attends, pieces = [], list(itertools.pairwise([0, *cuts, len(heads)]))
    for piece, (start, stop) in enumerate(pieces):
        chosen, begins, taken = cut(firsts, firsts + counts, slice(start, stop))
        before, ours = cached[chosen] + begins - firsts[chosen], slots[chosen]
        todo = tiles(begins - start, taken, ours, before, tile_tokens(dtype, shape[0] // shape[1]))
        batch = PrefillBatch(
            positions=ints(*positions[start:stop].tolist()),
            slots=ints(*np.repeat(ours, taken).tolist()),
            tiles=torch.from_numpy(todo).to(DEVICE),
            chunks=Chunks(taken, before + taken, ints(*ours.tolist()), ints(*(before + taken).tolist())),
        )
        attends.append(case.attention.extend(batch, piece))
    parts = [attend(0, heads[slice(*rows)], None) for attend, rows in zip(attends, pieces, strict=True)]
    out = torch.cat(parts).view(len(heads), shape[0], -1)
    for slot, (count, before) in enumerate(chunks):
        rows = slice(int(firsts[slot]), int(firsts[slot]) + count)
        q = heads[rows, : case.heads]
        assert_near(out[rows], reference(q, case.keys, case.values, case.table, slot, before + count), dtype)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "dtype"), [("torch_native", torch.float32), *FLASHINFER])
def test_a_captured_decode_is_right_for_plans_made_while_others_are_in_flight(name, dtype, shape):
    full = [400, 333, 500, 77, 120, 499, 260, 9]
    case = Case(name, dtype, shape, full, 16)
    batch = case.rows(list(range(8)), [0] * 8)
    heads, result = case.projections(8), torch.zeros(8, case.heads * case.head_dim, dtype=dtype, device=DEVICE)
    inputs = torch.zeros_like(heads)
    batch.slots.fill_(-1)
    case.attention.decode(batch)(0, inputs, None)  # as the worker does before it captures
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result.copy_(case.attention.decode(batch)(0, inputs, None))
    steps = [full, [1] * 8, [16, 500 - 167, 3, 77, 1, 2, 260, 9], full[:3], [17], [350, 20]]
    padded = [[*lengths, *[0] * (8 - len(lengths))] for lengths in steps]
    batches = [case.rows([row if length else -1 for row, length in enumerate(each)], each) for each in padded]
    outs, rotated = [], []
    torch.cuda._sleep(100_000_000)  # everything below is launched before anything of it runs
    for lengths, next_batch in zip(steps, batches, strict=True):
        case.attention.plan_decode(8, np.array(lengths, np.int64))
        for mine, new in zip(list(vars(batch).values())[:5], list(vars(next_batch).values())[:5], strict=True):
            mine.copy_(new)
        inputs.copy_(heads)  # what was there has been rotated
        graph.replay()
        outs.append(result.clone())
        rotated.append((inputs.clone(), case.keys.clone(), case.values.clone()))
    for lengths, out, (q, keys, values) in zip(steps, outs, rotated, strict=True):
        case.keys, case.values = keys, values
        case.assert_rows(out, q, range(len(lengths)), lengths)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "error", "message"),
    [
        (torch.float32, 64, InvalidArgument, "'dtype' is 'float32'; accepted with .*: auto, bfloat16, float16"),
        (torch.bfloat16, 24, Unsupported, "head_dim is 24; accepted with .*: 64, 128, 256"),
    ],
)
@pytest.mark.parametrize("name", ["flashinfer", "flashinfer-fa2", "flashinfer-fa3"])
def test_what_flashinfer_cannot_compute_is_refused(name, dtype, head_dim, error, message):
    with pytest.raises(error, match=message):
        resolve_backends(name, dtype, head_dim)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 64), (torch.bfloat16, 24)])
def test_auto_is_triton_for_what_flashinfer_cannot_compute(dtype, head_dim):
    assert resolve_backends("auto", dtype, head_dim) == Backends("triton", "triton")


def test_auto_needs_no_flashinfer(monkeypatch):
    monkeypatch.setitem(sys.modules, "radix_backend.attention.flashinfer", None)  # importing it raises ImportError
    assert resolve_backends("auto", torch.bfloat16, 64) == Backends("triton", "triton")


@needs_flashinfer
def test_auto_takes_compiled_kernels_of_flashinfer_for_prefill():
    from radix_backend.attention.flashinfer import load_compiled_prefill

    if torch.cuda.get_device_capability()[0] != 9 or not load_compiled_prefill("fa3", torch.bfloat16, 64):
        pytest.skip("needs a Hopper GPU and flashinfer's kernels")
    assert resolve_backends("auto", torch.bfloat16, 64) == Backends("triton", "flashinfer-fa3")
