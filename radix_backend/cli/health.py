"""``/healthz``: one answer for load balancers and orchestrators, also where Triton's own readiness knows less.

A server of 2.51 calls a model ready whose stub is dead. Here every question is put to the server, to the stub and to
what is known of the engine.
"""

from __future__ import annotations

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_ANSWER_SECONDS = 2.0  # for the server, and again for the stub


class HealthServer:
    """Answers ``GET /healthz`` on ``host``:``port`` until it is closed: 200, or 503 with the reason, as JSON."""

    def __init__(self, host: str, port: int, ailment: Callable[[], str]) -> None:
        """``ailment`` returns why not to come here, or ""; called by one thread at a time."""
        asking = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.partition("?")[0] != "/healthz":
                    self.send_error(404)
                    return
                with asking:
                    reason = ailment()
                body = json.dumps({"status": "unavailable", "reason": reason} if reason else {"status": "ok"}).encode()
                self.send_response(503 if reason else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, format: str, *arguments: Any) -> None:
                """Probes come every few seconds: nothing to tell."""

        self._server = _Server((host, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="radix-healthz", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)


def server_ailment(address: str, model: str) -> str:
    """What is wrong with the server that listens on ``address`` for HTTP, or with the stub of this model."""
    if reason := _ask(f"http://{address}/v2/health/live", None):
        return f"tritonserver does not answer: {reason}"
    if reason := _ask(f"http://{address}/v2/models/{model}/generate", b'{"health_check": true}'):
        return f"the stub of model {model!r} does not answer: {reason}"
    return ""


def _ask(url: str, body: bytes | None) -> str:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=_ANSWER_SECONDS) as answer:
            answer.read()
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read(500).decode(errors='replace')}"
    except OSError as error:
        return str(error)
    return ""
