"""Finds the processes of a server and a sidecar, and what they have cost."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path

from radix_backend.config import EngineConfig
from radix_backend.sidecar.runtime import RunDir

_TICKS = os.sysconf("SC_CLK_TCK")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def cpu_seconds(pid: int) -> float:
    """User plus system time of a process, all its threads, ended ones included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def command_lines() -> dict[int, str]:
    """Every process that can be seen, by id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def triton_processes(ancestor: int) -> dict[str, int]:
    """``tritonserver`` and its Python ``stub``, descendants of ``ancestor``."""
    found = {}
    for pid, line in command_lines().items():
        name = Path(line.split(" ")[0]).name
        role = {"tritonserver": "tritonserver", "triton_python_backend_stub": "stub"}.get(name)
        if role and _descends(pid, ancestor):
            found[role] = pid
    return found


def openai_process(ancestor: int) -> dict[str, int]:
    """The ``door`` that `radix-backend serve --openai-port` has started."""
    (pid,) = (pid for pid, line in command_lines().items() if " openai --" in line and _descends(pid, ancestor))
    return {"door": pid}


def sidecar_processes(config: EngineConfig) -> dict[str, int]:
    """``gateway`` and ``engine`` of the sidecar that serves ``config``."""
    run_dir = str(RunDir.of(config).path)
    lines = command_lines().items()
    return {
        role: pid for pid, line in lines for role in ("gateway", "engine") if f"radix_backend.{role} {run_dir}" in line
    }


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = parent(pid)
        except OSError:
            return False
    return False
