"""Whether there is a GPU that this package can use. The standard library alone: it decides what is installed.

``python radix_backend/cli/gpu.py`` prints one line; its exit status is 0 for a usable GPU, 1 where there is none, 2 for
one that cannot be used, with the reason.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

LEAST_CAPABILITY = (8, 0)  # bf16 products, and what the kernels are compiled for
LEAST_CUDA = (13, 0)  # of the driver: what torch's default CUDA build is made for
DRIVER = Path("/proc/driver/nvidia/version")

_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Gpu:
    """What was found. Neither ``usable`` nor ``present``: there is none."""

    present: bool
    usable: bool
    finding: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.finding}; {self.advice}" if self.advice else self.finding


def find_gpu(library: str = "libcuda.so.1") -> Gpu:
    """Asks the driver, which needs no CUDA toolkit. The first device decides: it is the one that is used."""
    has_driver = DRIVER.exists()
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        if not has_driver:
            return Gpu(False, False, "none")
        return Gpu(
            True, False, f"a driver without {library}", "in a container: start it with --gpus all; else reinstall it"
        )
    status = cuda.cuInit(0)
    if status == _NO_DEVICE and not has_driver:
        return Gpu(False, False, "none")
    if status:
        return Gpu(
            True,
            False,
            f"the driver does not start: cuInit gives {_error(cuda, status)}",
            "see whether nvidia-smi works",
        )
    count, version = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    cuda.cuDriverGetVersion(ctypes.byref(version))
    if not count.value:
        return Gpu(has_driver, False, "none that this process may see", "look at CUDA_VISIBLE_DEVICES")
    return _judge(_name(cuda), _capability(cuda), (version.value // 1000, version.value % 1000 // 10), count.value)


def _judge(name: str, capability: tuple[int, int], driver_cuda: tuple[int, int], count: int) -> Gpu:
    what = f"{name}, compute capability {_dotted(capability)}, driver for CUDA {_dotted(driver_cuda)}"
    if count > 1:
        what += f" (the first of {count})"
    if capability < LEAST_CAPABILITY:
        return Gpu(True, False, what, f"accepted: compute capability {_dotted(LEAST_CAPABILITY)} or higher")
    if driver_cuda < LEAST_CUDA:
        return Gpu(True, False, what, f"install a driver for CUDA {_dotted(LEAST_CUDA)} or newer (580 or newer)")
    return Gpu(True, True, what)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _error(cuda: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorName(status, ctypes.byref(text))
    return f"{status} ({text.value.decode()})" if text.value else str(status)


def _name(cuda: ctypes.CDLL) -> str:
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), 0)
    return name.value.decode(errors="replace")


def _capability(cuda: ctypes.CDLL) -> tuple[int, int]:
    values = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        values.append(value.value)
    return values[0], values[1]


if __name__ == "__main__":
    gpu = find_gpu()
    print(gpu)
    sys.exit(0 if gpu.usable else 2 if gpu.present else 1)
