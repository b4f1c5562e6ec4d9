"""Where the server comes from. That it runs is what every test of a real server shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from radix_backend.cli import main, tritonserver
from radix_backend.cli.tritonserver import PYTHON, STUB, find_server
from radix_backend.errors import NotFound


def fake_server(directory: Path, stub: bytes) -> Path:
    for path in (directory / "bin", directory / "backends" / "python"):
        path.mkdir(parents=True)
    binary = directory / "bin" / "tritonserver"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    (directory / "backends" / "python" / STUB).write_bytes(stub)
    return binary


def test_server_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = fake_server(tmp_path / "mine", b"...libpython3.9.so.1.0...")
    monkeypatch.setenv("PATH", f"{binary.parent}:{os.environ['PATH']}")
    server = find_server()
    assert (server.binary, server.from_wheel, server.stub_python()) == (binary, False, "3.9")


def test_container_s_server_comes_before_the_wheel_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = fake_server(tmp_path / "opt", b"libpython3.12.so.1.0")
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    monkeypatch.setattr(tritonserver, "CONTAINER", binary)
    assert find_server().binary == binary


def test_no_server_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    monkeypatch.setattr(tritonserver, "CONTAINER", tmp_path / "none")
    monkeypatch.setattr(tritonserver, "wheel_root", lambda: None)
    with pytest.raises(NotFound, match=r"no tritonserver on PATH.* pip install --no-deps nvidia-pytriton"):
        find_server()


def test_printed_environment_finds_the_server_and_this_python(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = capsys.readouterr().out
    script = f'{lines}\ncommand -v tritonserver; python3 -c "import sys; print(sys.prefix)"'
    output = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == [os.fspath(find_server().binary), sys.prefix]
    assert find_server().stub_python() == PYTHON
