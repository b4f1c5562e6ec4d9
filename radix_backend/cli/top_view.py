"""How `radix-backend top` looks on a terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from radix_backend.cli.top_load import Load
from radix_backend.errors import RadixError

_HISTORY = 60  # intervals
_LEVELS = "▁▂▃▄▅▆▇█"


def watch(title: str, next_load: Callable[[], Load]) -> NoReturn:
    """Until Ctrl-C. What cannot be asked now is told, and asked again."""
    rates: deque[float] = deque(maxlen=_HISTORY)
    with Live(Text(f"{title}: looking …"), console=Console(), auto_refresh=False) as live:
        while True:
            try:
                load = next_load()
            except RadixError as error:
                view: RenderableType = Text(str(error), style="red")
            else:
                rates.append(load.generation_tokens_per_second)
                view = Group(_table(load), Text(_sparkline(rates), style="green"))
            live.update(Group(Text(title, style="bold"), view), refresh=True)


def show(load: Load) -> None:
    Console().print(_table(load))


def _table(load: Load) -> Table:
    grid = Table.grid(padding=(0, 2))
    hits = load.prefix_cache_hit_rate
    grid.add_row("requests", f"{load.requests_running} running, {load.requests_waiting} waiting")
    grid.add_row("KV cache in use", _share(load.kv_cache_usage))
    grid.add_row("prefix cache hits", "none asked yet" if hits is None else _share(hits))
    grid.add_row("prompt", f"{load.prompt_tokens_per_second:,.0f} tok/s")
    grid.add_row("generation", f"{load.generation_tokens_per_second:,.0f} tok/s")
    grid.add_row("preemptions", f"{load.preemptions_total}")
    return grid


def _share(value: float) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_row(f"{value:4.0%}", ProgressBar(total=1, completed=value, width=30))
    return grid


def _sparkline(rates: deque[float]) -> str:
    highest = max(rates) or 1.0
    return "".join(_LEVELS[round(rate / highest * (len(_LEVELS) - 1))] for rate in rates)
