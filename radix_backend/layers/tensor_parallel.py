"""What the ranks that share a layer tell each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from radix_backend.layers.ops import Ops

if TYPE_CHECKING:
    from radix_backend.layers.cuda_all_reduce import CudaAllReduce
    from radix_backend.layers.cuda_sequence_parallel import CudaSequenceParallel, Piece

_ALIGNMENT = 256  # bytes of what shares a buffer


class TensorParallel:
    """One rank among ``size`` that compute the same layers; alone unless it is given a group.

    Every rank gets the same bits: a sum is made once and passed on, or made by everyone in the order of ranks.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: ProcessGroup | None = None) -> None:
        self.rank, self.size, self._group = rank, size, group
        self._small: CudaAllReduce | None = None
        self._many: CudaSequenceParallel | None = None

    def use_peer_memory(self, width: int, dtype: torch.dtype, max_rows: int = 0, **sizes: int) -> None:
        """From now on make sums of [rows, ``width``] on CUDA in each other's memory: small ones in one kernel, with
        ``sizes`` as for `CudaAllReduce`, and up to ``max_rows`` by sharing the rows.

        To be called by all ranks, none of which makes such a sum before all have returned. Raises RuntimeError where
        GPUs cannot write each other's memory.
        """
        from radix_backend.layers import cuda_all_reduce, cuda_sequence_parallel

        assert self._group is not None
        small = -(-cuda_all_reduce.buffer_bytes(self.size, width, dtype) // _ALIGNMENT) * _ALIGNMENT
        many = 0
        if max_rows >= cuda_sequence_parallel.LEAST_ROWS:
            many = cuda_sequence_parallel.buffer_bytes(self.size, width, max_rows, dtype)
        # All at once: the others wait here for a rank that finds no room, so there is one place where that can happen.
        buffers = _shared_buffers(self._group, small + many)
        self._small = cuda_all_reduce.CudaAllReduce(
            self.rank, [each[:small] for each in buffers], width, dtype, **sizes
        )
        if many:
            buffers[self.rank][small:].zero_()
            shared = [each[small:] for each in buffers]
            self.use_shares(cuda_sequence_parallel.CudaSequenceParallel(self.rank, shared, width, max_rows, dtype))
        torch.cuda.synchronize()

    def use_shares(self, ranks: CudaSequenceParallel) -> None:
        """From now on share the rows of the sums that ``ranks`` takes."""
        self._many = ranks

    def use_nccl(self) -> None:
        """From now on make all sums through the group."""
        self._small = self._many = None

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

    def pieces(self, rows: int) -> list[slice]:
        """How to cut a step of so many rows that is not captured: where into more than one, `share` takes them."""
        if self._many is not None and self._many.takes(rows):
            return self._many.cut(rows)
        return [slice(0, rows)]

    def share(self, residual: Tensor, normed: Tensor) -> list[Piece]:
        """The `pieces` of a step. ``residual`` [rows, width] f32 and ``normed`` of it are whole yet."""
        assert self._many is not None
        return self._many.share(residual, normed)

    def whole(self, residual: Tensor, pieces: Sequence[Piece], rows: Tensor | None) -> Tensor:
        """[rows, width] all of a residual stream, or ``rows`` [rows] of it; ``residual``, of which each rank has its
        shares of ``pieces`` alone, is overwritten."""
        elsewhere = torch.ones(len(residual), dtype=torch.bool, device=residual.device)
        for piece in pieces:
            elsewhere[piece.share] = False
        if rows is not None:
            residual, elsewhere = residual[rows], elsewhere[rows]
        return self.all_reduce(residual.masked_fill_(elsewhere[:, None], 0))

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


def _shared_buffers(group: ProcessGroup, size: int) -> list[Tensor]:
    """[ranks] memory of all ranks' GPUs, each [``size``] uint8, over NVLink but for this rank's own."""
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    import torch.distributed._symmetric_memory as symmetric

    own = symmetric.empty(size, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
    handle = symmetric.rendezvous(own, group.group_name)
    buffers = [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(group.size())]
    buffers[group.rank()] = own  # which keeps all of it
    return buffers
