"""The stubs of one model: processes of the server that it neither restarts nor misses when they die."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from radix_backend.cli.tritonserver import STUB
from radix_backend.sidecar.leases import Process


class StubWatch:
    """Tells a stub that died from one that the server has ended or replaced."""

    def __init__(self, server: int, model_dir: Path, is_ready: Callable[[], bool]) -> None:
        """``server`` is the server's process id; ``is_ready`` asks whether it still calls the model ready."""
        self._server = server
        self._model_dir = model_dir
        self._is_ready = is_ready
        self._stubs: list[Process] = []
        self.renew()

    def renew(self) -> None:
        """The stubs that run now are those to watch."""
        self._stubs = stubs_of(self._server, self._model_dir)

    def died(self) -> bool:
        """Whether one died and the server does not know. Cheap while all live."""
        if all(stub.alive() for stub in self._stubs):
            return False
        known = {stub.pid for stub in self._stubs}
        if any(stub.pid not in known for stub in stubs_of(self._server, self._model_dir)):
            self.renew()  # the model was loaded again, with other stubs
            return False
        if not self._is_ready():
            self._stubs = []  # it was unloaded; somebody may load it again
            return False
        return True


def stubs_of(server: int, model_dir: Path) -> list[Process]:
    """The living stubs that this server runs for a model. A stub's arguments begin with the path of its model.py."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            arguments = Path(entry.path, "cmdline").read_bytes().split(b"\0")
            if not any(argument.endswith(STUB.encode()) for argument in arguments[:1]):
                continue
            if not any(argument.startswith(os.fsencode(model_dir) + b"/") for argument in arguments):
                continue
            stub = Process(int(entry.name))
            if stub.alive() and server in (stub.parent_pid, Process(stub.parent_pid).parent_pid):
                found.append(stub)
    return found
