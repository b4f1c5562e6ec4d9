"""What this process may use of its machine, control groups (containers) included."""

from __future__ import annotations

import os
from pathlib import Path

_MEMORY_CGROUPS = (  # limit, usage: version 2, version 1
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def available_memory(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take, by the kernel's estimate and its control group's limit."""
    fields = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    available = next(int(field[1]) * 1024 for field in fields if field[0] == "MemAvailable:")
    for limit, usage in _MEMORY_CGROUPS:
        try:
            allowed, used = ((cgroups / name).read_text().strip() for name in (limit, usage))
        except OSError:
            continue
        if allowed != "max":
            available = min(available, max(int(allowed) - int(used), 0))
    return available


def available_cpus(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that threads of this process can run on at the same time, rounded up."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroups / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else min(cpus, -(-int(quota) // int(period)))
