"""What is measured: the engine alone, a running server, or a server of our own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

import msgspec

from radix_backend.bench.served import MODEL, Served
from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.load import Load, Outcome
from radix_backend.validation import show

_LEAD_SECONDS = 0.2  # between "go" and the start of a load: every generator must have heard
ACCEPTED = "offline and serve, each with @TPxPP or without, triton=HOST:PORT (of gRPC), openai=URL, vllm=PYTHON"


class Target(Protocol):
    name: str

    @property
    def num_ranks(self) -> int | None:
        """That compute; None where that is not known."""

    def run(self, load: Load) -> Outcome: ...

    def __enter__(self) -> Target: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def make_target(text: str, settings: Mapping[str, str], model: str, num_clients: int) -> Target:
    """Of `ACCEPTED`. Raises InvalidArgument."""
    kind, _, url = text.partition("=")
    ours, *layout = text.split("@")
    if ours in ("offline", "serve") and len(layout) <= 1:
        settings = {**settings, **_sizes(*layout)}
        name = "@".join(["triton" if ours == "serve" else ours, *layout])
        return Offline(name, settings) if ours == "offline" else OwnServer(name, settings, num_clients)
    if kind == "triton" and url:
        return RunningServer(kind, url, model or MODEL, num_clients)
    if kind == "openai" and url:
        return RunningServer(kind, url, model, num_clients)
    if kind == "vllm" and url:
        return Vllm(url, settings)
    raise InvalidArgument(f"target {show(text)}; accepted: {ACCEPTED}")


def _sizes(layout: str = "") -> dict[str, str]:
    """Settings for "2x1": `tp_size` and `pp_size`. Raises InvalidArgument."""
    if not layout:
        return {}
    tp_size, _, pp_size = layout.partition("x")
    if not (tp_size.isdecimal() and pp_size.isdecimal()):
        raise InvalidArgument(f"layout {show(layout)}; accepted: TPxPP, such as 2x1")
    return {"tp_size": tp_size, "pp_size": pp_size}


class _InProcess:
    """An engine without doors, in a process of its own."""

    def __init__(self, name: str, num_ranks: int, command: list[str]) -> None:
        self.name, self.num_ranks = name, num_ranks
        self._engine = _Talker(command)

    def run(self, load: Load) -> Outcome:
        self._engine.say(msgspec.json.encode(load))
        return msgspec.json.decode(self._engine.hear(), type=Outcome)

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.end()


class Offline(_InProcess):
    """Ours."""

    def __init__(self, name: str, settings: Mapping[str, str]) -> None:
        config = EngineConfig.parse(settings)
        python = config.engine_python or sys.executable
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            Path(file.name).write_bytes(msgspec.json.encode(config))
            loading = [python, "-m", "radix_backend.loading", file.name]
            loaded = subprocess.run(loading, stdout=subprocess.PIPE, text=True, check=False)
        if loaded.returncode:
            raise Unavailable(f"the model {config.model!r} cannot be loaded; the reason is above")
        model_dir = loaded.stdout.splitlines()[-1]
        command = [python, "-m", "radix_backend.engine.offline", _json(settings), model_dir]
        super().__init__(name, config.num_ranks, command)


class Vllm(_InProcess):
    """vLLM, by an interpreter that has it. Of the settings it gets model, dtype, context_len and load_format."""

    def __init__(self, python: str, settings: Mapping[str, str]) -> None:
        if "model" not in settings:
            raise InvalidArgument("target 'vllm' needs --shape or --model")
        command = [python, "-m", "radix_backend.bench.vllm_engine", _json(settings), settings["model"]]
        super().__init__("vllm", 1, command)


class RunningServer:
    """Clients in several processes, so that what is measured is not the client's Python."""

    num_ranks = None

    def __init__(self, kind: str, url: str, model: str, num_clients: int) -> None:
        self.name = kind
        command = [sys.executable, "-m", "radix_backend.bench.generator", kind, url, model]
        self._clients = [_Talker(command) for _ in range(num_clients)]

    def run(self, load: Load) -> Outcome:
        shares = [load.sessions[index :: len(self._clients)] for index in range(len(self._clients))]
        busy = [(client, share) for client, share in zip(self._clients, shares, strict=True) if share]
        for client, share in busy:
            client.say(msgspec.json.encode(Load(share, load.temperature)))
        for client, _ in busy:
            if client.hear().strip() != b"ready":
                raise Unavailable("a load generator said something unexpected; its errors are above")
        start = b"%r" % (time.monotonic() + _LEAD_SECONDS)
        for client, _ in busy:
            client.say(start)
        outcomes = [msgspec.json.decode(client.hear(), type=Outcome) for client, _ in busy]
        traces = [trace for outcome in outcomes for trace in outcome.traces]
        clients = [outcome.cpu_seconds["clients"] for outcome in outcomes]
        return Outcome(traces, {"clients": sum(clients), "busiest client": max(clients)})

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.end()


class OwnServer:
    """`radix-backend serve` with these settings, through its gRPC port."""

    def __init__(self, name: str, settings: Mapping[str, str], num_clients: int) -> None:
        self.name, self.num_ranks = name, EngineConfig.parse(settings).num_ranks
        with ExitStack() as opened:
            # A sidecar of its own, whatever else runs here. Sockets' paths are short: not below a long TMPDIR.
            runtime = opened.enter_context(tempfile.TemporaryDirectory(prefix="radix-", dir="/tmp"))
            before = os.environ.get("XDG_RUNTIME_DIR")
            os.environ["XDG_RUNTIME_DIR"] = runtime
            opened.callback(_restore, before)
            self._served = Served(settings)
            opened.callback(self._served.close)
            clients = RunningServer("triton", self._served.url, MODEL, num_clients)
            self._clients = opened.enter_context(clients)
            self._opened = opened.pop_all()

    def run(self, load: Load) -> Outcome:
        cpu, stats = self._served.cpu_seconds(), self._served.engine.stats()
        outcome = self._clients.run(load)
        for role, seconds in self._served.cpu_seconds().items():
            outcome.cpu_seconds[role] = round(seconds - cpu[role], 3)
        after = self._served.engine.stats()
        for name in ("steps", "host_seconds"):
            outcome.facts[name] = round(after[f"{name}_total"] - stats[f"{name}_total"], 4)
        return outcome

    def __enter__(self) -> OwnServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


class _Talker:
    """A process that answers lines with lines. Its errors are shown as they come."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._command = command

    def say(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._ended()

    def hear(self) -> bytes:
        """Raises Unavailable when it has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.readline() or self._ended()

    def _ended(self) -> bytes:
        raise Unavailable(f"{self._command[2]} ended with status {self._process.wait()}; its errors are above")

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _json(settings: Mapping[str, str]) -> str:
    return msgspec.json.encode(dict(settings)).decode()


def _restore(runtime_dir: str | None) -> None:
    if runtime_dir is None:
        os.environ.pop("XDG_RUNTIME_DIR", None)
    else:
        os.environ["XDG_RUNTIME_DIR"] = runtime_dir
