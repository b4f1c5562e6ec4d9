"""A client's way into a sidecar: join the one that serves, or start it under a supervisor, and hold a lease."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.protocol import Goodbye, Lease, Log, Pulse, Status
from radix_backend.sidecar.runtime import Claim, RunDir

SUPERVISOR = ("-m", "radix_backend.supervisor")  # what the interpreter runs
_DATAGRAM_LIMIT = 65536  # bytes: the supervisor's messages are shorter
_ANSWER_TIMEOUT = 15.0  # seconds for a supervisor to say its first word on a busy machine
_STDERR_SHOWN = 2000  # characters of a supervisor's last words in an error

_message: msgspec.json.Decoder[Status | Pulse | Log] = msgspec.json.Decoder(Status | Pulse | Log)


class LeaseSocket:
    """An open lease. The sidecar serves as long as somebody holds one; the kernel drops it with the process."""

    def __init__(self, sock: socket.socket, first: Status) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.first = first

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> Status | Pulse | Log | None:
        """The next message, None when there is none yet. Raises ConnectionError when the supervisor is gone."""
        try:
            return _receive(self._sock)
        except BlockingIOError:
            return None

    def close(self, goodbye: Goodbye | None = None) -> None:
        if goodbye is not None:
            with contextlib.suppress(OSError):
                self._sock.send(msgspec.json.encode(goodbye))
        self._sock.close()


def join_or_start(config: EngineConfig, lease: Lease) -> LeaseSocket:
    """Join the sidecar of this configuration, starting it first where none serves; returns with its first Status.

    With ``engine_endpoint`` a sidecar is never started. Does not wait for the model. Raises Unavailable when there is
    none to join or the supervisor did not start, InvalidArgument for an unusable runtime directory or interpreter.
    """
    run_dir = RunDir.of(config)
    deadline = time.monotonic() + _ANSWER_TIMEOUT
    while True:
        sock: socket.socket | None
        started = None
        if config.engine_endpoint is not None:
            sock = _join(run_dir)
        else:
            python = python_executable(config)
            with run_dir.locked():
                claim = run_dir.claim()
                if claim is not None:
                    started = _start(python, run_dir, claim, config)
                sock = _connect(run_dir)
        if sock is not None:
            sock.settimeout(max(deadline - time.monotonic(), 0.1))
            with contextlib.suppress(OSError):  # it is leaving just now, or does not answer
                sock.send(msgspec.json.encode(lease))
                while not isinstance(first := _receive(sock), Status):
                    pass
                return LeaseSocket(sock, first)
            sock.close()
        if started is not None and _ended_badly(started):
            raise Unavailable(f"the sidecar's supervisor did not start: {_last_words(run_dir)}")
        if time.monotonic() > deadline:
            raise Unavailable(f"the sidecar's supervisor in {run_dir.path} does not answer")
        time.sleep(0.05)


def python_executable(config: EngineConfig) -> str:
    """The interpreter for the sidecar. Raises InvalidArgument if there is none.

    ``sys.executable`` need not be one: a program that embeds Python, as Triton's stub does, may find itself there.
    Then only ``sys.prefix`` tells where the environment's interpreter is.
    """
    if config.engine_python is not None:
        found = shutil.which(Path(config.engine_python).expanduser())
        if found is None:
            raise InvalidArgument(
                f"setting 'engine_python' is {config.engine_python!r}; accepted: a Python interpreter, by path or name"
            )
        return os.path.abspath(found)
    if Path(sys.executable).name.startswith("python"):
        return sys.executable
    for name in (f"python{sys.version_info.major}.{sys.version_info.minor}", "python3", "python"):
        if found := shutil.which(name, path=os.path.join(sys.prefix, "bin")):
            return found
    raise InvalidArgument(
        f"there is no Python interpreter in {sys.prefix}/bin to run the engine; set 'engine_python' to one"
    )


def _start(python: str, run_dir: RunDir, claim: Claim, config: EngineConfig) -> subprocess.Popen[bytes]:
    """Hand the claim to a detached supervisor: it owns the directory from its first instruction on."""
    inherited = (claim.owner, claim.listener.fileno())
    try:
        run_dir.config.write_bytes(msgspec.json.encode(config))
        with run_dir.stderr.open("wb") as stderr:
            process = subprocess.Popen(
                [python, *SUPERVISOR, os.fspath(run_dir.path), *map(str, inherited)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd="/",
                start_new_session=True,
                pass_fds=inherited,
            )
    except OSError as error:
        raise InvalidArgument(f"the interpreter {python!r} of setting 'engine_python' does not run: {error}") from None
    finally:
        claim.close()
    # Reaped whenever it ends, so that it is no zombie of a client that lives on.
    threading.Thread(target=process.wait, name="radix-supervisor-reaper", daemon=True).start()
    return process


def _ended_badly(process: subprocess.Popen[bytes]) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=2) != 0
    return False


def _join(run_dir: RunDir) -> socket.socket:
    """Raises Unavailable when no sidecar serves."""
    with contextlib.suppress(FileNotFoundError):
        run_dir.check()
        if (sock := _connect(run_dir)) is not None:
            return sock
    raise Unavailable(f"no engine serves {run_dir.path}; start one with `radix-backend engine`")


def _connect(run_dir: RunDir) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(os.fspath(run_dir.lease_socket))
    except (FileNotFoundError, ConnectionRefusedError):
        sock.close()
        return None
    return sock


def receive_datagram(sock: socket.socket) -> bytes:
    """One message of a lease socket; b"" when the other side has closed it."""
    try:
        return sock.recv(_DATAGRAM_LIMIT)
    except ConnectionResetError:  # it closed with messages of ours unread; its own last ones still wait
        return sock.recv(_DATAGRAM_LIMIT)


def _receive(sock: socket.socket) -> Status | Pulse | Log:
    datagram = receive_datagram(sock)
    if not datagram:
        raise ConnectionResetError("the supervisor is gone")
    return _message.decode(datagram)


def _last_words(run_dir: RunDir) -> str:
    with contextlib.suppress(OSError):
        return run_dir.stderr.read_text(errors="replace").strip()[-_STDERR_SHOWN:] or "it left no message"
    return "it left no message"
