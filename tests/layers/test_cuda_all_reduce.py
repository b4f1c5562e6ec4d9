"""The sums of ranks that write each other's memory, in Triton's interpreter: processes that share it.

On GPUs tests/worker/test_parallel_cuda.py has them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cuda import DEVICE, on_gpu  # isort: skip
from radix_backend.layers.cuda_all_reduce import CudaAllReduce, buffer_bytes
from radix_backend.layers.cuda_ops import CudaOps
from tests.layers.shared_memory import run_ranks

WIDTH, EPS = 24, 1e-6
CALLS = [3, 1, 4, 4, 2, 1, 4, 3]  # rows

pytestmark = [on_gpu, pytest.mark.skipif(DEVICE == "cuda", reason="processes share the CPU's memory")]


def part(rank: int, call: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(CALLS[call], WIDTH, generator=torch.Generator().manual_seed(100 * call + rank))
    x[:, call] = -0.0  # what an empty buffer has
    return x.to(dtype)


def sums(rank: int, buffers: list[torch.Tensor], barrier: Any, dtype: torch.dtype, two_shot: bool) -> tuple[Any, Any]:
    sizes = {"one_shot_bytes": 0} if two_shot else {}
    reduce = CudaAllReduce(rank, buffers, WIDTH, dtype, **sizes)
    barrier.wait()
    weight, residual = torch.linspace(0.5, 2.0, WIDTH).to(dtype), torch.ones(max(CALLS), WIDTH)
    outs = []
    for call, rows in enumerate(CALLS):
        mine = part(rank, call, dtype)
        assert reduce.takes(mine)
        outs.append(reduce.sum(mine).float().numpy())
        outs.append(reduce.add_rms_norm(residual[:rows], mine, weight, EPS).float().numpy())
    return outs, residual.numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("size", "two_shot"), [(2, False), (3, False), (3, True)])
def test_all_ranks_get_the_sum(size: int, two_shot: bool, dtype: torch.dtype) -> None:
    results = run_ranks(size, buffer_bytes(size, WIDTH, dtype), sums, dtype, two_shot)
    weight, residual = torch.linspace(0.5, 2.0, WIDTH).to(dtype), torch.ones(max(CALLS), WIDTH)
    close = {"rtol": 2e-2 if dtype != torch.float32 else 1e-5, "atol": 2e-2 if dtype != torch.float32 else 1e-5}
    for call, rows in enumerate(CALLS):
        total = sum(part(rank, call, dtype).float() for rank in range(size))
        normed = CudaOps().add_rms_norm(residual[:rows], total.to(dtype), weight, EPS)
        for rank in range(size):
            outs = [torch.from_numpy(each) for each in results[rank][0][2 * call : 2 * call + 2]]
            torch.testing.assert_close(outs[0], total, **close)
            torch.testing.assert_close(outs[1], normed.float(), **close)
            for own, theirs in zip(outs, results[0][0][2 * call : 2 * call + 2], strict=True):
                assert torch.equal(own, torch.from_numpy(theirs))
    for rank in range(size):
        assert (results[rank][1] == results[0][1]).all()
