"""``radix-backend serve``: a real `tritonserver` with the engine beside it, until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radix_backend.cli.extras import extra
from radix_backend.cli.openai import OpenAIProcess, check_packages
from radix_backend.cli.settings import add_settings, given_settings, spell_settings
from radix_backend.cli.sidecar import adopt
from radix_backend.cli.terminal import EngineLog, EngineProgress, Terminal
from radix_backend.cli.tritonserver import PYTHON, find_server
from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig, flag_of, radix_home
from radix_backend.errors import InvalidArgument, Unavailable

_EPILOG = """\
examples:
  radix-backend serve                                   the embedded model
  radix-backend serve --once                            one answer, then exit
  radix-backend serve --model ./Qwen3-0.6B --max-bs 32  a directory in Hugging Face layout
  radix-backend serve --host 0.0.0.0 --http-port 9000   for other machines, on another port

Settings beat those of the model repository (1/model.json and config.pbtxt); without any, those hold.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="start tritonserver with a model and keep serving",
        description="Start tritonserver with the model 'radix', answer one example question, and serve until Ctrl-C.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--http-port", "--port", type=int, default=8000, metavar="PORT", help="(default: 8000)")
    parser.add_argument("--grpc-port", type=int, default=8001, metavar="PORT", help="(default: 8001)")
    parser.add_argument("--metrics-port", type=int, default=8002, metavar="PORT", help="(default: 8002)")
    parser.add_argument(
        "--health-port",
        type=int,
        default=0,
        metavar="PORT",
        help="answer GET /healthz there: 200, or 503 with the reason (default: 0, nowhere)",
    )
    parser.add_argument(
        "--openai-port",
        type=int,
        default=0,
        metavar="PORT",
        help="serve OpenAI's API there, on the same engine (default: 0, nowhere); its key is RADIX_API_KEY",
    )
    parser.add_argument(
        "--model-repository",
        type=Path,
        metavar="DIR",
        help="holds the model 'radix' (default: ./model_repository, or the checkout's)",
    )
    parser.add_argument("--once", action="store_true", help="exit after the answer to the example question")
    parser.add_argument("--no-example", action="store_true", help="ask no example question")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with extra("server"):
        from radix_backend.cli.example import QUESTION, answer
        from radix_backend.cli.health import HealthServer, server_ailment
        from radix_backend.cli.ports import Ports
        from radix_backend.cli.repository import MODEL, Repository
        from radix_backend.cli.server_process import EXIT_SECONDS, ServerEnded, ServerProcess
        from radix_backend.cli.stubs import StubWatch

    repository = Repository(arguments.model_repository)
    flags = given_settings(arguments)
    own = EngineConfig.parse(repository.settings() | flags)
    config = adopt(own, arguments)
    adopted = [name for name in EngineConfig.__struct_fields__ if getattr(config, name) != getattr(own, name)]
    # No text takes back what the repository says in place of a default like "by device": then the engine refuses.
    overrides = spell_settings(config, [*flags, *(name for name in adopted if getattr(config, name) not in (None, 0))])
    ports = Ports(
        arguments.host,
        arguments.http_port,
        arguments.grpc_port,
        arguments.metrics_port,
        arguments.health_port,
        arguments.openai_port,
    )
    ports.check()
    if ports.openai:
        check_packages()
    server = find_server()
    if server.stub_python() not in (None, PYTHON):
        raise InvalidArgument(
            f"{server.binary} runs models with Python {server.stub_python()}, and this is Python {PYTHON}; accepted: "
            "an environment of that version"
        )
    terminal = Terminal()
    try:
        with _stop_signals(), contextlib.ExitStack() as running:
            terminal.say(f"tritonserver: {server.binary}")
            client = EngineClient(config, on_log=EngineLog(terminal), on_status=EngineProgress(terminal))
            running.callback(client.close, linger=False)
            log = radix_home() / "logs" / f"tritonserver-{ports.http}.log"
            door = None
            if ports.openai:
                spelled = [f"{flag_of(name)}={value}" for name, value in overrides.items()]
                source = f"--model-repository={repository.path}"
                door = OpenAIProcess(ports, MODEL, config, [source, *spelled], drain=EXIT_SECONDS / 2)
                running.callback(door.stop)
            triton = ServerProcess(server, repository.path, ports, log)
            running.callback(triton.stop)
            if door:
                running.callback(door.terminate)  # both drain at the same time
            triton.wait_live()
            override = repository.config_with(overrides) if overrides else None
            triton.load(MODEL, override)
            stubs = StubWatch(triton.pid, repository.path / MODEL, lambda: triton.is_ready(MODEL))
            if ports.health:
                http = ports.address(ports.http)
                health = HealthServer(ports.host, ports.health, lambda: client.ailment or server_ailment(http, MODEL))
                running.callback(health.close)
            _wait_ready(client, triton)
            if door:
                door.wait_ready()
            terminal.done_waiting()
            if not arguments.no_example:
                print(f"\nQ: {QUESTION}\nA: ", end="", flush=True)
                for text in answer(ports.address(ports.grpc), client):
                    print(text, end="", flush=True)
                print(flush=True)
            if not arguments.once:
                terminal.say(_directions(ports.address(ports.http), ports.address(ports.grpc), ports, log))
                triton.wait(lambda: _look_after(client, triton, stubs, door, override, terminal))
    except _Stop:
        pass
    except ServerEnded as error:
        terminal.say(f"radix-backend: {error}")
        return error.status or 1
    return 0


def _wait_ready(client: EngineClient, triton: Any) -> None:
    while client.status.state != "ready":
        triton.check()
        with contextlib.suppress(Unavailable):
            client.wait_ready(0.2)


def _look_after(
    client: EngineClient,
    triton: Any,
    stubs: Any,
    door: OpenAIProcess | None,
    override: str | None,
    terminal: Terminal,
) -> None:
    from radix_backend.cli.repository import MODEL

    if client.status.state == "failed":
        raise Unavailable(f"the engine failed: {client.status.detail}")
    if door is not None:
        door.look_after(terminal)
    if stubs.died():
        terminal.say("the model's stub died; loading the model again")
        triton.reload(MODEL, override)
        stubs.renew()


def _directions(http: str, grpc: str, ports: Any, log: Path) -> str:
    body = '{"text_input": "The capital of France is", "stream": true, "max_tokens": 32, "temperature": 0}'
    openai = f"\nOpenAI's API: http://{ports.address(ports.openai)}/v1" if ports.openai else ""
    example = Path(__file__).resolve().parents[2] / "client_examples" / "grpc_stream.py"
    return f"""
Serving 'radix': HTTP http://{http}, gRPC {grpc}, metrics http://{ports.address(ports.metrics)}/metrics{openai}
tritonserver's log: {log}

Try, from another terminal:
  curl -N http://{http}/v2/models/radix/generate_stream -d {shlex.quote(body)}
  {sys.executable} {example} --url {grpc} "The capital of France is"

Ctrl-C stops it."""


class _Stop(BaseException):
    """SIGTERM, Ctrl-C, or the terminal was closed."""


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """Turn the first stop signal into `_Stop` and ignore those that follow: what runs is being stopped."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(*_: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise _Stop

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
