"""The offline door, in this process and in scripts."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from jupyter_client.manager import start_new_kernel

from radix_backend import LLM, EngineConfig, SamplingParams
from radix_backend.errors import Cancelled, InvalidArgument
from radix_backend.sidecar.runtime import RunDir
from tests.models.tiny import greedy, load_reference, save_tiny
from tests.triton.server import eventually
from tests.triton.terminal import terminal

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_tokens=8000, ignore_eos=True)
PATIENCE = 120.0  # seconds: a bound on hanging, not an expectation


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("offline") / "tiny", max_position_embeddings=8192)


@pytest.fixture(scope="module")
def config(model: Path) -> EngineConfig:
    return EngineConfig(model=str(model), dtype="float32", kv_cache_memory="64MiB", max_queue_size=8, linger=0.2)


@pytest.fixture(scope="module")
def llm(config: EngineConfig) -> Iterator[LLM]:
    with LLM(config) as llm:
        yield llm


def idle(llm: LLM) -> bool:
    figures = llm.client.stats(audit=True)
    return not (
        figures["requests_running"]
        or figures["requests_waiting"]
        or figures["pages_leased"]
        or figures["audit_findings"]
    )


def test_a_list_gives_what_the_model_says_in_its_order(llm: LLM, model: Path) -> None:
    prompts = [[10, 20, 30], [40, 50], [60]]
    reference = load_reference(model)
    outputs = llm.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == [greedy(reference, prompt, 8) for prompt in prompts]
    assert [output.prompt_token_ids for output in outputs] == [output.prompt for output in outputs] == prompts
    assert {output.finish_reason for output in outputs} == {"length"}
    assert all(output.receipt and output.receipt.num_output_tokens == 8 for output in outputs)


def test_every_way_to_use_a_prompt_gives_the_same(llm: LLM) -> None:
    prompt = "Once upon a time"
    (output,) = llm.generate([prompt], GREEDY)
    assert output.prompt_token_ids == llm.client.tokenize(prompt)
    generation = llm.generate(prompt, GREEDY)
    assert "".join(generation) == output.text
    assert generation.output.token_ids == output.token_ids
    assert generation.result().text == output.text
    assert llm.generate(np.array(output.prompt_token_ids), GREEDY).result().text == output.text

    async def use() -> None:
        assert "".join([piece async for piece in generation]) == output.text
        assert (await generation).text == output.text
        both = await asyncio.gather(llm.generate(prompt, GREEDY), llm.generate(prompt, GREEDY))
        assert [each.text for each in both] == [output.text] * 2
        assert llm.generate([prompt], GREEDY)[0].text == output.text  # as in a notebook: a loop runs already

    asyncio.run(use())


def test_a_conversation_is_rendered_by_the_model_s_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    rendered = llm.client.tokenize(llm.client.render_chat(messages), add_special_tokens=False)
    expected = llm.generate(rendered, GREEDY).result()
    (listed,) = llm.chat([messages], GREEDY)
    single = llm.chat(messages, GREEDY).result()
    assert listed.prompt_token_ids == single.prompt_token_ids == rendered
    assert listed.text == single.text == expected.text


def test_completions_have_their_own_text_and_log_probabilities(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=6, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (output,) = llm.generate([[1, 2, 3]], params)
    alone = [llm.generate([1, 2, 3], SamplingParams(seed=5 + i, max_tokens=6, ignore_eos=True)) for i in range(3)]
    assert [each.text for each in output.completions] == [generation.result().text for generation in alone]
    assert len({each.text for each in output.completions}) == 3
    for completion in output.completions:
        assert [token.token_id for token, *_ in completion.logprobs] == completion.token_ids
        chosen = [token.logprob for token, *_ in completion.logprobs]
        assert completion.cumulative_logprob is not None
        assert math.isclose(completion.cumulative_logprob, sum(chosen))
    assert [token.token_id for token, *_ in output.prompt_logprobs] == [2, 3]
    assert llm.generate([1], GREEDY).result().cumulative_logprob is None


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    each = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (1, 5, 3)]
    assert [len(output.token_ids) for output in llm.generate(["a", "b", "c"], each)] == [1, 5, 3]
    with pytest.raises(InvalidArgument, match="'params' is a list of 3; accepted: one, or as many as prompts"):
        llm.generate(["a"], each)


def test_a_list_longer_than_the_queue_is_computed_too(llm: LLM) -> None:
    outputs = llm.generate([[token] for token in range(200)], SamplingParams(max_tokens=2, n=3, ignore_eos=True))
    assert [output.prompt_token_ids for output in outputs] == [[token] for token in range(200)]
    assert all(output.finished and len(output.completions) == 3 for output in outputs)
    assert llm.generate([]) == []


def test_an_error_in_a_list_names_the_prompt_and_cancels_the_others(llm: LLM) -> None:
    with pytest.raises(InvalidArgument, match=r"prompt 2 of the list: .* is 0 tokens long"):
        llm.generate(["a", "b", "", "d"], LONG)
    eventually(lambda: idle(llm))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], r"prompt 1 of the list: 'prompt' is \[\]; accepted: a list of 1 or more integers"),
        (["x", 5], "prompt 1 of the list: 'prompt' is 5; accepted: a text, or a list "),
        (["x", None], "prompt 1 of the list: 'prompt' is None; accepted: a text, or a list "),
        ([[1], [-1]], "prompt 1 of the list: 'prompt' holds -1; accepted: "),
        ([[[1], [2, 3]]], "prompt 0 of the list: 'prompt' is .*; accepted: a list of 1 or more integers"),
        ([[1], [9999]], "prompt 1 of the list: 'prompt' holds 9999; accepted: "),
        (5, "'prompt' is 5; accepted: a text, or a list .*, or a list of prompts"),
        (np.array(5), "'prompt' is array"),
        (b"bytes", "'prompt' is b'bytes'; accepted: "),
        ({"prompt": "x"}, "'prompt' is {.*}; accepted: "),
    ],
)
def test_what_is_no_prompt_is_told_and_cancels_the_others(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        llm.generate(prompts, LONG)
    eventually(lambda: idle(llm))


@pytest.mark.parametrize(
    "messages", ["hi", {"role": "user", "content": "hi"}, 5, ["hi"], [[1]], [{"role": "user", "content": "hi"}, "hi"]]
)
def test_what_is_no_conversation_is_told(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"'messages' is .*; accepted: a list of messages, dicts "):
        llm.chat(messages)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, "greedy", [GREEDY], 3])
def test_what_are_no_parameters_is_told(llm: LLM, params: Any) -> None:
    for ask in (lambda: llm.generate("x", params), lambda: llm.chat([{"role": "user", "content": "x"}], params)):
        with pytest.raises(InvalidArgument, match=r"'params' is .*; accepted: SamplingParams"):
            ask()
    with pytest.raises(InvalidArgument, match=r"'params' is .*; accepted: SamplingParams|a list of 1; accepted"):
        llm.generate(["x", "y"], params)


def test_an_error_names_what_the_user_gave(llm: LLM) -> None:
    with pytest.raises(InvalidArgument, match=r"^'prompt' is 0 tokens long; accepted: 1 to 8191"):
        llm.generate("").result()

    async def use() -> None:
        with pytest.raises(InvalidArgument, match=r"^'prompt' holds 9999"):
            await llm.generate([9999])

    asyncio.run(use())


def test_no_prompts_have_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == llm.generate(np.array([])) == llm.chat([]) == []


def test_a_stream_is_of_one_completion(llm: LLM) -> None:
    several = llm.generate("a", SamplingParams(n=2))
    with pytest.raises(InvalidArgument, match="'n' is 2; accepted for a stream: 1"):
        next(iter(several))
    assert len(several.result().completions) == 2


def test_leaving_a_loop_cancels_the_request(llm: LLM) -> None:
    generation = llm.generate("a", LONG)
    for _ in generation:
        break
    eventually(lambda: idle(llm))
    assert 0 < len(generation.output.token_ids) < 8000

    async def leave(how: Callable[[], None]) -> None:
        async for _ in llm.generate("a", LONG):
            how()
            break
        while not await asyncio.to_thread(idle, llm):
            await asyncio.sleep(0.01)

    def fail() -> None:
        raise KeyError("of the loop's body")

    asyncio.run(asyncio.wait_for(leave(lambda: None), PATIENCE))
    with pytest.raises(KeyError):
        asyncio.run(leave(fail))
    eventually(lambda: idle(llm))


def test_a_task_that_is_cancelled_cancels_its_request(llm: LLM) -> None:
    async def use() -> None:
        with pytest.raises(TypeError):
            await asyncio.create_task(llm.generate("a", LONG))  # type: ignore[arg-type]
        task = asyncio.ensure_future(llm.generate("a", LONG))
        while not llm.client.stats()["requests_running"]:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(use(), PATIENCE))
    eventually(lambda: idle(llm))


def test_equal_settings_share_an_engine_and_its_cache(llm: LLM, config: EngineConfig) -> None:
    prompt = [*range(100, 164)]
    llm.generate(prompt, GREEDY).result()
    pid = RunDir.of(config).owner_pid()
    with LLM(config) as other:
        receipt = other.generate(prompt, GREEDY).result().receipt
        assert RunDir.of(config).owner_pid() == pid
    assert receipt is not None
    assert receipt.cached_tokens == 48


def test_an_engine_that_cannot_start_is_told(config: EngineConfig) -> None:
    with pytest.raises(InvalidArgument, match="float16"):
        LLM(EngineConfig(model=config.model, dtype="float16", device="cpu", linger=0))


def test_settings_may_be_given_without_a_config(config: EngineConfig, llm: LLM) -> None:
    """Such an LLM joins the engine of the same settings."""
    settings = {"dtype": "float32", "kv_cache_memory": "64MiB", "max_queue_size": 8, "linger": 0.2}
    for other in (
        lambda: LLM(config.model, **settings),
        lambda: LLM(Path(config.model), **settings),
        lambda: LLM(model=config.model, progress=False, **settings),
    ):
        with other() as same:
            assert same.config == config


@pytest.mark.parametrize(
    ("positional", "settings", "message"),
    [
        (EngineConfig(), {"max_bs": 4}, "max_bs beside an EngineConfig; accepted: "),
        ("embedded", {"model": "other"}, "'model' is 'embedded' and 'other'; accepted: one value"),
        ("embedded", {"max_batch": 4}, "unknown setting 'max_batch'; accepted: "),
        (None, {"max_bs": 0}, "setting 'max_bs' is 0; accepted: int >= 1"),
        ({"model": "embedded"}, {}, "'config' is {.*}; accepted: an EngineConfig, a model by name or directory, or "),
    ],
)
def test_settings_that_are_none_are_told(positional: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        LLM(positional, **settings)


def test_closing_ends_what_runs_as_cancelled(config: EngineConfig) -> None:
    llm = LLM(config)
    generation = iter(llm.generate("a", LONG))
    next(generation)
    threading.Timer(0.1, llm.close).start()
    with pytest.raises(Cancelled, match="the client was closed"):
        for _ in generation:
            pass
    llm.close()


async def use_and_leave(config: EngineConfig) -> LLM:
    async with LLM(config) as llm:
        await llm.generate("a")
    return llm


def test_async_with_closes(config: EngineConfig) -> None:
    assert asyncio.run(use_and_leave(config)).client.status.state == "stopping"


def test_an_llm_that_nobody_holds_is_closed(config: EngineConfig) -> None:
    llm = LLM(config)
    client = llm.client
    del llm
    assert client.status.state == "stopping"
    assert LLM(config).generate("a", GREEDY).result().finish_reason == "length"


# ── scripts ──────────────────────────────────────────────────────────────────────


class Script:
    """A process with an engine of its own, by namespace."""

    def __init__(self, model: Path, name: str, body: str) -> None:
        settings = {"model": str(model), "dtype": "float32", "kv_cache_memory": "64MiB", "linger": 0.2}
        self.config = EngineConfig(**settings, namespace=name)
        opening = "from radix_backend import LLM, EngineConfig, SamplingParams\nimport asyncio, sys\n"
        opening += f"config = EngineConfig(**{settings!r}, namespace={name!r})\n"
        opening += "params = SamplingParams(max_tokens=8000, ignore_eos=True)\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", opening + body], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_running(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "running\n", self.process.communicate()[1]

    def end(self) -> tuple[int, str, str]:
        """Exit status, output, errors; by then or soon the sidecar is gone."""
        output, errors = self.process.communicate(timeout=PATIENCE)
        eventually(lambda: not self.sidecar())
        eventually(lambda: not RunDir.of(self.config).path.exists())
        return self.process.returncode, output, errors

    def sidecar(self) -> list[psutil.Process]:
        path = os.fspath(RunDir.of(self.config).path)
        found = psutil.process_iter(["cmdline"])
        return [process for process in found if any(word.startswith(path) for word in process.info["cmdline"] or [])]


def test_a_script_that_closes_nothing_ends_silently_and_leaves_nothing(model: Path) -> None:
    body = "llm = LLM(config)\nprint(len(llm.generate(['a', 'b'])), end='')\n"
    body += "async def main():\n    async for piece in llm.generate('a', params): break\nasyncio.run(main())"
    assert Script(model, "silent", body).end() == (0, "2", "")


def test_a_script_that_fails_leaves_nothing(model: Path) -> None:
    body = "llm = LLM(config)\nfor piece in llm.generate('a', params): raise KeyError('mine')"
    status, _, errors = Script(model, "failing", body).end()
    assert status == 1
    assert errors.endswith("KeyError: 'mine'\n")


def test_why_a_model_does_not_load_is_not_said_over_and_over(model: Path) -> None:
    body = "LLM(config.model, dtype='float16', device='cpu', linger=0)"
    status, _, errors = Script(model, "float16", body).end()
    assert status == 1
    assert errors.splitlines()[-1].startswith("radix_backend.errors.InvalidArgument: setting 'dtype' is 'float16'; ")
    assert errors.count("setting 'dtype' is 'float16'") <= 2, errors


PROGRESS = """
from radix_backend import LLM, SamplingParams
with LLM({model!r}, dtype="float32", kv_cache_memory="64MiB", max_queue_size=8, progress={progress}) as llm:
    outputs = llm.generate([[1], [2], [3]], SamplingParams(max_tokens=4, ignore_eos=True))
    print(len(outputs), "done")
