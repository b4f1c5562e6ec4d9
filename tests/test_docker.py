"""What the images do, outside of one: their scripts, and what their files say."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
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
    command = [str(DOCKER / "entrypoint"), *arguments]
    return subprocess.run(command, env=image(prefix), capture_output=True, text=True, timeout=120, **options)


def image(prefix: Path, notes: Path | None = None) -> dict[str, str]:
    """An environment as in the image. ``notes`` tells two containers on this one machine apart."""
    path = {"PATH": f"{prefix / 'server' / 'bin'}:{os.environ['PATH']}"}
    return os.environ | path | ({"XDG_RUNTIME_DIR": str(notes)} if notes else {})


def canonical(requirements: str) -> set[str]:
    """Lines ``name==version``, with names as package indexes compare them."""
    pairs = [line.split("==") for line in requirements.splitlines() if not line.startswith("#")]
    return {f"{canonicalize_name(name)}=={version}" for name, version in pairs}


SETTINGS = ["--dtype=float32", "--kv-cache-memory=16MiB"]


class Container:
    """What the entry point makes of these arguments."""

    def __init__(self, prefix: Path, notes: Path, *arguments: str) -> None:
        notes.mkdir(mode=0o700)
        self._environment = image(prefix, notes)
        self.process = psutil.Popen(
            [str(DOCKER / "entrypoint"), *arguments], env=self._environment, cwd="/", stdin=subprocess.PIPE
        )

    def ailment(self) -> str:
        """What the health check says; "" while it finds nothing."""
        command = [str(DOCKER / "healthcheck")]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode == 0) == (not done.stderr), done.stderr
        return done.stderr

    def wait_healthy(self) -> None:
        eventually(lambda: not self.ailment(), START_SECONDS)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(30) == 0


@pytest.fixture
def container(prefix: Path) -> Iterator[Callable[..., Container]]:
    started: list[Container] = []
    with tempfile.TemporaryDirectory(prefix="radix-", dir="/tmp") as directory:  # short, for sockets

        def start(*arguments: str) -> Container:
            started.append(Container(prefix, Path(directory, str(len(started))), *arguments))
            return started[-1]

        yield start
        for each in started:
            if each.process.is_running():
                each.process.kill()
                each.process.wait(30)


@pytest.mark.server
def test_a_container_serves_and_its_health_check_tells_the_truth(
    prefix: Path, container: Callable[..., Container], tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model")
    http, grpc, metrics, health = free_ports(4)
    flags = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", f"--health-port={health}"]
    serving = container("serve", "--no-example", *flags, f"--model={model}", *SETTINGS)
    assert serving.ailment()
    serving.wait_healthy()
    # From outside: a server of 127.0.0.1 alone does not answer there.
    asked = run(prefix, "chat", f"http://127.0.0.2:{http}", "--set=max_tokens=3", input="hello")
    assert (asked.returncode, " + 3, " in asked.stderr) == (0, True), asked.stderr
    everything = serving.process.children(recursive=True)
    (server,) = (child for child in everything if child.name() == "tritonserver")
    assert str(prefix / "server") in " ".join(server.environ()["PATH"].split(":"))
    server.suspend()
    try:
        assert "tritonserver does not answer" in serving.ailment()
    finally:
        server.resume()
    serving.stop()
    eventually(lambda: gone(everything))
    assert serving.ailment()


def test_containers_of_an_engine_and_of_openai_s_api_serve_together_and_tell_the_truth(
    prefix: Path, container: Callable[..., Container], tmp_path: Path
) -> None:
    model = save_tiny(tmp_path / "model")
    with tempfile.TemporaryDirectory(prefix="radix-", dir="/tmp") as endpoint:
        engine = container("engine", f"--endpoint={endpoint}", f"--model={model}", *SETTINGS)
        engine.wait_healthy()
        (port,) = free_ports(1)
        door = container("openai", f"--port={port}", f"--engine-endpoint={endpoint}")
        door.wait_healthy()
        asked = run(prefix, "chat", f"http://127.0.0.2:{port}/v1", "--set=max_tokens=3", input="hello")
        assert (asked.returncode, " + 3" in asked.stderr) == (0, True), asked.stderr
        (computing,) = (each for each in engine.process.children() if "radix_backend.engine" in each.cmdline())
        computing.suspend()
        try:
            assert "did not answer" in engine.ailment()
        finally:
            computing.resume()
        engine.stop()
        assert "ended" in engine.ailment() or "nothing runs" in engine.ailment()
        eventually(lambda: door.ailment(), 30)
        door.stop()


def test_an_engine_of_its_own_is_found_by_openai_s_api_and_chat(
    prefix: Path, container: Callable[..., Container], tmp_path: Path
) -> None:
    """The server's environment has no torch."""
    settings = [f"--model={save_tiny(tmp_path / 'model')}", *SETTINGS]
    (port,) = free_ports(1)
    door = container("openai", f"--port={port}", *settings)
    door.wait_healthy()
    door.stop()
    asked = run(prefix, "chat", *settings, "--set=max_tokens=3", input="hello")
    assert (asked.returncode, " + 3" in asked.stderr) == (0, True), asked.stderr


def test_other_commands_are_healthy_while_they_run(prefix: Path, container: Callable[..., Container]) -> None:
    talk = container("chat", "http://127.0.0.1:1/v1", "--served-model=none")
    eventually(lambda: str(prefix / "server" / "bin" / "radix-backend") in talk.process.cmdline(), 60)
    talk.process.suspend()
    assert talk.ailment() == ""
    talk.process.kill()
    talk.process.wait(30)
    assert talk.ailment()


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
