"""What script/server installs can be installed together: pip resolves it, without installing anything."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
INDEX = "https://pypi.org/simple"


def resolved(tmp_path: Path, extras: str) -> dict[str, str]:
    try:
        urllib.request.urlopen(f"{INDEX}/pip/", timeout=10).close()
    except OSError as error:
        pytest.skip(f"{INDEX} cannot be reached: {error}")
    report = tmp_path / "report.json"
    options = [
        "--isolated",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--disable-pip-version-check",
        "--index-url",
        INDEX,
    ]
    command = [sys.executable, "-m", "pip", "install", *options, "--report", str(report), f"{CHECKOUT}[{extras}]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = (item["metadata"] for item in json.loads(report.read_text())["install"])
    return {item["name"].lower(): item["version"] for item in found}


def test_the_gpu_install_resolves_to_torch_with_cuda_and_a_numpy_that_the_stub_bears(tmp_path: Path) -> None:
    found = resolved(tmp_path, "cuda,server,openai")
    assert not found["torch"].endswith("+cpu")
    assert any(name.startswith("nvidia-cu") for name in found)
    assert found["numpy"].startswith("1.")
    assert {"triton", "flashinfer-python", "tritonclient", "tokenizers"} <= set(found)
