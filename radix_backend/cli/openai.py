"""``radix-backend openai``: OpenAI's API on an engine, until Ctrl-C; alone, or beside a Triton server."""

from __future__ import annotations

import argparse
import contextlib
import os
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from radix_backend.cli.extras import extra
from radix_backend.cli.ports import Ports, address, check_port
from radix_backend.cli.sidecar import add_sidecar_settings, sidecar_config
from radix_backend.cli.terminal import EngineLog, EngineProgress, Terminal
from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig, parse_size
from radix_backend.errors import InvalidArgument, NotFound, Unavailable
from radix_backend.process import PARENT_PID, die_with_parent, setup_logging

KEY_VARIABLE = "RADIX_API_KEY"

_STOP_SECONDS = 5.0  # beyond its own draining, after which a server that does not stop is killed
STEADY_SECONDS = 10.0  # one that ended sooner would end again
_EPILOG = f"""\
examples:
  radix-backend openai                                     the embedded model, on port 8080
  radix-backend openai --model ./Qwen3-0.6B --host 0.0.0.0 --api-key SECRET
  radix-backend openai --engine-endpoint /run/radix        join `radix-backend engine --endpoint /run/radix`
  radix-backend serve --openai-port 8080                   Triton and this on one engine

With the settings of a server that runs already it joins that one's engine; those of the model repository hold where no
flag says otherwise, as with serve. A key on the command line can be seen by
other users of the machine; in the environment, {KEY_VARIABLE}, it cannot.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "openai",
        help="serve OpenAI's API",
        description="Serve OpenAI's HTTP API, without Triton or beside it, until SIGTERM or Ctrl-C.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, help="(default: 8080)")
    parser.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="what requests call the model; may be repeated (default: the model's own name)",
    )
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"requests must bring it; may be repeated (default: {KEY_VARIABLE}, or none is needed)",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages from there may send requests, '*': from anywhere; may be repeated (default: none may)",
    )
    parser.add_argument("--max-body", default="16MiB", metavar="SIZE", help="of a request (default: 16MiB)")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="serve HTTPS with this certificate chain (PEM)")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="and this private key")
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="that running requests have to end when the server is told to stop (default: 20)",
    )
    add_sidecar_settings(parser)
    parser.set_defaults(run=run)


def check_packages() -> None:
    """Raises NotFound without the extra ``openai``."""
    with extra("openai"):
        import radix_backend.openai.server  # noqa: F401


def default_name(config: EngineConfig) -> str:
    """What the model is called: a directory's or a file's own name, or the hub id."""
    return Path(config.model).name.removesuffix(".gguf") if config.model.startswith("/") else config.model


class OpenAIProcess:
    """This command beside a Triton server, on the engine of its model, which is called ``name``.

    ``flags`` are those of that model: settings and its repository.
    """

    def __init__(self, ports: Ports, name: str, config: EngineConfig, flags: Sequence[str], drain: float) -> None:
        names = [f"--served-model-name={each}" for each in dict.fromkeys((default_name(config), name))]
        where = [f"--host={ports.host}", f"--port={ports.openai}", f"--drain-seconds={drain:g}"]
        self._command = [sys.executable, "-m", "radix_backend.cli", "openai", *where, *names, *flags]
        self._health = f"http://{ports.address(ports.openai)}/health"
        self._patience = drain + _STOP_SECONDS
        self._start()

    def wait_ready(self) -> None:
        """Until it serves; its own client of the engine learns a moment after ours that that is ready. Raises
        Unavailable if it ends instead."""
        while self._process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self._health, timeout=STEADY_SECONDS).close()
                return
            time.sleep(0.1)
        raise self._ended()

    def look_after(self, terminal: Terminal) -> None:
        """Start it again if it died. Raises Unavailable where that cannot help."""
        if (status := self._process.poll()) is None:
            return
        if time.monotonic() - self._started < STEADY_SECONDS:
            raise self._ended()
        terminal.say(f"the server of OpenAI's API died (status {status}); starting it again")
        self._start()

    def terminate(self) -> None:
        """Ask it to stop; `stop` waits for it."""
        self._process.terminate()

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(self._patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ended(self) -> Unavailable:
        return Unavailable(
            f"the server of OpenAI's API ended with status {self._process.poll()}; its messages are above"
        )

    def _start(self) -> None:
        self._started = time.monotonic()
        environment = {**os.environ, PARENT_PID: str(os.getpid())}
        # A session of its own: Ctrl-C is for us, who stop it in order.
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )


def run(arguments: argparse.Namespace) -> int:
    with extra("openai"):
        from radix_backend.openai.server import Options, serve

    die_with_parent()
    config = sidecar_config(arguments)
    if arguments.drain_seconds < 0:
        raise InvalidArgument(f"--drain-seconds is {arguments.drain_seconds:g}; accepted: 0 or more")
    _check_tls(arguments.tls_cert, arguments.tls_key)
    key = os.environ.get(KEY_VARIABLE)
    options = Options(
        arguments.host,
        arguments.port,
        names=tuple(arguments.served_model_name) or (default_name(config),),
        api_keys=tuple(arguments.api_key) or ((key,) if key else ()),
        origins=tuple(arguments.allow_origin),
        max_body=parse_size(arguments.max_body, "--max-body"),
        tls_cert=arguments.tls_cert,
        tls_key=arguments.tls_key,
        drain_seconds=arguments.drain_seconds,
    )
    check_port(options.host, "--port", options.port)
    setup_logging(config.log_level)
    terminal = Terminal()
    scheme = "https" if options.tls_cert else "http"
    client = EngineClient(config, on_log=EngineLog(terminal), on_status=EngineProgress(terminal))
    try:
        url = f"{scheme}://{address(options.host, options.port)}/v1"
        serve(client, config, options, on_start=lambda: terminal.say(f"OpenAI's API: {url}"))
        if client.status.state == "failed":
            raise Unavailable(f"the engine failed: {client.status.detail}")
    finally:
        client.close(linger=False)
    return 0


def _check_tls(cert: Path | None, key: Path | None) -> None:
    """Before the engine is started: uvicorn would find out after."""
    if cert is None and key is None:
        return
    if cert is None or key is None:
        missing = "--tls-cert" if cert is None else "--tls-key"
        raise InvalidArgument(f"{missing} is missing; accepted: both --tls-cert and --tls-key, or neither")
    for flag, path in (("--tls-cert", cert), ("--tls-key", key)):
        if not path.is_file():
            raise NotFound(f"{flag} is {str(path)!r}, which is no file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cert)
    except OSError as error:
        raise InvalidArgument(f"--tls-cert is {str(cert)!r}: {error}; accepted: a certificate chain (PEM)") from None
    try:  # with a password, lest one is asked for here
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="none")
    except OSError as error:
        accepted = "the private key of the certificate (PEM), not encrypted"
        raise InvalidArgument(f"--tls-key is {str(key)!r}: {error}; accepted: {accepted}") from None
