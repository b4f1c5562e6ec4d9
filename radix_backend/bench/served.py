"""A server of the bench's own: `radix-backend serve` with the given settings, on free ports."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping

from radix_backend.bench.processes import cpu_seconds, free_ports, sidecar_processes, triton_processes
from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig

MODEL = "radix"
_START_SECONDS = 600.0  # the first start converts the model
_STOP_SECONDS = 60.0


class Served:
    """Ready when the constructor returns; `close` it."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        http, grpc, metrics = free_ports(3)
        self.url = f"127.0.0.1:{grpc}"
        ports = ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        self._server = subprocess.Popen(
            [sys.executable, "-m", "radix_backend.cli", "serve", "--no-example", *ports, *flags],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,  # our own output may be read by a program
        )
        try:
            config = EngineConfig.parse(settings)
            self.engine = EngineClient(config)
            self.engine.wait_ready(_START_SECONDS)
            _wait_served(f"http://127.0.0.1:{http}/v2/models/{MODEL}/ready", self._server)
            self._processes = {**triton_processes(self._server.pid), **sidecar_processes(config)}
        except BaseException:
            self._server.terminate()
            raise

    def cpu_seconds(self) -> dict[str, float]:
        """Of tritonserver, stub, gateway and engine, since they started."""
        return {role: cpu_seconds(pid) for role, pid in self._processes.items()}

    def close(self) -> None:
        self.engine.close()
        self._server.terminate()
        self._server.wait(_STOP_SECONDS)


def _wait_served(url: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server ended; its output is above")
