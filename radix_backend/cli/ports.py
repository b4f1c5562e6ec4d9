"""Where servers listen."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from radix_backend.errors import InvalidArgument


@dataclass(frozen=True)
class Ports:
    host: str
    http: int
    grpc: int
    metrics: int
    health: int = 0  # 0: none
    openai: int = 0

    def check(self) -> None:
        """Raise InvalidArgument unless all can be listened on."""
        flags = {"--http-port": self.http, "--grpc-port": self.grpc, "--metrics-port": self.metrics}
        optional = {"--health-port": self.health, "--openai-port": self.openai}
        flags |= {flag: port for flag, port in optional.items() if port}
        if len(set(flags.values())) < len(flags):
            raise InvalidArgument(f"{', '.join(f'{flag} {port}' for flag, port in flags.items())} must differ")
        for flag, port in flags.items():
            check_port(self.host, flag, port)

    def address(self, port: int) -> str:
        """Where a client on this machine connects."""
        return address(self.host, port)


def address(host: str, port: int) -> str:
    """Where a client on this machine connects to a server that listens on ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_port(host: str, flag: str, port: int) -> None:
    """Raise InvalidArgument unless it can be listened on."""
    if not 0 < port < 65536:
        raise InvalidArgument(f"{flag} is {port}; accepted: 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            message = (
                f"{flag} is {port}, which cannot be listened on at {host} ({error.strerror}); accepted: a free port"
            )
            raise InvalidArgument(message) from None
