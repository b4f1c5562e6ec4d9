"""What stays beside a rank on its host: starts it, passes on what it writes, tells how it ended.

It runs in a process that does nothing else (a Ray actor), so that its signs of life do not depend on how busy the rank
is.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec

from radix_backend.process import PARENT_PID
from radix_backend.version import __version__
from radix_backend.worker import set_spin_count
from radix_backend.worker.channel import HEARTBEAT_SECONDS, Door, EngineLost, Lifeline
from radix_backend.worker.messages import RankAlive, RankLog, encode

RANK_PROGRAM = ("-m", "radix_backend.worker.rank")
_CHUNK = 65536


class RankTask(msgspec.Struct, frozen=True):
    """What an agent is to do."""

    rank: int
    spec: bytes  # JSON of a `RankSpec`
    door: Door


class Place(msgspec.Struct, frozen=True):
    """Where a rank is to be."""

    address: str  # of its host, for other hosts
    node: str  # names the host: addresses may be shared
    gpu: str | None = None  # as CUDA_VISIBLE_DEVICES names it; the only one that the rank will see


def ending(status: int) -> str:
    """How a process ended, by its return code."""
    if status < 0:
        return f"was killed by signal {-status} ({signal.strsignal(-status)})"
    return f"exited with status {status}"


def attend(task: RankTask, program: Sequence[str] = RANK_PROGRAM) -> str:
    """Start a rank and stay with it. Returns how it ended: "was killed by signal 9 (Killed)".

    Call it in a thread that lives as long as the process: the rank dies with it.
    """
    set_spin_count()
    try:
        lifeline = Lifeline(task.door)
    except EngineLost as error:
        return str(error)
    # The specification has a secret key: not on the command line, where everybody on the host can read it.
    process = subprocess.Popen(
        [sys.executable, *program, "-"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env=os.environ | {PARENT_PID: str(os.getpid())},
    )
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(task.spec)
        _look_after(process, lifeline)
        return ending(process.wait())
    except EngineLost as error:
        return f"was ended: {error}"
    finally:
        process.kill()
        process.wait()
        lifeline.close()


def _look_after(process: subprocess.Popen[bytes], lifeline: Lifeline) -> None:
    """Until it has ended. Raises EngineLost."""
    assert process.stderr is not None
    stderr, rest = process.stderr.fileno(), b""
    os.set_blocking(stderr, False)
    alive, next_sign = encode(RankAlive()), 0.0
    while True:
        ended = process.poll() is not None  # asked before the last read
        if time.monotonic() >= next_sign:
            next_sign = time.monotonic() + HEARTBEAT_SECONDS
            lifeline.send(alive)
        lifeline.check()
        try:
            data = os.read(stderr, _CHUNK)
            closed = not data
        except BlockingIOError:
            data, closed = b"", False
        *lines, rest = (rest + data).split(b"\n")
        if ended and not data and rest:
            lines.append(rest)
        if lines:
            lifeline.send(encode(RankLog(b"\n".join(lines).decode(errors="replace"))))
        if ended and not data:
            return
        if not data:
            select.select([lifeline.monitor.fileno(), *[stderr] * (not closed)], [], [], HEARTBEAT_SECONDS / 2)


class RankAgent:
    """The agent as a Ray actor."""

    def place(self) -> tuple[str, bytes]:
        """Version of this package here, and the `Place` that this actor was given."""
        import ray

        gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
        place = Place(ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id(), *gpus)
        return __version__, msgspec.msgpack.encode(place)

    def attend(self, task: bytes) -> str:
        return attend(msgspec.msgpack.decode(task, type=RankTask))