"""


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_a_terminal(llm: LLM, tmp_path: Path, progress: bool) -> None:
    with terminal(tmp_path, program=("-c", PROGRESS.format(model=llm.config.model, progress=progress))) as screen:
        shown = screen.wait_for("3 done")
    assert ["engine: " in shown, "3/3" in shown, "tok/s" in shown] == [progress] * 3


def test_progress_is_shown_in_a_notebook_and_nothing_is_warned_of(llm: LLM) -> None:
    manager, client = start_new_kernel(kernel_name="python3")
    shown = {"stdout": "", "stderr": ""}

    def take(message: dict[str, Any]) -> None:
        content = message["content"]
        if message["msg_type"] == "stream":
            shown[content["name"]] += content["text"]
        assert message["msg_type"] != "error", content

    cell = PROGRESS.format(model=llm.config.model, progress=True)
    cell += (
        '    print(len((await llm.generate("a", SamplingParams(max_tokens=2, ignore_eos=True))).token_ids), "awaited")'
    )
    try:
        client.execute_interactive(cell, timeout=PATIENCE, output_hook=take)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert shown["stdout"] == "3 done\n2 awaited\n"
    assert "engine: " in shown["stderr"]
    assert "3/3" in shown["stderr"]
    assert "Warning" not in shown["stderr"]


WAYS = {
    "list": "print('running', flush=True)\nllm.generate(['a'] * 3, params)",
    "stream": "for piece in llm.generate('a', params): print('running', flush=True)",
    "async": "async def main():\n    async for piece in llm.generate('a', params): print('running', flush=True)\n"
    "asyncio.run(main())",
}


@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_ends_a_script_and_leaves_nothing(model: Path, way: str) -> None:
    script = Script(model, f"ctrl-c-{way}", "llm = LLM(config)\n" + WAYS[way])
    script.wait_running()
    script.process.send_signal(signal.SIGINT)
    status, _, errors = script.end()
    assert status == -signal.SIGINT
    assert errors.endswith("KeyboardInterrupt\n")


def test_importing_the_package_brings_no_torch_and_nothing_that_is_not_used() -> None:
    body = "import sys, radix_backend\nassert not {'zmq', 'numpy', 'msgspec', 'tqdm'} & set(sys.modules)\n"
    body += "from radix_backend import *\nLLM, EngineConfig, SamplingParams, Output, Completion, Generation\n"
    body += "assert not {'torch', 'tokenizers', 'jinja2'} & set(sys.modules)\nassert 'LLM' in dir(radix_backend)"
    subprocess.run([sys.executable, "-c", body], check=True, timeout=PATIENCE)
    with pytest.raises(ImportError, match="cannot import name 'Llm'"):
        from radix_backend import Llm  # noqa: F401
