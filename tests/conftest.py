from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from radix_backend.cli.gpu import find_gpu
from tests.models.embedded import embedded_dir

# Read when torch is imported: see radix_backend.worker. Tests share the cores with servers of their own.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# A shell has its background jobs ignore Ctrl-C, and so would every process that a test starts and then interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
if not find_gpu().present:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which transformers may do before tests.cuda


@pytest.fixture(scope="session", autouse=True)
def runtime_dir() -> Iterator[Path]:
    """A runtime directory of this session's own: its tests never join, nor are joined by, another sidecar."""
    directory = Path(tempfile.mkdtemp(prefix="radix-test-", dir="/tmp"))  # short: socket paths end at 107 bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", os.fspath(directory))
        yield directory
    shutil.rmtree(directory, ignore_errors=True)  # sidecars on their way out remove files of it too


@pytest.fixture(scope="session")
def embedded_model_dir() -> Path:
    """SmolLM2-135M-Instruct in Hugging Face layout, converted once into the user's cache."""
    return embedded_dir()
