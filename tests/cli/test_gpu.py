"""Looking for a GPU, against libraries that answer as a driver does: no machine has every kind of broken GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from radix_backend.cli import gpu as module
from radix_backend.cli.gpu import find_gpu

_DRIVER = """
#include <string.h>
int cuInit(unsigned flags) {{ return {init}; }}
int cuGetErrorName(int status, const char **text) {{ *text = "CUDA_ERROR_UNKNOWN"; return 0; }}
int cuDeviceGetCount(int *count) {{ *count = {count}; return 0; }}
int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}
int cuDeviceGetName(char *name, int size, int device) {{ strncpy(name, "NVIDIA Test", size); return 0; }}
int cuDeviceGetAttribute(int *value, int attribute, int device) {{
    *value = attribute == 75 ? {capability} / 10 : {capability} % 10;
    return 0;
}}
"""


def driver(directory: Path, init: int = 0, count: int = 1, version: int = 13000, capability: int = 90) -> str:
    source, library = directory / "driver.c", directory / "libcuda.so.1"
    source.write_text(_DRIVER.format(init=init, count=count, version=version, capability=capability))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return str(library)


def test_a_gpu_that_can_be_used_is_named(tmp_path: Path) -> None:
    gpu = find_gpu(driver(tmp_path))
    assert gpu.usable
    assert str(gpu) == "NVIDIA Test, compute capability 9.0, driver for CUDA 13.0"


@pytest.mark.parametrize(
    ("driven", "reason"),
    [
        ({"capability": 75}, "compute capability 7.5, driver for CUDA 13.0; accepted: compute capability 8.0"),
        ({"version": 12040}, "driver for CUDA 12.4; install a driver for CUDA 13.0 or newer"),
        ({"init": 999}, "cuInit gives 999 (CUDA_ERROR_UNKNOWN)"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_there_and_explained(tmp_path: Path, driven: dict[str, int], reason: str) -> None:
    gpu = find_gpu(driver(tmp_path, **driven))
    assert (gpu.present, gpu.usable) == (True, False)
    assert reason in str(gpu)


def test_a_driver_without_its_library_asks_for_the_container_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version")
    monkeypatch.setattr(module, "DRIVER", version)
    gpu = find_gpu("libcuda-missing.so.1")
    assert (gpu.present, gpu.usable) == (True, False)
    assert "--gpus all" in str(gpu)


def test_no_driver_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRIVER", tmp_path / "none")
    assert str(find_gpu("libcuda-missing.so.1")) == "none"
    assert str(find_gpu(driver(tmp_path, init=100))) == "none"


def test_the_file_runs_by_itself_before_anything_is_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(module.__file__)], capture_output=True, text=True, check=False
    )
    expected = find_gpu()
    assert done.stdout.strip() == str(expected)
    assert done.returncode == (0 if expected.usable else 2 if expected.present else 1)
