"""One PNG a workload: throughput, and the distributions of TTFT and ITL, of every target."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

from radix_backend.bench.report import figures, latencies
from radix_backend.errors import NotFound
from radix_backend.load import Outcome


def check_plots() -> None:
    """Raises NotFound without matplotlib: better before measuring than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        hint = f"{sys.executable} -m pip install 'radix-backend[bench]'"
        raise NotFound(f"--plots needs the package 'matplotlib': {hint}")


def plot(directory: Path, workload: str, outcomes: Mapping[str, Outcome]) -> Path:
    """Draw ``outcomes`` (by target) of one workload; returns the file."""
    from matplotlib.figure import Figure  # without pyplot: no display is looked for

    figure = Figure(figsize=(13, 4), layout="constrained")
    throughput, ttft, itl = figure.subplots(1, 3)
    figure.suptitle(workload)
    rates = {target: figures(target, workload, outcome).tok_s for target, outcome in outcomes.items()}
    bars = throughput.bar(list(rates), list(rates.values()))
    throughput.bar_label(bars, fmt="{:,.0f}")
    throughput.set_title("throughput")
    throughput.set_ylabel("tokens a second")
    for axes, title, which in ((ttft, "time to first token", 0), (itl, "between responses of a stream (ITL)", 1)):
        for target, outcome in outcomes.items():
            values = latencies(outcome.traces)[which]
            if values:
                axes.ecdf(values, label=target)
        axes.set_title(title)
        axes.set_xlabel("ms")
        axes.set_ylabel("share of them")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{workload.replace(':', '-').replace('@', '-')}.png"
    figure.savefig(path, dpi=120)
    return path
