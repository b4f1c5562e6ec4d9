"""The server around the routes: keys, TLS, CORS, health, metrics, its own OpenAPI document, how it stops."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from radix_backend.metrics.families import ENGINE, REQUEST
from radix_backend.sidecar.runtime import RunDir
from tests.openai.door import Door, upload
from tests.openai.test_completions import PLAIN
from tests.triton.server import eventually, gone, stopped

LONG = {"prompt": "a long story", "temperature": 0, "ignore_eos": True, "max_tokens": 32_000}

Start = Callable[..., Door]


@pytest.fixture
def start(tmp_path: Path, tiny_settings: dict[str, Any]) -> Iterator[Start]:
    """Starts doors of the test's own: flags of the command, its environment."""
    started: list[Door] = []

    def start(*flags: str, **environment: str) -> Door:
        started.append(Door(tmp_path, tiny_settings | {"namespace": "own"}, *flags, **environment))
        return started[-1]

    yield start
    for door in started:
        door.stop()
        eventually(lambda door=door: not sidecar(door))  # or the next test's door meets it


def sidecar(door: Door) -> list[psutil.Process]:
    """Supervisor, gateway and engine."""
    root = str(RunDir.of(door.config).path)
    listed = psutil.process_iter(["cmdline"])
    return [each for each in listed if any(word.startswith(root) for word in each.info["cmdline"] or [])]


def engines(door: Door) -> list[psutil.Process]:
    return [each for each in sidecar(door) if "radix_backend.engine" in each.info["cmdline"]]


# ── who may pass ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_is_wanted_but_for_probes(start: Start) -> None:
    door = start("--api-key=one", "--api-key=two", RADIX_API_KEY="three")
    door.wait_serving()  # /health
    assert door.get("/metrics").status == 200
    for wrong in (
        {},
        {"authorization": "Bearer four"},
        {"authorization": "Basic one"},
        {"authorization": "Bearer three"},
    ):
        for answer in (door.get("/v1/models", **wrong), door.post("/v1/completions", PLAIN | {"prompt": "a"}, wrong)):
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    for key in ("one", "two"):
        assert door.get("/v1/models", authorization=f"Bearer {key}").status == 200
    assert "one" not in door.log.read_text()


def test_the_key_may_be_in_the_environment(start: Start) -> None:
    door = start(RADIX_API_KEY="secret")
    door.wait_serving()
    assert door.get("/v1/models").status == 401
    assert door.sdk().with_options(api_key="secret").models.list().data


def test_web_pages_may_ask_from_the_origins_that_are_allowed(start: Start) -> None:
    door = start("--allow-origin=https://good.example", "--api-key=one")
    door.wait_serving()
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin, allowed in (("https://good.example", True), ("https://bad.example", False)):
        request = urllib.request.Request(
            door.url("/v1/completions"), method="OPTIONS", headers=preflight | {"origin": origin}
        )
        answer = door.open(request)
        assert (answer.status == 200) is allowed
        got = door.get("/v1/models", origin=origin, authorization="Bearer one").headers
        assert got.get("access-control-allow-origin") == (origin if allowed else None)


def certificate(directory: Path) -> tuple[Path, Path]:
    """For loopback, and its key."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*openssl, *names], check=True, capture_output=True)
    return cert, key


@pytest.fixture(scope="session")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate, its key, the same key encrypted, a key of something else, and a file that is none of them."""
    directory = tmp_path_factory.mktemp("pems")
    _, key = certificate(directory)
    for command in (
        ["rsa", "-aes128", "-passout", "pass:secret", "-in", str(key), "-out", str(directory / "encrypted.pem")],
        ["genrsa", "-out", str(directory / "other.pem"), "2048"],
    ):
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    (directory / "empty.pem").touch()
    return directory


