"""A `tritonserver` that ends with the command that started it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from radix_backend.cli.ports import Ports
from radix_backend.cli.tritonserver import Server
from radix_backend.errors import InvalidArgument, RadixError, Unavailable

EXIT_SECONDS = 6  # for requests in flight when the server is told to stop; half of it is theirs
_KILL_SECONDS = 10.0  # after which a server that does not stop is killed
_START_SECONDS = 120.0
_ANSWER_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec as little as possible is done


class ServerProcess:
    """Started at once; `stop` it. Its output goes to ``log``."""

    def __init__(self, server: Server, repository: Path, ports: Ports, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._ports = ports
        path = os.pathsep.join([*server.path_entries(), os.environ.get("PATH", os.defpath)])
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    os.fspath(server.binary),
                    f"--model-repository={repository}",
                    "--model-control-mode=explicit",
                    f"--http-address={ports.host}",
                    f"--http-port={ports.http}",
                    f"--grpc-address={ports.host}",
                    f"--grpc-port={ports.grpc}",
                    f"--metrics-address={ports.host}",
                    f"--metrics-port={ports.metrics}",
                    f"--exit-timeout-secs={EXIT_SECONDS}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PATH": path},
                start_new_session=True,  # Ctrl-C is for us: we stop it in order
                preexec_fn=_end_with_parent,
            )

    def check(self) -> None:
        """Raise ServerEnded if it is not running any more."""
        status = self._process.poll()
        if status is not None:
            raise ServerEnded(status, self.log)

    def wait_live(self) -> None:
        """Until it answers. Raises ServerEnded, or Unavailable after two minutes."""
        deadline = time.monotonic() + _START_SECONDS
        with self._client() as client:
            while time.monotonic() < deadline:
                self.check()
                try:
                    if client.is_server_live(client_timeout=1.0):
                        return
                except InferenceServerException:
                    time.sleep(0.05)
        raise Unavailable(f"tritonserver did not answer within {_START_SECONDS:g} s; its log is {self.log}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_ready(self, model: str) -> bool:
        """Whether it calls the model ready. A dead stub does not change its mind."""
        with self._client() as client, contextlib.suppress(InferenceServerException):
            return bool(client.is_model_ready(model, client_timeout=_ANSWER_SECONDS))
        return False

    def reload(self, model: str, config: str | None) -> None:
        """Unload a model and load it again, for new stubs. Raises what `load` does."""
        with self._client() as client, contextlib.suppress(InferenceServerException):
            client.unload_model(model, client_timeout=_ANSWER_SECONDS)
        self.load(model, config)

    def load(self, model: str, config: str | None) -> None:
        """Load a model, with this configuration in place of its file's. Raises InvalidArgument with Triton's reason."""
        with self._client() as client:
            try:
                client.load_model(model, config=config)
            except InferenceServerException as error:
                self.check()
                raise InvalidArgument(error.message()) from None

    def wait(self, watch: Callable[[], None]) -> None:
        """Until it ends: raises ServerEnded. ``watch`` is called every so often and may raise."""
        while True:
            self.check()
            watch()
            time.sleep(0.2)

    def stop(self) -> None:
        """Ask it to stop; kill it if it does not within ten seconds."""
        memory = _shared_memory(self._process.pid)
        self._process.terminate()
        try:
            self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for path in memory:
            path.unlink(missing_ok=True)

    def _client(self) -> tritonclient.grpc.InferenceServerClient:
        return tritonclient.grpc.InferenceServerClient(self._ports.address(self._ports.grpc))


class ServerEnded(RadixError):
    """The server ended by itself; ``status`` is its exit status as a shell would see it."""

    def __init__(self, status: int, log: Path) -> None:
        self.status = 128 - status if status < 0 else status
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        lines = log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith(("E", "error"))][-5:]
        super().__init__("\n  ".join([f"tritonserver {how}; its log is {log}", *errors]))


def _shared_memory(pid: int) -> set[Path]:
    """The files that a server shares with its stubs. It leaves them when it is killed or its exit timeout expires."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except FileNotFoundError:
        return set()
    return {Path(path) for path in re.findall(r"/dev/shm/triton_python_backend_shm_region_\S+", maps)}


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
