"""What a server shows on /metrics."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Mapping

from radix_backend.metrics.publisher import PUSH_SECONDS
from tests.triton.server import TritonServer, eventually

_SERIES = re.compile(r"^([\w:]+)\{(.*)\} (\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_OURS = re.compile(r"^(# \w+ )?(radix:|nv_trt_llm_)")


def page(server: TritonServer) -> str:
    """The lines of our families."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics", timeout=30) as response:
        text = response.read().decode()
    return "".join(line for line in text.splitlines(keepends=True) if _OURS.match(line))


class Metrics:
    """One scrape. ``metrics["generation_tokens_total"]`` adds up the series of that name, all labels together."""

    def __init__(self, server: TritonServer) -> None:
        self.series: list[tuple[str, Mapping[str, str], float]] = []
        for line in page(server).splitlines():
            if found := _SERIES.match(line):
                name, labels, value = found.groups()
                self.series.append((name.removeprefix("radix:"), dict(_LABEL.findall(labels)), float(value)))

    def get(self, name: str, **labels: str) -> float:
        """The sum of the series that have these labels. Raises LookupError if there is none."""
        values = [v for n, given, v in self.series if n == name and labels.items() <= given.items()]
        if not values:
            raise LookupError(f"no series {name} {labels}")
        return sum(values)

    def __getitem__(self, name: str) -> float:
        return self.get(name)

    def since(self, before: Metrics, name: str, **labels: str) -> float:
        return self.get(name, **labels) - before.get(name, **labels)


def settled(server: TritonServer) -> Metrics:
    """A scrape after which an idle server's figures no longer change."""
    last = Metrics(server)

    def unchanged() -> Metrics | None:
        nonlocal last
        for _ in range(25):  # the engine's figures are one push old; a machine that stalls does so in one of the naps
            time.sleep(PUSH_SECONDS / 10)
        last, before = Metrics(server), last
        return last if sorted(map(repr, last.series)) == sorted(map(repr, before.series)) else None

    return eventually(unchanged)
