"""The process groups through which ranks compute together."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.layers.tensor_parallel import ALONE, TensorParallel
from radix_backend.worker.pipeline import Link, Pipeline

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_START_SECONDS = 3600  # for all ranks to have read their weights; a rank that dies meanwhile is noticed otherwise


class Meeting(msgspec.Struct, frozen=True):
    """Where the ranks meet, and how one of them takes part."""

    port: int
    host: str = LOOPBACK  # address of rank 0's host
    own_host: str = LOOPBACK  # address of this rank's host, by which the others reach it
    gpu: int = 0  # this rank's, among those that its process sees
    tp_on_one_host: bool = True  # whether that is so for the ranks of every stage


@dataclass
class Ranks:
    """One rank's place among all. The default is alone."""

    rank: int = 0
    gpu: int = 0  # among those that this process sees
    tp: TensorParallel = ALONE
    pipeline: Pipeline[Any] | None = None  # where there are several stages
    tp_on_one_host: bool = True  # whether those that share a layer are
    _grouped: bool = field(default=False, kw_only=True)

    def least(self, value: int) -> int:
        """The least of all ranks' values."""
        if not self._grouped:
            return value
        values = torch.tensor([value])
        dist.all_reduce(values, dist.ReduceOp.MIN)
        return int(values)

    def use_peer_memory(self, config: EngineConfig, width: int, dtype: torch.dtype) -> None:
        """Make sums of [rows, ``width``] in other GPUs' memory, on all ranks or on none, as ``all_reduce`` says.

        Raises Unavailable where it says so and GPUs cannot.
        """
        if self.tp.size == 1 or config.all_reduce == "nccl" or not self.tp_on_one_host:
            return
        try:
            self.tp.use_peer_memory(width, dtype, config.max_batched_tokens or 0)
            why = ""
        except RuntimeError as error:
            why = str(error)
        if self.least(not why):
            return
        self.tp.use_nccl()
        why = why or "another rank cannot"
        if config.all_reduce == "one-shot":
            raise Unavailable(
                f"setting 'all_reduce' is 'one-shot', which these GPUs cannot: {why}; accepted: auto, nccl"
            )
        log.warning("all-reduce through NCCL alone: GPUs cannot reach each other's memory: %s", why)

    def close(self) -> None:
        if self._grouped:
            dist.destroy_process_group()


NO_OTHERS = Ranks()


def listen(config: EngineConfig, host: str = LOOPBACK) -> socket.socket:
    """Where rank 0 waits for the others. Raises InvalidArgument where ``nccl_port`` is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, config.nccl_port or 0))
    except OSError as error:
        raise InvalidArgument(
            f"setting 'nccl_port' is {config.nccl_port}, which cannot be listened on: {error.strerror}"
        ) from None
    listener.listen(config.num_ranks)
    return listener


def own_gpu(config: EngineConfig, rank: int) -> int:
    """The GPU of a rank on this host."""
    return rank if config.device_ids is None else config.device_ids[rank]


def use_gpu(config: EngineConfig, gpu: int) -> bool:
    """Make this GPU the current one; False where the device is none."""
    cuda = config.device == "cuda" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(gpu)
    return cuda


def join(config: EngineConfig, rank: int, meeting: Meeting, listener: socket.socket | None = None) -> Ranks:
    """Meet the other ranks; rank 0 has the ``listener`` for it.

    Collectives on CUDA tensors go through NCCL, on others through gloo, both on the interface of ``own_host``.
    """
    cuda = use_gpu(config, meeting.gpu)
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # multicast needs memory that other engines on the host may have taken
    if interface := _interface_of(meeting.own_host):
        _prefer("GLOO_SOCKET_IFNAME", interface)
        _prefer("NCCL_SOCKET_IFNAME", f"={interface}")  # without the sign: all that begin so
    world = config.num_ranks
    store = dist.TCPStore(
        meeting.host,
        meeting.port,
        world,
        is_master=listener is not None,
        timeout=timedelta(seconds=_START_SECONDS),
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=_START_SECONDS),
    )
    stage, tp_rank = divmod(rank, config.tp_size)
    tp, pipeline = _tensor_parallel(config, stage, tp_rank), _pipeline(config, stage, tp_rank)
    return Ranks(rank, meeting.gpu, tp, pipeline, meeting.tp_on_one_host, _grouped=True)


_preferred: dict[str, str] = {}


def _prefer(name: str, value: str) -> None:
    """Set an environment variable that the user has not set; what an earlier worker of this process wanted is past."""
    if os.environ.get(name) in (None, _preferred.get(name)):
        os.environ[name] = _preferred[name] = value


def _interface_of(address: str) -> str | None:
    """The network interface that has an IP address; None where none has it, as behind an address translation."""
    if address.startswith("127."):
        return "lo"
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    log.warning("no network interface has %s, the address of this host: gloo and NCCL choose one", address)
    return None


# Every rank takes part in making every group, in the same order.


def _tensor_parallel(config: EngineConfig, stage: int, tp_rank: int) -> TensorParallel:
    size = config.tp_size
    if size == 1:
        return ALONE
    groups = [dist.new_group([each * size + rank for rank in range(size)]) for each in range(config.pp_size)]
    return TensorParallel(tp_rank, size, groups[stage])


def _pipeline(config: EngineConfig, stage: int, tp_rank: int) -> Pipeline[Any] | None:
    size, stages = config.tp_size, config.pp_size
    if stages == 1:
        return None
    kept = 2 * stages + 2  # steps in flight and some, each with up to two messages

    def link(other: int, group: dist.ProcessGroup) -> Link:
        return Link(other * size + tp_rank, group, kept)

    previous = following = tokens = None
    for rank in range(size):
        hidden = [dist.new_group([at * size + rank, (at + 1) * size + rank]) for at in range(stages - 1)]
        returned = dist.new_group([(stages - 1) * size + rank, rank])
        if rank != tp_rank:
            continue
        if stage > 0:
            previous = link(stage - 1, hidden[stage - 1])
        if stage < stages - 1:
            following = link(stage + 1, hidden[stage])
        if stage in (0, stages - 1):
            tokens = link(stages - 1 - stage, returned)
    return Pipeline(stages, previous, following, tokens)
