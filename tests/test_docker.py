"""What the images do, outside of one: their scripts, and what their files say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from packaging.utils import canonicalize_name

from tests.models.tiny import save_tiny
from tests.triton.server import START_SECONDS, eventually, free_ports, gone
from tests.triton.test_metrics import needs

CHECKOUT = Path(__file__).resolve().parents[1]
DOCKER = CHECKOUT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Laid out as in the CUDA image: the server's environment, and beside it the engine's, here that of the tests."""
    prefix = tmp_path_factory.mktemp("opt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(DOCKER / "install"), str(prefix / "server"), "server"]
    subprocess.run(command, env=environment | {"PIP_NO_CACHE_DIR": ""}, check=True, timeout=600)
    (prefix / "engine").symlink_to(sys.prefix)
    return prefix


def run(prefix: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The entry point of an image that was laid out in ``prefix``."""
    return subprocess.run(
        [str(DOCKER / "entrypoint"), *arguments],
        env=image(prefix),
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def image(prefix: Path) -> dict[str, str]:
    return os.environ | {"PATH": f"{prefix / 'server' / 'bin'}:{os.environ['PATH']}"}


def canonical(requirements: str) -> set[str]:
    """Lines ``name==version``, with names as package indexes compare them."""
    pairs = [line.split("==") for line in requirements.splitlines() if not line.startswith("#")]
    return {f"{canonicalize_name(name)}=={version}" for name, version in pairs}


def healthcheck(port: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(DOCKER / "healthcheck"), str(port)], capture_output=True, text=True, timeout=60)


@contextmanager
def container(prefix: Path, model: Path) -> Iterator[tuple[psutil.Process, int, int]]:
    """The process, its HTTP port and its health port."""
    http, grpc, metrics, health = free_ports(4)
    flags = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", f"--health-port={health}"]
    settings = ["--host=127.0.0.1", f"--model={model}", "--dtype=float32", "--kv-cache-memory=16MiB"]
    process = psutil.Popen([str(DOCKER / "entrypoint"), *flags, *settings], env=image(prefix), cwd="/")
    try:
        yield process, http, health
    finally:
        if process.is_running():
            process.terminate()
            process.wait(30)


@pytest.mark.server
def test_a_container_serves_and_its_health_check_tells_the_truth(prefix: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    with container(prefix, model) as (process, http, health):
        assert healthcheck(health).stderr.startswith("nobody answers: ")
        eventually(lambda: healthcheck(health).returncode == 0, START_SECONDS)
        asked = run(prefix, "chat", f"http://127.0.0.1:{http}", "--set=max_tokens=3", input="hello")
        assert (asked.returncode, " + 3, " in asked.stderr) == (0, True), asked.stderr
        everything = process.children(recursive=True)
        (server,) = (child for child in everything if child.name() == "tritonserver")
        assert str(prefix / "server") in " ".join(server.environ()["PATH"].split(":"))
        server.suspend()
        try:
            ill = healthcheck(health)
        finally:
            server.resume()
        assert ill.returncode == 1
        assert "tritonserver does not answer" in ill.stderr
        process.terminate()
        assert process.wait(30) == 0
        eventually(lambda: gone(everything))
    assert healthcheck(health).returncode == 1


def test_the_engine_s_commands_run_in_its_own_environment(prefix: Path) -> None:
    assert "--endpoint" in run(prefix, "engine", "--help").stdout
    found = run(prefix, "env")
    assert found.stdout.startswith("export PATH=")
    assert str(prefix / "server") in found.stdout


def test_what_is_installed_has_the_versions_that_are_pinned(prefix: Path) -> None:
    python = prefix / "server" / "bin" / "python"
    listing = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    pins = canonical((DOCKER / "constraints-cpu.txt").read_text())
    installed = canonical(listing.stdout)
    others = ("radix-backend", "nvidia-pytriton", "setuptools")  # ours, script/lib.sh's, the interpreter's
    assert {line for line in installed - pins if not line.startswith(others)} == set()
    assert "numpy==1.26.4" in installed  # the stub bears no numpy 2


@pytest.mark.parametrize("arguments", [[], ["/tmp/x"], ["/tmp/x", "rocm"]])
def test_wrong_arguments_of_install_are_told(arguments: list[str]) -> None:
    done = subprocess.run([str(DOCKER / "install"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: docker/install DIR server|cpu|cuda")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    hadolint = Path(sys.prefix, "bin", "hadolint")
    done = subprocess.run([hadolint, dockerfile], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_the_scripts_of_the_checkout_and_not_as_root(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    named = {word.strip('[]",') for word in text.split() if "/opt/radix/source/" in word}
    scripts = {CHECKOUT / path.removeprefix("/opt/radix/source/") for path in named}
    assert scripts == {DOCKER / name for name in ("install", "entrypoint", "healthcheck")}
    assert all(os.access(script, os.X_OK) for script in scripts)
    user = [line for line in text.splitlines() if line.startswith("USER ")]
    assert user == ["USER 10001"]
    assert text.index(user[0]) < text.index("HEALTHCHECK") < text.index("ENTRYPOINT")


def test_compose_s_parts_fit_together() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    triton, prometheus = compose["services"]["triton"], compose["services"]["prometheus"]
    assert (DOCKER / triton["build"]["context"] / triton["build"]["dockerfile"]).is_file()
    source, target, mode = prometheus["volumes"][0].split(":")
    assert (DOCKER / source).is_file()
    assert (target, mode) == ("/etc/prometheus/prometheus.yml", "ro")
    scraped = yaml.safe_load((DOCKER / source).read_text())["scrape_configs"][0]["static_configs"][0]["targets"]
    assert scraped == ["triton:8002"]
    assert ":" in prometheus["image"]


def test_promtool_accepts_prometheus_s_configuration() -> None:
    subprocess.run([needs("promtool"), "check", "config", DOCKER / "prometheus.yml"], check=True, capture_output=True)
