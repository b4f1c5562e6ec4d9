"""A private world for each test: its own runtime directory, home and model directory, and fake sidecar processes."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig
from radix_backend.sidecar import lease
from radix_backend.sidecar.runtime import RunDir

FAKES = Path(__file__).parent / "fakes"
PATIENCE = 30.0  # seconds: a bound on hanging, not an expectation


def eventually(what: Callable[[], Any]) -> Any:
    """Wait until ``what()`` is true; returns it."""
    deadline = time.monotonic() + PATIENCE
    while not (value := what()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)
    return value


class World:
    def __init__(self, root: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.model = model
        self._monkeypatch = monkeypatch
        self._clients: list[EngineClient] = []
        self._processes: list[subprocess.Popen[str]] = []
        self.hang_after(60)

    def hang_after(self, seconds: float) -> None:
        self._monkeypatch.setattr(lease, "SUPERVISOR", [str(FAKES / "supervisor.py"), str(seconds)])

    def config(self, **settings: Any) -> EngineConfig:
        return EngineConfig.parse({"model": str(self.model), "linger": 0.2} | settings)

    @property
    def run_dir(self) -> RunDir:
        return RunDir.of(self.config())

    def client(self, *, ready: bool = True, config: EngineConfig | None = None, **arguments: Any) -> EngineClient:
        client = EngineClient(config or self.config(), **arguments)
        self._clients.append(client)
        if ready:
            client.wait_ready(PATIENCE)
        return client

    def client_process(self, mode: str = "close", through: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """A client elsewhere; returns at once."""
        config = json.dumps(msgspec.to_builtins(self.config()))
        process = subprocess.Popen(
            [*through, sys.executable, str(FAKES / "client.py"), json.dumps(lease.SUPERVISOR), config, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    def misbehave(self, name: str, text: str = "") -> None:
        (self.model / name).write_text(text)

    def behave(self, name: str) -> None:
        (self.model / name).unlink()

    def started(self, name: str) -> list[int]:
        """Process ids of all processes of this name so far."""
        path = self.model / "started"
        lines = path.read_text().splitlines() if path.exists() else []
        return [int(line.split()[1]) for line in lines if line.split()[0] == name]

    def supervisor(self) -> int:
        pid = self.run_dir.owner_pid()
        assert pid is not None
        return pid

    def alive(self) -> list[psutil.Process]:
        """All processes of this world's sidecars."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            command = " ".join(process.info["cmdline"] or [])
            if str(self.root) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def gone(self) -> bool:
        return not self.alive() and not self.run_dir.path.exists()

    def end(self) -> None:
        for client in self._clients:
            client.close(linger=False)
        for process in self._processes:
            process.kill()
            with process:  # closes its pipes and waits
                pass
        leaving = self.alive()
        for sidecar in leaving:
            with contextlib.suppress(psutil.NoSuchProcess):
                sidecar.kill()
        psutil.wait_procs(leaving, PATIENCE)  # none of them is removing files any more
        shutil.rmtree(self.root)
