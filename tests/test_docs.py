"""The examples of the pages about our doors do what the pages say."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from radix_backend.bench import __main__ as bench
from radix_backend.cli import make_parser
from tests.models.tiny import save_tiny

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/offline.md", "docs/command-line.md")
_BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def examples() -> list[pytest.ParameterSet]:
    """Language, code and (where the page shows it) output of each."""
    found = []
    for page in PAGES:
        for number, match in enumerate(_BLOCK.finditer((CHECKOUT / page).read_text())):
            marks = [pytest.mark.model] + [pytest.mark.server] * ("backend serve" in match[2])
            found.append(pytest.param(*match.groups(), id=f"{page}-{number}", marks=marks))
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader works: with a model in it."""
    directory = tmp_path_factory.mktemp("reader")
    save_tiny(directory / "Qwen3-0.6B", "qwen3", max_position_embeddings=8192)
    (directory / "bin").mkdir()
    for name, meant in (("radix-backend", "-m radix_backend.cli "), ("python", "")):
        command = directory / "bin" / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {meant}"$@"\n')
        command.chmod(0o755)
    return directory


@pytest.mark.parametrize(("language", "code", "output"), examples())
def test_the_example_runs(
    directory: Path, embedded_model_dir: Path, language: str, code: str, output: str | None
) -> None:
    done = run_example(directory, language, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() if output is None else done.stdout.rstrip() == output.rstrip()


def run_example(directory: Path, language: str, code: str) -> subprocess.CompletedProcess[str]:
    program = {"python": [sys.executable, "-c"], "sh": ["bash", "-euo", "pipefail", "-c"]}[language]
    environment = os.environ | {"PATH": f"{directory / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run([*program, code], cwd=directory, env=environment, capture_output=True, text=True, timeout=300)


def test_the_readme_s_server_answers_its_request(directory: Path) -> None:
    lines = commands("README.md")
    (server,) = (line for line in lines if "radix_backend.openai" in line)
    (request,) = (line for line in lines if "/v1/chat/completions" in line)
    ready = "until curl -sf http://127.0.0.1:8000/health; do kill -0 $!; sleep 0.2; done"
    done = run_example(directory, "sh", f"{server} &\n{ready}\n{request} --fail-with-body\nkill $!\nwait $!")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("data: [DONE]")


# ── what is not run is at least there ────────────────────────────────────────────────────

_SHELL = re.compile(r"^```(?:sh)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OTHER = re.compile(r"^```\w+\n.*?^```$", re.MULTILINE | re.DOTALL)
_END_OF_COMMAND = re.compile(r"[;|&)]|\d?>|$")
_OURS = re.compile(r"(?:\.venv/bin/)?(radix-backend|script/server|python -m radix_backend\.openai)(?= |$)")
_FIRST_WORDS = {"radix-backend": [], "script/server": ["serve"], "python -m radix_backend.openai": ["openai"]}
_NAMED = re.compile(r"(?:client_examples|docker|script|model_repository)/[\w./-]+")
_MODULE = re.compile(r"-m (radix_backend\.[\w.]+)")


def commands(page: str) -> list[str]:
    """Lines of the page's blocks for a shell."""
    text = _OTHER.sub(lambda block: block[0] if block[0].startswith("```sh") else "", (CHECKOUT / page).read_text())
    lines = (line for block in _SHELL.findall(text) for line in block.replace("\\\n", " ").splitlines())
    return [line.split(" # ")[0].strip() for line in lines]


PAGES_WITH_COMMANDS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in CHECKOUT.glob("docs/*.md")),
]


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_commands_have_the_flags_and_files_that_the_page_shows(page: str) -> None:
    for line in commands(page):
        assert all((CHECKOUT / path).exists() for path in _NAMED.findall(line)), line
        assert all(importlib.util.find_spec(module) for module in _MODULE.findall(line)), line
        for match in _OURS.finditer(line.replace("script/server --no-install", "script/server")):
            rest = match.string[match.end() :]
            given = shlex.split(rest[: _END_OF_COMMAND.search(rest).start()])  # type: ignore[union-attr]
            words = [*_FIRST_WORDS[match[1]], *given]
            if words[0] == "bench":
                bench.make_parser().parse_args(words[1:])
            else:
                make_parser().parse_args(words)  # ends this process with what is wrong


@pytest.mark.parametrize("line", [line for line in commands("docs/docker.md") if line.startswith("docker run")])
def test_containers_have_the_flags_that_the_page_shows(line: str) -> None:
    _, _, given = re.fullmatch(r"(docker run .*) (radix-backend:\w+) ?(.*)", line).groups()  # type: ignore[union-attr]
    words = shlex.split(given)
    make_parser().parse_args(words if words and not words[0].startswith("-") else ["serve", *words])


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
