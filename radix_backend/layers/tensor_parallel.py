"""What the ranks that share a layer tell each other."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from radix_backend.layers.ops import Ops

if TYPE_CHECKING:
    from radix_backend.layers.cuda_all_reduce import CudaAllReduce


class TensorParallel:
    """One rank among ``size`` that compute the same layers; alone unless it is given a group.

    Every rank gets the same bits: a sum is made once and passed on, or made by everyone in the order of ranks.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: ProcessGroup | None = None) -> None:
        self.rank, self.size, self._group = rank, size, group
        self._small: CudaAllReduce | None = None

    def use_one_shot(self, width: int, dtype: torch.dtype, **sizes: int) -> None:
        """From now on make small sums of [rows, ``width``] on CUDA in one kernel; ``sizes`` are `CudaAllReduce`'s.

        To be called by all ranks, none of which makes such a sum before all have returned. Raises RuntimeError where
        GPUs cannot write each other's memory.
        """
        from radix_backend.layers.cuda_all_reduce import CudaAllReduce, buffer_bytes

        assert self._group is not None
        own, addresses = _shared_buffer(self._group, buffer_bytes(self.size, width, dtype))
        self._small = CudaAllReduce(self.rank, addresses, own, width, dtype, **sizes)
        torch.cuda.synchronize()

    def use_nccl(self) -> None:
        """From now on make all sums through the group."""
        self._small = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x`` [rows, width], which may have been overwritten. Can be captured."""
        if self.size == 1 or not x.numel():
            return x
        if self._small is not None and self._small.takes(x):
            return self._small.sum(x)
        assert self._group is not None
        self._group.allreduce([x]).wait()
        return x

    def add_rms_norm(self, ops: Ops, residual: Tensor, part: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`Ops.add_rms_norm` of the sum of all ranks' ``part``. Can be captured."""
        if self._small is not None and part.numel() and self._small.takes(part):
            return self._small.add_rms_norm(residual, part, weight, eps)
        return ops.add_rms_norm(residual, self.all_reduce(part), weight, eps)

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


def _shared_buffer(group: ProcessGroup, size: int) -> tuple[Tensor, list[int]]:
    """[bytes] uint8 on this rank's GPU, which the others reach over NVLink, and where all ranks' are."""
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    import torch.distributed._symmetric_memory as symmetric

    buffer = symmetric.empty(size, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
    handle = symmetric.rendezvous(buffer, group.group_name)
    return buffer, [handle.get_buffer(rank, (size,), torch.uint8).data_ptr() for rank in range(group.size())]
