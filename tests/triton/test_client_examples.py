"""Every client example runs as a person runs it, and prints what the server answers."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
from typing import Any

import pytest

from radix_backend.client import EngineClient
from tests.test_docs import commands
from tests.triton.scrape import Metrics
from tests.triton.server import REPOSITORY, TritonServer, eventually

pytestmark = [pytest.mark.server, pytest.mark.model]

EXAMPLES = REPOSITORY.parent / "client_examples"
README = REPOSITORY.parent / "README.md"
PROMPT = "The capital of France is"


class Setting:
    """A server, and its addresses as the examples take them."""

    def __init__(self, server: TritonServer) -> None:
        self.server = server
        self.http, self.grpc, self.metrics = (
            f"127.0.0.1:{port}" for port in (server.http, server.grpc, server.metrics)
        )

    def run(self, example: str, *arguments: str, status: int = 0) -> str:
        """What the example prints, or why it ends with this status."""
        interpreter = [sys.executable] if example.endswith(".py") else []
        command = [*interpreter, str(EXAMPLES / example), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == status, result.stderr
        return result.stderr if status else result.stdout

    def completion(self, prompt: str, max_tokens: int) -> str:
        return str(self.answer(text_input=prompt, max_tokens=max_tokens)["text_output"])

    def answer(self, **body: Any) -> dict[str, Any]:
        return self.server.generate(temperature=0, exclude_input_in_output=True, **body)


@pytest.fixture
def setting(server: TritonServer) -> Setting:
    return Setting(server)


@pytest.mark.parametrize("page", ["README.md", "docs/requests.md"])
def test_requests_that_a_page_shows_are_answered(setting: Setting, page: str) -> None:
    requests = [line for line in commands(page) if line.startswith("curl") and "/v2/models/radix/" in line]
    assert requests
    for line in requests:
        command = re.sub(r"(http://127\.0\.0\.1|HOST):8000", setting.http, line)
        done = subprocess.run(
            ["bash", "-c", f"{command} --fail-with-body -s"], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, '"text_output":"' in done.stdout) == (0, True), (line, done.stdout)


def test_every_example_is_tested_and_listed() -> None:
    examples = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert {name for name in examples if f"test_{name.partition('.')[0]}" not in globals()} == set()
    assert examples == set(re.findall(r"\(client_examples/([\w.]+)\)", README.read_text()))


def test_generate(setting: Setting, engine: EngineClient) -> None:
    text, tokens = setting.completion(PROMPT, 16), len(engine.tokenize(PROMPT))
    assert setting.run("generate.py", setting.http) == f"{text}\n{tokens} + 16 tokens; it ended because: length\n"


def test_generate_stream(setting: Setting) -> None:
    assert setting.run("generate_stream.py", setting.http) == setting.completion(PROMPT, 16) + "\n"


def test_curl(setting: Setting) -> None:
    text = setting.completion(PROMPT, 8)

    def streamed() -> bool:
        whole, *events = [line for line in setting.run("curl.sh", setting.http).splitlines() if line]
        answer = json.loads(whole)
        assert (answer["text_output"], answer["finish_reason"]) == (text, "length")
        pieces = [json.loads(event.removeprefix("data: "))["text_output"] for event in events]
        assert "".join(pieces) == re.split("[\n!]", text)[0]
        return len(pieces) > 1

    eventually(streamed)  # a server that is held up sends what came meanwhile as one


def test_grpc_stream(setting: Setting) -> None:
    printed = setting.run("grpc_stream.py", "--url", setting.grpc, "--max-tokens", "12", PROMPT)
    assert printed == setting.completion(PROMPT, 12) + "\n"


def test_grpc_stream_shows_the_server_s_error(setting: Setting) -> None:
    printed = setting.run("grpc_stream.py", "--url", setting.grpc, "--temperature", "-1", PROMPT, status=1)
    assert printed == "\nsampling parameter 'temperature' is -1.0; accepted: float >= 0.0\n"


def test_grpc_stream_aio(setting: Setting) -> None:
    texts = [ast.literal_eval(line) for line in setting.run("grpc_stream_aio.py", setting.grpc).splitlines()]
    assert texts == [prompt + setting.completion(prompt, 16) for prompt in ("The sun is", "The moon is", "The sea is")]


def test_token_ids(setting: Setting, engine: EngineClient) -> None:
    lines = re.findall(r"^([\d ]+) (['\"].*)$", setting.run("token_ids.py", setting.grpc), re.MULTILINE)
    text = setting.completion(PROMPT, 8)
    assert "".join(ast.literal_eval(piece) for _, piece in lines) == text
    assert engine.detokenize([int(token) for tokens, _ in lines for token in tokens.split()]) == text


def test_chat(setting: Setting, engine: EngineClient) -> None:
    questions = ["What is the capital of France?", "And of Italy?"]
    asked, answer, asked_next, next_answer = setting.run("chat.py", "--url", setting.http, *questions).splitlines()
    assert [asked, asked_next] == [f"> {question}" for question in questions]
    conversation = [{"role": "user", "content": questions[0]}]
    assert answer == setting.completion(engine.render_chat(conversation), 64)
    conversation += [{"role": "assistant", "content": answer}, {"role": "user", "content": questions[1]}]
    assert next_answer == setting.completion(engine.render_chat(conversation), 64)


def test_logprobs(setting: Setting) -> None:
    *tokens, total = setting.run("logprobs.py", setting.http).splitlines()
    shown = [re.findall(r"('.*?'|\".*?\") ([\d.]+)%", line) for line in tokens]
    assert "".join(ast.literal_eval(chosen) for (chosen, _), *_ in shown) == setting.completion(PROMPT, 6)
    shares = [[float(share) for _, share in line] for line in shown]
    assert shares == [sorted(line, reverse=True) for line in shares]  # greedy: the chosen one is the likeliest
    assert {len(line) for line in shares} == {3}
    assert total == f"all of it: {100 * math.prod(line[0] / 100 for line in shares):.2f}%"


def test_n(setting: Setting) -> None:
    lines = setting.run("n.py", setting.http).splitlines()
    sampled = {"text_input": PROMPT, "max_tokens": 12, "exclude_input_in_output": True, "temperature": 0.9}
    texts = [str(setting.server.generate(seed=seed, **sampled)["text_output"]) for seed in (7, 8, 9)]
    assert lines == [f"12 tokens, length: {text!r}" for text in texts]
    assert len(set(texts)) == 3


def test_shared_prefix(setting: Setting) -> None:
    printed = setting.run("shared_prefix.py", setting.http)
    requests = [(int(tokens), int(cached)) for tokens, cached in re.findall(r"(\d+) prompt tokens, (\d+) of", printed)]
    leader, *followers = sorted(cached for _, cached in requests)
    assert len(followers) == 5
    assert leader < 16  # less than a page is common to two runs
    assert followers[0] > 400
    assert printed.splitlines()[-1].startswith(f"computed {sum(tokens - cached for tokens, cached in requests)} of ")


def test_cancel(setting: Setting, engine: EngineClient) -> None:
    printed = setting.run("cancel.py", setting.grpc, setting.metrics)
    assert printed == "cancelled after 5 responses\nrequests cancelled: 1, running: 0\n"
    assert engine.stats()["pages_leased"] == 0


def test_metrics(setting: Setting) -> None:
    before = Metrics(setting.server)
    setting.completion(PROMPT, 4)
    eventually(lambda: Metrics(setting.server).since(before, "generation_tokens_total") >= 4)
    eventually(lambda: Metrics(setting.server)["num_requests_running"] == 0)
    shown = dict(line.split(": ") for line in setting.run("metrics.py", setting.metrics).splitlines())
    assert shown["requests"] == "0 running, 0 waiting"
    assert int(shown["tokens generated"]) >= before["generation_tokens_total"] + 4
    assert re.fullmatch(r"[1-9]\d* ms", shown["mean time between tokens"])
