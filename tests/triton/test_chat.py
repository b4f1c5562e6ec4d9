"""`radix-backend chat` through every door of a real server, in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from radix_backend.client import EngineClient
from radix_backend.sampling_params import SamplingParams
from tests.openai.door import serving
from tests.triton.conftest import EXACT
from tests.triton.server import TritonServer, eventually
from tests.triton.terminal import terminal

pytestmark = [pytest.mark.server, pytest.mark.model]

QUESTIONS = ("What is the capital of France?", "And of Italy?")
LISTING = "Which planets are there?"  # the answer is long: it comes in several pieces even where some of them coalesce
GREEDY = ("--set=temperature=0", "--set=max_tokens=24")
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in EXACT.items()]

DOORS: dict[str, Callable[[TritonServer], list[str]]] = {
    "gRPC": lambda server: [f"127.0.0.1:{server.grpc}"],
    "HTTP": lambda server: [f"http://127.0.0.1:{server.http}/"],
    "engine": lambda server: FLAGS,
}


def chat(typed: str, *arguments: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "radix_backend.cli", "chat", *arguments]
    environment = os.environ | environment
    done = subprocess.run(command, input=typed, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    return done


def answers(engine: EngineClient, *questions: str, system: str = "") -> list[str]:
    """What the model says in this conversation."""
    conversation = [{"role": "system", "content": system}] if system else []
    said = []
    for question in questions:
        conversation.append({"role": "user", "content": question})
        params = SamplingParams(temperature=0, max_tokens=24)
        said.append("".join(delta.text for delta in engine.generate(None, params, messages=conversation)))
        conversation.append({"role": "assistant", "content": said[-1]})
    return said


@pytest.mark.parametrize("door", DOORS)
def test_a_conversation_in_a_pipe(server: TritonServer, engine: EngineClient, door: str) -> None:
    done = chat("\n".join(QUESTIONS), *DOORS[door](server), *GREEDY, "--system=Answer in one sentence.")
    assert done.stdout.splitlines() == answers(engine, *QUESTIONS, system="Answer in one sentence.")
    first, second = done.stderr.splitlines()[-2:]
    shape = r"(\d+) tokens \((\d+) cached\) \+ (\d+), first after \d+ ms(, \d+ tok/s)?, (stop|length)"
    asked, _, answered, *_ = re.fullmatch(shape, first).groups()  # type: ignore[union-attr]
    _, cached, *_ = re.fullmatch(shape, second).groups()  # type: ignore[union-attr]
    assert int(cached) >= (int(asked) + int(answered)) // 16 * 16 - 16  # all pages of the first turn


def test_a_conversation_through_openais_api(engine: EngineClient, tmp_path: Path) -> None:
    """The server wants a key, for every path: whether it is a Triton is not for others to know."""
    with serving(tmp_path, EXACT, "--api-key=secret") as door:
        for path in ("/v1", ""):
            asked = (door.url(path), *GREEDY, "--system=Answer in one sentence.")
            done = chat("\n".join(QUESTIONS), *asked, OPENAI_API_KEY="secret")
            assert done.stdout.splitlines() == answers(engine, *QUESTIONS, system="Answer in one sentence.")
        assert "key" in chat(QUESTIONS[0], door.url(""), status=1, OPENAI_API_KEY="other").stderr
        look = ("--once", "--json", "--interval=0.1", door.url("/v1"))
        eventually(lambda: json.loads(top(*look))["requests_running"] == 0)  # metrics are of a second or two ago


def test_no_rate_is_made_of_text_that_came_in_one_piece(server: TritonServer) -> None:
    """Here because it might have become a stop string."""
    held_back = "--set=stop=The capital of France is Paris. And"
    done = chat(QUESTIONS[0], *DOORS["HTTP"](server), *GREEDY, "--system=Answer in one sentence.", held_back)
    assert done.stdout == "The capital of France is Paris.\n"
    assert "first after" in done.stderr
    assert "tok/s" not in done.stderr


def test_a_conversation_is_saved_and_goes_on(server: TritonServer, engine: EngineClient, tmp_path: Path) -> None:
    file, url = tmp_path / "saved.json", f"127.0.0.1:{server.grpc}"
    first, second = answers(engine, *QUESTIONS)
    chat(f"{QUESTIONS[0]}\n/save {file}\n", url, *GREEDY)
    saved = json.loads(file.read_text())
    assert [message["content"] for message in saved["messages"]] == [QUESTIONS[0], first]
    assert saved["params"] == {"max_tokens": 24, "temperature": 0}
    assert chat(f"/load {file}\n{QUESTIONS[1]}\n/retry\n", url).stdout.splitlines() == [second, second]
    file.write_text('{"messages": 1}')
    assert "is no saved conversation" in chat(f"/load {file}", url, status=2).stderr
    assert "cannot be read: No such file" in chat(f"/load {tmp_path}/none", url, status=2).stderr


def test_commands_change_what_is_asked(server: TritonServer, engine: EngineClient) -> None:
    url = f"127.0.0.1:{server.grpc}"
    typed = [QUESTIONS[0], "/reset", "/system Answer in French.", "/set max_tokens=3", QUESTIONS[0]]
    whole, short = chat("\n".join(typed), url, *GREEDY).stdout.splitlines()
    assert whole == answers(engine, QUESTIONS[0])[0]
    assert answers(engine, QUESTIONS[0], system="Answer in French.")[0].startswith(short)


@pytest.mark.parametrize(
    ("typed", "arguments", "status", "message"),
    [
        ("/fly", [], 2, "unknown command '/fly'; accepted: /help, "),
        ("/set temperature=-1", [], 2, "sampling parameter 'temperature' is '-1'; accepted: "),
        ("", ["--set=speed"], 2, "'speed' is no sampling parameter; accepted: NAME=VALUE"),
        ("/retry", [], 2, "'/retry' finds no question"),
        ("hello", ["--served-model=nobody"], 1, "unknown model: 'nobody' is not found"),
    ],
)
@pytest.mark.parametrize("door", ["gRPC", "HTTP"])
def test_errors_are_told(
    server: TritonServer, door: str, typed: str, arguments: list[str], status: int, message: str
) -> None:
    done = chat(typed, *DOORS[door](server), *arguments, status=status)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("url", "message"), [("http://127.0.0.1:1", "refused"), ("ftp://x", "accepted: HOST:PORT, ")])
def test_a_server_that_is_not_there_is_told(url: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "radix_backend.cli", "chat", url], input="hi", capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (1, 2)
    assert message in done.stderr


@pytest.mark.parametrize("door", DOORS)
def test_ctrl_c_on_a_terminal_stops_the_answer_and_not_the_conversation(
    server: TritonServer, engine: EngineClient, door: str, tmp_path: Path
) -> None:
    with terminal(tmp_path, "chat", *DOORS[door](server), "--set=temperature=0") as screen:
        screen.wait_for("/help lists commands")
        screen.wait_for(">")
        screen.type(f"{LISTING}\r")
        assert answers(engine, LISTING)[0] in screen.wait_for(" tok/s")
        screen.type("/set max_tokens=5000 ignore_eos=true\r")  # one at a time: this is no number
        screen.wait_for("sampling parameter 'max_tokens'")
        for setting in ("max_tokens=5000", "ignore_eos=true"):
            screen.type(f"/set {setting}\r")
            screen.wait_for("max_tokens=5000")
        screen.type("Count to a thousand.\r")
        eventually(lambda: engine.stats()["requests_running"] == 1)
        screen.type("\x03")
        screen.wait_for("stopped")
        eventually(lambda: engine.stats()["requests_running"] == 0)
        screen.type("/help\r")
        assert "/save " in screen.wait_for("Ctrl-D ends the conversation.")
        screen.wait_for(">")
        screen.type("\x04")
        assert screen.process.wait(30) == 0
    assert f"+{LISTING}\n" in (tmp_path / "chat_history").read_text()


def test_a_missing_package_is_told(tmp_path: Path) -> None:
    (tmp_path / "prompt_toolkit.py").write_text("raise ModuleNotFoundError(name='prompt_toolkit')")
    command = [sys.executable, "-m", "radix_backend.cli", "chat"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the package 'prompt_toolkit' is missing; " in done.stderr
    assert "pip install 'radix-backend[cli]'" in done.stderr


# ── top ──────────────────────────────────────────────────────────────────────


def top(*arguments: str) -> str:
    command = [sys.executable, "-m", "radix_backend.cli", "top", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


SOURCES: dict[str, Callable[[TritonServer], list[str]]] = {
    "metrics": lambda server: [f"http://127.0.0.1:{server.metrics}"],
    "engine": lambda server: FLAGS,
}


@pytest.mark.parametrize("source", SOURCES)
def test_top_shows_what_runs(server: TritonServer, engine: EngineClient, source: str) -> None:
    body = {"text_input": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    url = f"http://127.0.0.1:{server.http}/v2/models/radix/generate_stream"
    with subprocess.Popen(["curl", "-sN", url, "-d", json.dumps(body)], stdout=subprocess.DEVNULL) as stream:
        eventually(lambda: engine.stats()["requests_running"] == 1)
        load = msgspec.json.decode(top("--once", "--json", "--interval=3", *SOURCES[source](server)))
        shown = top("--once", *SOURCES[source](server))
        stream.terminate()
    assert (load["requests_running"], load["requests_waiting"], load["preemptions_total"]) == (1, 0, 0)
    assert load["generation_tokens_per_second"] > 0
    assert 0 < load["kv_cache_usage"] <= 1
    assert re.search(r"requests +1 running, 0 waiting\s", shown)
    eventually(lambda: engine.stats()["requests_running"] == 0)


def test_top_watches_until_ctrl_c(server: TritonServer, tmp_path: Path) -> None:
    with terminal(tmp_path, "top", *FLAGS, "--interval=0.2") as screen:
        screen.wait_for("0 running, 0 waiting")
        screen.wait_for("0 running, 0 waiting")
        screen.type("\x03")
        assert screen.process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:1/metrics", "--once"], "http://127.0.0.1:1/metrics: "),
        (["--interval=0"], "--interval is 0.0; accepted: more than 0"),
        (["--enforce-eager", "http://127.0.0.1:1"], "'enforce_eager' is 'http://127.0.0.1:1'; accepted: true or false"),
        (["--namespace=nobody's", "--once"], "start one with `radix-backend engine`"),
    ],
)
def test_top_tells_what_it_cannot_see(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "radix_backend.cli", "top", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2)
    assert message in done.stderr
