"""The examples of the pages about our doors do what the pages say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.tiny import save_tiny

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("offline.md", "command-line.md")
_BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def examples() -> list[pytest.ParameterSet]:
    """Language, code and (where the page shows it) output of each."""
    found = []
    for page in PAGES:
        for number, match in enumerate(_BLOCK.finditer((DOCS / page).read_text())):
            marks = [pytest.mark.model] + [pytest.mark.server] * ("backend serve" in match[2])
            found.append(pytest.param(*match.groups(), id=f"{page}-{number}", marks=marks))
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader works: with a model in it."""
    directory = tmp_path_factory.mktemp("reader")
    save_tiny(directory / "Qwen3-0.6B", "qwen3", max_position_embeddings=8192)
    (directory / "bin").mkdir()
    command = directory / "bin" / "radix-backend"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m radix_backend.cli "$@"\n')
    command.chmod(0o755)
    return directory


@pytest.mark.parametrize(("language", "code", "output"), examples())
def test_the_example_runs(
    directory: Path, embedded_model_dir: Path, language: str, code: str, output: str | None
) -> None:
    program = {"python": [sys.executable, "-c"], "sh": ["bash", "-euo", "pipefail", "-c"]}[language]
    environment = os.environ | {"PATH": f"{directory / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run([*program, code], cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() if output is None else done.stdout.rstrip() == output.rstrip()


@pytest.mark.parametrize("command", ["serve", "openai", "engine", "bench", "chat", "top", "profile", "prebuild"])
def test_every_command_has_the_flags_of_the_engine(directory: Path, command: str) -> None:
    """Those of the project's first server by name; tests/cli/test_settings.py has all of them."""
    help = subprocess.run([directory / "bin" / "radix-backend", command, "--help"], capture_output=True, text=True)
    flags = (
        "model gpu-memory-utilization max-bs tp-size pp-size nccl-port device-ids context-len enforce-eager log-level "
        "profile profile-dir disable-async-scheduling"
    )
    for flag in (*flags.split(), *(["host", "port"] if command in ("serve", "openai") else [])):
        assert re.search(rf"--{flag}\b", help.stdout), flag
