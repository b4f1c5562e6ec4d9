"""Finds a `tritonserver`, and makes the one of the PyPI wheel runnable by its plain name."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from radix_backend.config import radix_home
from radix_backend.errors import NotFound

WHEEL = "nvidia-pytriton==0.7.0"  # carries Triton 2.51
CONTAINER = Path("/opt/tritonserver/bin/tritonserver")
STUB = "triton_python_backend_stub"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

_INSTALL = f"run script/server, or: {sys.executable} -m pip install --no-deps {WHEEL}"


@dataclass(frozen=True)
class Server:
    """A server that can be started as ``tritonserver`` in `environment`."""

    binary: Path
    python_backend: Path  # the directory that holds the stub

    @property
    def from_wheel(self) -> bool:
        wheel = wheel_root()
        return wheel is not None and (self.python_backend / "libtriton_python.so").resolve().is_relative_to(wheel)

    def stub_python(self) -> str | None:
        """The Python that runs models, such as "3.11"; None if there is no stub."""
        stub = self.python_backend / STUB
        match = re.search(rb"libpython(3\.\d+)\.so", stub.read_bytes()) if stub.exists() else None
        return match[1].decode() if match else None

    def path_entries(self) -> list[str]:
        """What must lead PATH: the stub uses the packages of the Python that comes first."""
        return [os.fspath(self.binary.parent), os.path.dirname(sys.executable)]


def find_server() -> Server:
    """On PATH, then NVIDIA's container, then the wheel. Raises NotFound with what to do."""
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return _installed(Path(on_path))
    if CONTAINER.exists():
        return _installed(CONTAINER)
    wheel = wheel_root()
    if wheel is None:
        raise NotFound(f"no tritonserver on PATH, in {CONTAINER.parent} or from a wheel; {_INSTALL}")
    return _lay_out(wheel)


def wheel_root() -> Path | None:
    """The ``tritonserver`` directory inside the wheel, if this Python has it."""
    spec = importlib.util.find_spec("pytriton")
    for location in (spec.submodule_search_locations or []) if spec else []:
        root = Path(location) / "tritonserver"
        if (root / "bin" / "tritonserver").exists():
            return root.resolve()
    return None


def wheel_stub(wheel: Path) -> Path:
    """The wheel's stub for this Python; it may not exist."""
    return wheel / "python_backend_stubs" / PYTHON / STUB


def find_libpython() -> Path | None:
    """The shared library of this Python, which the wheel's stub needs."""
    name = f"libpython{PYTHON}.so.1.0"
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    directories = [sysconfig.get_config_var("LIBDIR"), os.path.join(sys.base_prefix, "lib"), "/usr/lib", "/usr/lib64"]
    for directory in filter(None, directories):
        for path in (Path(directory) / name, Path(directory) / multiarch / name):
            if path.exists():
                return path
    return None


def libpython_hint() -> str:
    return f"install the package libpython{PYTHON} (Debian, Ubuntu: apt-get install libpython{PYTHON})"


def _installed(binary: Path) -> Server:
    return Server(binary, binary.resolve().parent.parent / "backends" / "python")


def _lay_out(wheel: Path) -> Server:
    """Give the wheel's server what it lacks: the stub for this Python beside its backend, libpython, a plain name.

    Raises NotFound if there is no stub for this Python, or no libpython.
    """
    stub = wheel_stub(wheel)
    if not stub.exists():
        raise NotFound(f"{WHEEL} has no stub for Python {PYTHON}; accepted: Python 3.10 to 3.12")
    libpython = find_libpython()
    if libpython is None:
        raise NotFound(f"libpython{PYTHON}.so.1.0 is missing; {libpython_hint()}")
    key = hashlib.blake2b(f"{wheel} {os.path.dirname(sys.executable)}".encode(), digest_size=4).hexdigest()
    home = radix_home() / "tritonserver" / f"python{PYTHON}-{key}"
    for path in [*(wheel / "backends" / "python").iterdir(), stub]:
        if path.name != "__pycache__":
            _link(path, home / "backends" / "python" / path.name)
    _link(libpython, home / "lib" / libpython.name)  # alone: other libraries beside it are not meant for the server
    wrapper = home / "bin" / "tritonserver"
    _write(
        wrapper,
        _WRAPPER.format(
            lib=_quote(home / "lib"),
            venv=_quote(os.path.dirname(sys.executable)),
            binary=_quote(wheel / "bin" / "tritonserver"),
            backends=_quote(home / "backends"),
        ),
    )
    return Server(wrapper, home / "backends" / "python")


_WRAPPER = """\
#!/bin/sh
# Written by radix-backend: the tritonserver of a PyPI wheel, with the stub and the libpython of one Python.
export LD_LIBRARY_PATH={lib}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}
export PATH={venv}:"$PATH"
exec {binary} --backend-directory={backends} "$@"
"""


def _quote(path: str | Path) -> str:
    return shlex.quote(os.fspath(path))


def _link(target: Path, link: Path) -> None:
    if link.is_symlink() and os.readlink(link) == os.fspath(target):
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    aside = link.with_name(f".{link.name}.{os.getpid()}")
    aside.symlink_to(target)
    aside.replace(link)


def _write(path: Path, text: str) -> None:
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.chmod(0o755)
    aside.replace(path)