def test_https_with_a_certificate(start: Start, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    door = start(f"--tls-cert={cert}", f"--tls-key={key}")
    context = ssl.create_default_context(cafile=str(cert))

    def health() -> bool:
        try:
            with urllib.request.urlopen(door.url("/health"), context=context, timeout=30) as answer:
                return answer.status == 200
        except ssl.SSLError:
            raise
        except OSError:
            return False

    eventually(health, 120)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port=0"], "--port is 0; accepted: 1 to 65535"),
        (["--max-body=much"], "--max-body is 'much'; accepted: bytes, or a size such as '2GiB'"),
        (["--drain-seconds=-1"], "--drain-seconds is -1; accepted: 0 or more"),
        (["--tls-cert=x.pem"], "--tls-key is missing; accepted: both"),
        (["--tls-cert=empty.pem", "--tls-key=key.pem"], "--tls-cert is 'empty.pem': "),
        (["--tls-cert=key.pem", "--tls-key=key.pem"], "accepted: a certificate chain (PEM)"),
        (["--tls-cert=cert.pem", "--tls-key=empty.pem"], "--tls-key is 'empty.pem': "),
        (["--tls-cert=cert.pem", "--tls-key=other.pem"], "accepted: the private key of the certificate (PEM)"),
        (["--tls-cert=cert.pem", "--tls-key=encrypted.pem"], "not encrypted"),
        (["--max-bs=0"], "setting 'max_bs' is '0'; accepted: int >= 1"),
    ],
)
def test_wrong_flags_are_told_at_once(pems: Path, flags: list[str], message: str) -> None:
    command = [sys.executable, "-m", "radix_backend.cli", "openai", *flags]
    done = subprocess.run(command, cwd=pems, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in done.stderr


# ── what it tells of itself ─────────────────────────────────────────────────────────────────────────────────


def test_models_are_listed_by_each_name(start: Start) -> None:
    door = start("--served-model-name=a", "--served-model-name=org/b")
    door.wait_serving()
    models = door.get("/v1/models").json
    assert [(model["id"], model["max_model_len"]) for model in models["data"]] == [("a", 32_768), ("org/b", 32_768)]
    assert door.get("/v1/models/org/b").json == models["data"][1]
    answer = door.post("/v1/completions", model="org/b", prompt="a", **PLAIN).json
    assert answer["model"] == "a"


def test_before_the_engine_is_ready_requests_are_told_how_far_it_is(start: Start) -> None:
    door = start()
    engine = eventually(lambda: engines(door))[0]
    with stopped(engine):
        eventually(lambda: door.get("/health", patient=True).status)
        health = door.get("/health")
        assert (health.status, health.json["status"]) == (503, "unavailable")
        assert health.json["reason"].startswith("the engine is starting")
        answer = door.post("/v1/completions", prompt="a", **PLAIN)
        assert (answer.status, answer.error["code"]) == (503, "unavailable")
        assert "the engine is starting" in answer.error["message"]
        assert answer.headers["retry-after"] == "1"
        assert door.get("/v1/models").json["data"][0]["max_model_len"] is None
    door.wait_serving()


def test_metrics_count_what_clients_got(door: Door) -> None:
    def figure(name: str) -> float:
        lines = door.get("/metrics").content.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    before = {name: figure(name) for name in ("radix:generation_tokens_total", "radix:request_failure_total")}
    for stream in (False, True):
        door.post("/v1/completions", prompt=["a", "b"], stream=stream, **PLAIN)
    door.post("/v1/completions", prompt="")
    eventually(lambda: figure("radix:generation_tokens_total") - before["radix:generation_tokens_total"] == 4 * 8)
    eventually(lambda: figure("radix:request_failure_total") - before["radix:request_failure_total"] == 1)
    page = door.get("/metrics").content.decode()
    kinds = dict(line.split()[2:4] for line in page.splitlines() if line.startswith("# TYPE "))
    assert kinds == {family.name: family.kind for family in ENGINE + REQUEST}
    assert 'radix:engine_up{model="tiny",version="1"} 1.0' in page


def test_the_server_keeps_to_its_own_openapi_document(start: Start) -> None:
    """What is valid by the document alone may still be wrong: another model, a token that there is not."""
    door = start("--context-len=64", "--api-key=secret")
    door.wait_serving()
    where = [door.url("/openapi.json"), "--header=Authorization: Bearer secret", "--request-timeout=60"]
    what = ["--checks=all", "--exclude-checks=positive_data_acceptance", "--phases=examples,coverage,fuzzing"]
    how = ["--max-examples=10", "--seed=1", "--generation-database=none", "--no-color"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", *where, *what, *how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "Tested: 8" in done.stdout
    assert "Traceback" not in door.log.read_text()


# ── how it stops ─────────────────────────────────────────────────────────────────────────────────────────────


class Running:
    """A stream on a thread of its own: its events so far, and what ended it."""

    def __init__(self, door: Door, **fields: Any) -> None:
        self.events: list[bytes] = []
        self._request = urllib.request.Request(
            door.url("/v1/completions"), json.dumps(LONG | {"stream": True} | fields).encode()
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        eventually(lambda: self.events)

    def _read(self) -> None:
        with urllib.request.urlopen(self._request, timeout=60) as answer:
            self.events += (line for line in answer if line.startswith(b"data: "))

    def end(self) -> bytes:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.events[-1].strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_lets_streams_end_refuses_new_ones_and_leaves_nothing(
    start: Start, number: signal.Signals
) -> None:
    door = start()
    door.wait_serving()
    everything = [door.process, *sidecar(door)]
    assert len(everything) == 4
    stream = Running(door, max_tokens=1500)
    door.process.send_signal(number)

    def refuses() -> bool:
        try:
            door.open(urllib.request.Request(door.url("/health")))
        except OSError:
            return True
        return False

    eventually(refuses)
    assert stream.end() == b"data: [DONE]"
    assert door.process.wait(30) == 0
    eventually(lambda: gone(everything))


def test_streams_that_would_go_on_end_with_an_error(start: Start) -> None:
    door = start("--drain-seconds=0.5")
    door.wait_serving()
    stream = Running(door)
    assert door.stop() == 0
    error = json.loads(stream.end().removeprefix(b"data: "))["error"]
    assert (error["message"], error["type"], error["code"]) == ("the server is stopping", "server_error", "unavailable")


def test_an_upload_that_would_go_on_ends_with_an_error(start: Start) -> None:
    door = start("--drain-seconds=0.5")
    door.wait_serving()
    connection = upload(door, "slow")
    door.get("/health")  # by then the server has read what came before
    assert door.stop() == 0
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["message"]) == (503, "the server is stopping")
    assert "POST /v1/completions 503 " in door.log.read_text()
    assert "Traceback" not in door.log.read_text()


def test_a_dead_engine_ends_streams_with_an_error_and_is_followed_to_its_next_life(start: Start) -> None:
    door = start()
    door.wait_serving()
    stream = Running(door)
    (engine,) = engines(door)
    engine.kill()
    assert json.loads(stream.end().removeprefix(b"data: "))["error"]["code"] == "unavailable"
    door.wait_serving()
    assert door.post("/v1/completions", prompt="a", **PLAIN).status == 200


def test_an_engine_that_cannot_start_ends_the_command_with_the_reason(tmp_path: Path) -> None:
    door = Door(tmp_path, {"model": str(tmp_path)})
    assert door.process.wait(60) == 1
    assert "radix-backend: the engine failed: " in door.log.read_text()
