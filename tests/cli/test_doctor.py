from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from radix_backend.cli import doctor, main


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, str]]:
    """Exit status, and verdict and finding of each check by its subject."""
    status = main(["doctor", *arguments])
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:4].strip() in ("ok", "warn", "FAIL")]
    return status, {line[6:21].strip(): f"{line[:4].strip()} {line[22:]}" for line in lines}


def test_machine_that_runs_these_tests_is_fit(capsys: pytest.CaptureFixture[str]) -> None:
    status, checks = report(capsys)
    assert status == 0
    assert not [subject for subject, verdict in checks.items() if verdict.startswith("FAIL")]
    for subject in (
        "python",
        "glibc",
        "tritonserver",
        "python stub",
        "shared memory",
        "cache",
        "torch",
        "embedded model",
    ):
        assert checks[subject].startswith("ok "), checks[subject]


def test_doctor_imports_no_torch() -> None:
    assert os.system(f"{sys.executable} -c 'import sys, radix_backend.cli; sys.exit(\"torch\" in sys.modules)'") == 0


def test_engine_environment_without_torch_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    status, checks = report(capsys, "--engine-python", str(bare))
    assert status == 1
    assert checks["torch"] == "FAIL ModuleNotFoundError: No module named 'torch'"
    assert checks["engine packages"].startswith("FAIL no numba, safetensors, tokenizers")
    assert checks["embedded model"].startswith("warn not installed")
    assert checks["tritonserver"].startswith("ok ")


def test_interpreter_that_does_not_run_fails(capsys: pytest.CaptureFixture[str]) -> None:
    status, checks = report(capsys, "--engine-python", "/nowhere/python")
    assert status == 1
    assert checks["engine"].startswith("FAIL /nowhere/python does not run")


def test_runtime_directory_open_to_others_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, runtime_dir: Path
) -> None:
    root = runtime_dir / "open"
    (root / "radix-backend").mkdir(parents=True)
    (root / "radix-backend").chmod(0o755)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(root))
    status, checks = report(capsys)
    shutil.rmtree(root)
    assert status == 1
    assert checks["runtime dir"].startswith("FAIL")


def test_little_space_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    for free, verdict in ((100 << 20, "FAIL"), (1 << 30, "warn"), (8 << 30, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert doctor._disk().verdict == verdict


@pytest.mark.parametrize(
    ("found", "finding"),
    [
        ({"triton": "3.6.0"}, "ok triton 3.6.0"),
        ({"triton": None}, "warn the package 'triton' is missing; the GPU computes in plain torch, many times slower"),
        (
            {"triton": "3.6.0", "no_kernels": "RuntimeError: Failed to find C compiler"},
            "warn triton 3.6.0: RuntimeError: Failed to find C compiler; the GPU computes in plain torch, many times "
            "slower",
        ),
    ],
)
def test_kernels_that_cannot_be_compiled_make_a_gpu_slow(found: dict[str, str | None], finding: str) -> None:
    engine = {"torch": "2.11", "torch_cuda": "13.0", "cuda": ["NVIDIA Test"], "flashinfer-python": None}
    checks = {check.subject: check for check in doctor._gpu_packages({**engine, **found}, "python3")}
    kernels = checks["triton kernels"]
    assert f"{kernels.verdict} {kernels.finding}" == finding
    assert bool(kernels.advice) == (kernels.verdict == "warn")
