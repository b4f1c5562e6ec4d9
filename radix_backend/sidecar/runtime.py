"""The private directory of one sidecar, and the two locks in it that say who may start and who serves.

``lock`` is held for moments: by a client while it joins or starts, by a supervisor while it removes the directory.
``owner`` is held by the supervisor for its whole life. Both are flocks, so a SIGKILL frees them: files beside a free
``owner`` are a dead predecessor's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from radix_backend.config import EngineConfig, runtime_root
from radix_backend.errors import InvalidArgument

_SOCKET_PATH_LIMIT = 107  # bytes: sockaddr_un.sun_path without its final NUL
_LONGEST_SOCKET_NAME = "gateway-999999.sock"
_HINT = "Set XDG_RUNTIME_DIR (or engine_endpoint) to a short directory of yours"
_LEFTOVERS = ("lease.sock", "config.json", "stderr", "gateway-*.sock", "engine-*.sock")


@dataclass(frozen=True)
class Claim:
    """Ownership of a run directory: the held ``owner`` lock and the listening lease socket. Both can be inherited."""

    owner: int  # file descriptor
    listener: socket.socket

    def sign(self) -> None:
        """Note this process's id for people to read."""
        os.ftruncate(self.owner, 0)
        os.pwrite(self.owner, str(os.getpid()).encode(), 0)

    def close(self) -> None:
        """Close this process's copies; the claim lives on in a process that inherited them."""
        self.listener.close()
        os.close(self.owner)


class RunDir:
    """Paths and locks of one sidecar. Raises InvalidArgument if ``path`` is too long to hold sockets."""

    def __init__(self, path: Path, root: Path | None = None) -> None:
        """``root`` is the directory of all our run directories, which must be private too."""
        longest = len(os.fsencode(path / _LONGEST_SOCKET_NAME))
        if longest > _SOCKET_PATH_LIMIT:
            raise InvalidArgument(
                f"runtime directory {path} makes socket paths of {longest} bytes; accepted: at most "
                f"{_SOCKET_PATH_LIMIT}. {_HINT}"
            )
        self.path = path
        self.config = path / "config.json"
        self.lease_socket = path / "lease.sock"
        self.stderr = path / "stderr"
        self._levels = (root, path) if root else (path,)

    @classmethod
    def of(cls, config: EngineConfig) -> RunDir:
        """Where clients with this configuration meet."""
        if config.engine_endpoint is not None:
            return cls(Path(config.engine_endpoint).expanduser().absolute())
        root = runtime_root()
        return cls(root / config.identity(), root)

    def gateway_address(self, generation: int) -> str:
        """Where the gateway of this generation serves clients. No two generations share an address."""
        return f"ipc://{self.path}/gateway-{generation}.sock"

    def engine_address(self, generation: int) -> str:
        return f"ipc://{self.path}/engine-{generation}.sock"

    def check(self) -> None:
        """Raise InvalidArgument unless the directory is ours alone, FileNotFoundError if there is none."""
        for path in self._levels:
            _check_private(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory where it is missing, check it, and hold ``lock``. Raises InvalidArgument."""
        while True:
            for path in self._levels:
                _make_private(path)
            with contextlib.suppress(FileNotFoundError):  # a leaving supervisor removed the directory just now
                self.check()
                fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                fcntl.flock(fd, fcntl.LOCK_EX)
                if self._holds("lock", fd):
                    break
                os.close(fd)
        try:
            yield
        finally:
            os.close(fd)

    def claim(self) -> Claim | None:
        """Become the owner, clearing what a killed predecessor left; None if an owner lives. Call it `locked`."""
        owner = os.open(self.path / "owner", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(owner)
            return None
        self._clear()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(os.fspath(self.lease_socket))
        listener.listen(128)
        return Claim(owner, listener)

    def remove(self, claim: Claim) -> None:
        """Give the claim up and remove the directory, unless somebody else's has taken its place meanwhile."""
        claim.listener.close()
        with self.locked():
            if self._holds("owner", claim.owner):
                self._clear()
                for name in ("owner", "lock"):
                    (self.path / name).unlink()
                with contextlib.suppress(OSError):  # somebody keeps own files here, or it is a mount point
                    self.path.rmdir()
            os.close(claim.owner)

    def owner_pid(self) -> int | None:
        """The supervisor's process id, as it wrote it."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.path / "owner").read_text())
        return None

    def _holds(self, name: str, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path / name))
        except FileNotFoundError:
            return False

    def _clear(self) -> None:
        for pattern in _LEFTOVERS:
            for path in self.path.glob(pattern):
                path.unlink()


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise InvalidArgument(f"runtime directory {path} cannot be created: {error.strerror}. {_HINT}") from None


def _check_private(path: Path) -> None:
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode):
        problem = "is a symbolic link" if stat.S_ISLNK(info.st_mode) else "is not a directory"
    elif info.st_uid != os.getuid():
        problem = f"belongs to user {info.st_uid}"
    elif info.st_mode & 0o077:
        problem = f"is open to others (mode {stat.S_IMODE(info.st_mode):o})"
    else:
        return
    raise InvalidArgument(
        f"runtime directory {path} {problem}; accepted: a directory of user {os.getuid()} with mode 700"
    )
