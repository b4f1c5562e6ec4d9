"""Whose series are whose among the stubs of one server.

Triton counts the users of a series by model instance, not together: two instances with the same labels share it, and
the one that is unloaded first takes it away from the other, which then writes to freed memory (core,
src/metric_family.cc). So no two stubs ever have the same series at the same time: instances beyond the first label
theirs with ``model_instance``, and after a reload the new stub waits until the old one has deleted its own (`Turn`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radix_backend.metrics.publisher import Identity


def identify(args: Mapping[str, str], groups: list[dict[str, Any]]) -> Identity:
    """``args`` are those of Triton's `initialize`, ``groups`` is the model configuration's ``instance_group``."""
    name = args["model_instance_name"]
    group: dict[str, Any] = groups[0] if groups else {"name": name}
    speaks_for_engine = name in (f"{group['name']}_0", group["name"])  # older servers do not number a single one
    if args["model_instance_kind"] == "GPU":  # the instances of a group on all its devices have the same name
        device = args["model_instance_device_id"]
        speaks_for_engine &= device == str((group.get("gpus") or [device])[0])
        name += f"_gpu{device}"
    labels = {"model": args["model_name"], "version": args["model_version"]}
    return Identity(labels if speaks_for_engine else labels | {"model_instance": name}, speaks_for_engine)


class Turn:
    """The right to the series of these labels, held by one stub of a server at a time.

    It is an abstract socket address, which the kernel frees with the process, however that ends.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        server = os.getppid()
        with contextlib.suppress(OSError):  # process ids alone are no names where containers share a network
            stat = Path(f"/proc/{server}/stat").read_text()
            server_start = stat.rpartition(")")[2].split()[19]
            labels = {**labels, "server_start": server_start}
        key = repr((os.getuid(), server, sorted(labels.items())))
        self._address = "\0radix-metrics-" + hashlib.sha256(key.encode()).hexdigest()
        self._socket: socket.socket | None = None

    def take(self) -> bool:
        """False while another stub has it."""
        held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            held.bind(self._address)
        except OSError:
            held.close()
            return False
        self._socket = held
        return True

    def give_back(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
