"""Sums whose rows the ranks share, in Triton's interpreter: processes that share memory, whose queues do all at once.

On GPUs tests/worker/test_parallel_cuda.py has them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.config import EngineConfig
from radix_backend.layers import cuda_sequence_parallel
from radix_backend.layers.cuda_ops import CudaOps
from radix_backend.layers.cuda_queue import Copy, Counters
from radix_backend.layers.cuda_sequence_parallel import CudaSequenceParallel, buffer_bytes
from radix_backend.layers.tensor_parallel import TensorParallel
from radix_backend.loading import Shard, read_model_config
from radix_backend.loading.checkpoint import Checkpoint
from radix_backend.models.decoder import Decoder, Hidden
from tests.layers.shared_memory import run_ranks
from tests.models.tiny import VOCAB, save_tiny

WIDTH, MAX_ROWS, EPS = 24, 1200, 1e-6
STEPS = [900, 1200, 1201, 900]  # rows; 1201 is more than fits

pytestmark = [on_gpu, pytest.mark.skipif(DEVICE == "cuda", reason="processes share the CPU's memory")]


class Inline:
    """A `Queue` that has always done what was queued."""

    def mark(self) -> None:
        pass

    def follow(self, mark: None) -> None:
        pass

    def wait(self, counters: Counters, value: int) -> None:
        deadline = time.monotonic() + 60
        while any(ctypes.c_int32.from_address(each).value < value for each in counters.addresses):
            assert time.monotonic() < deadline, "nothing came"
            time.sleep(0)

    def write(self, counters: Counters, value: int) -> None:
        for each in counters.addresses:
            ctypes.c_int32.from_address(each).value = value

    def copy(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            ctypes.memmove(*copy)

    def run(self, kernel: Callable[..., None], *arguments: Any) -> None:
        kernel(*arguments)


# ── sums ────────────────────────────────────────────────────────────────────────────────────────────────────────


def part(rank: int, call: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(100 * call + rank)).to(dtype)


def weights(dtype: torch.dtype) -> torch.Tensor:
    return torch.linspace(0.5, 2.0, WIDTH).to(dtype)


def sums(rank: int, buffers: list[torch.Tensor], barrier: Any, dtype: torch.dtype) -> list[Any]:
    cuda_sequence_parallel.LEAST_ROWS = STEPS[0]
    ranks = CudaSequenceParallel(rank, buffers, WIDTH, MAX_ROWS, dtype, Inline)
    outs: list[Any] = []
    for step, rows in enumerate(STEPS):
        if not ranks.takes(rows):
            continue
        residual = torch.ones(rows, WIDTH)
        pieces = ranks.share(residual, torch.full((rows, WIDTH), 7.0, dtype=dtype))
        assert all((piece.normed() == 7).all() for piece in pieces)
        for call in range(2):
            for piece in pieces:
                piece.part.copy_(part(rank, 2 * step + call, rows, dtype)[piece.rows])
                piece.add_rms_norm(weights(dtype), EPS)
            outs.append(torch.cat([piece.normed() for piece in pieces]).float().numpy())
        shares = [piece.share for piece in pieces]
        outs.append(([(share.start, share.stop) for share in shares], [residual[share].numpy() for share in shares]))
    return outs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_get_the_norm_of_the_sum(size: int, dtype: torch.dtype) -> None:
    results = run_ranks(size, buffer_bytes(size, WIDTH, MAX_ROWS, dtype), sums, dtype)
    tolerance = 2e-2 if dtype != torch.float32 else 1e-5
    for number, (step, rows) in enumerate((step, rows) for step, rows in enumerate(STEPS) if rows <= MAX_ROWS):
        residual, kept = torch.ones(rows, WIDTH), torch.zeros(rows, dtype=torch.int32)
        for call in range(2):
            for rank in range(size):
                residual += part(rank, 2 * step + call, rows, dtype).float()
            expected = CudaOps().add_rms_norm(residual, None, weights(dtype), EPS).float()
            for outs in results:
                found = torch.from_numpy(outs[3 * number + call])
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
                assert (found == torch.from_numpy(results[0][3 * number + call])).all()
        for outs in results:
            for (start, stop), own in zip(*outs[3 * number + 2], strict=True):
                torch.testing.assert_close(torch.from_numpy(own), residual[start:stop])
                kept[start:stop] += 1
        assert (kept == 1).all()


# ── a decoder ───────────────────────────────────────────────────────────────────────────────────────────────────


def attend(layer: int, heads: torch.Tensor, norms: Any) -> torch.Tensor:
    """Stands for attention: something of all that it is given, for 4 of the heads."""
    mixed = heads[:, :4] + heads[:, 4:6].repeat(1, 2, 1) * torch.tanh(heads[:, 6:]).repeat(1, 2, 1)
    return torch.tanh(mixed).reshape(len(heads), -1)


def hidden_states(
    rank: int, buffers: list[torch.Tensor], barrier: Any, directory: Path, store: str, width: int
) -> list[Any]:
    cuda_sequence_parallel.LEAST_ROWS = STEPS[0]
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    tp = TensorParallel(rank, 2, dist.group.WORLD)
    shard = Shard.of(EngineConfig(tp_size=2), read_model_config(directory), rank)
    model = Decoder(shard, Checkpoint(directory), torch.float32, 1024, CudaOps(), tp=tp)
    tokens = torch.arange(STEPS[0], dtype=torch.int32) % VOCAB
    sampled = torch.tensor([0, 3, 255, 256, 500, 512, 899])

    def results() -> list[Any]:
        attends = [attend] * len(tp.pieces(len(tokens)))
        found: list[Hidden] = [model.forward(tokens, attends), model.forward(tokens, attends, sampled)]
        return [hidden.sum().numpy() for hidden in found]

    expected = results()
    tp.use_shares(CudaSequenceParallel(rank, buffers, width, STEPS[0], torch.float32, Inline))
    assert len(tp.pieces(len(tokens))) > 1
    assert tp.pieces(STEPS[0] - 1) == [slice(0, STEPS[0] - 1)]
    found = results()
    dist.destroy_process_group()
    return [expected, found]


def test_a_decoder_that_shares_rows_is_one_that_does_not(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3}
    directory = save_tiny(tmp_path, "qwen3-biased", seed=11, **heads)
    width = read_model_config(directory).hidden_size
    size = buffer_bytes(2, width, STEPS[0], torch.float32)
    results = run_ranks(2, size, hidden_states, directory, str(tmp_path / "store"), width)
    for expected, found in results:
        for own, shared, other in zip(expected, found, results[0][1], strict=True):
            torch.testing.assert_close(torch.from_numpy(shared), torch.from_numpy(own), rtol=1e-4, atol=1e-4)
            assert (shared == other).all()
