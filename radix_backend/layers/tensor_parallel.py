"""What the ranks that share a layer tell each other."""

from __future__ import annotations

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

# The largest sum that a one-shot all-reduce makes, by number of ranks: beyond, reading every peer's whole tensor takes
# longer than NCCL's ring (measured on GPUs that NVLink joins, see docs/performance.md).
_ONE_SHOT_BYTES = {2: 4 << 20, 3: 2 << 20, 4: 2 << 20}
_ONE_SHOT_BYTES_OF_MANY = 512 << 10
_ONE_SHOT_DTYPES = (torch.bfloat16, torch.float32)  # that torch's kernel knows


class TensorParallel:
    """One rank among ``size`` that compute the same layers; alone unless it is given a group.

    Every rank gets the same bits: a sum is made once and passed on, or made by everyone in the order of ranks.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: ProcessGroup | None = None) -> None:
        self.rank, self.size, self._group = rank, size, group
        self._buffer: Tensor | None = None  # which all ranks read; uint8

    def use_one_shot(self, max_bytes: int | None = None) -> None:
        """From now on make sums of up to ``max_bytes`` on CUDA in one kernel; by default those that are faster so.

        Raises RuntimeError where GPUs cannot read each other.
        """
        assert self._group is not None
        if max_bytes is None:
            max_bytes = _ONE_SHOT_BYTES.get(self.size, _ONE_SHOT_BYTES_OF_MANY)
        self._buffer = _shared_buffer(self._group, max_bytes)

    def use_nccl(self) -> None:
        """From now on make all sums through the group."""
        self._buffer = None

    def addend(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Where a rank may put its part of a sum so that `all_reduce` need not copy it, until the next sum.

        None where sums of that size are not made so.
        """
        size = math.prod(shape) * dtype.itemsize
        if self._buffer is None or size > len(self._buffer) or size % 16 or dtype not in _ONE_SHOT_DTYPES:
            return None
        return self._buffer[:size].view(dtype).view(shape)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, which may have been overwritten. Can be captured."""
        if self.size == 1 or not x.numel():
            return x
        assert self._group is not None
        addend = self.addend(tuple(x.shape), x.dtype)
        if addend is None:
            self._group.allreduce([x]).wait()
            return x
        if addend.data_ptr() != x.data_ptr():
            addend.copy_(x)
        # Each rank adds up all ranks' buffers in the order of ranks, and returns when all have. (torch's variant that
        # copies in the same kernel may tell peers of a block before all of its warps have written.)
        return torch.ops.symm_mem.one_shot_all_reduce(addend, "sum", self._group.group_name)

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, …] of all ranks' ``x`` […], which must be contiguous. Can be captured."""
        if self.size == 1:
            return x[None]
        assert self._group is not None
        out = torch.empty(self.size * x.numel(), dtype=x.dtype, device=x.device)
        self._group._allgather_base(out, x.view(-1)).wait()
        return out.view(self.size, *x.shape)

    def gather_vocabulary(self, logits: Tensor, vocab_size: int) -> Tensor:
        """[rows, vocabulary] of all ranks' ``logits`` [rows, theirs], cut as `Shard.vocabulary` says."""
        if self.size == 1:
            return logits
        each, more = divmod(vocab_size, self.size)
        padded = F.pad(logits, (0, each + bool(more) - logits.shape[1])).contiguous()
        parts = self.all_gather(padded).unbind(0)
        return torch.cat([part[:, : each + (rank < more)] for rank, part in enumerate(parts)], dim=1)

    def elect(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """[rows] the token of the highest score, the least token of several; ``tokens`` and ``scores`` f32 [rows]."""
        if self.size == 1:
            return tokens
        candidates = self.all_gather(torch.stack([scores.view(torch.int32), tokens.int()]))
        theirs = candidates[:, 0].view(torch.float32)
        winners = theirs.argmax(dim=0, keepdim=True)  # the first rank of several, which has the least tokens
        return candidates[:, 1].gather(0, winners)[0].to(tokens.dtype)


ALONE = TensorParallel()


def _shared_buffer(group: ProcessGroup, size: int) -> Tensor:
    """[bytes] on this rank's GPU, which the others read over NVLink."""
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    import torch.distributed._symmetric_memory as symmetric

    device = torch.device("cuda", torch.cuda.current_device())
    buffer = symmetric.empty(size, dtype=torch.uint8, device=device)
    symmetric.rendezvous(buffer, group.group_name)
    return buffer
