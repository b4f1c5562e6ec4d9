"""From traces to figures, and the one table that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from radix_backend.load import Outcome, Trace


class Figures(msgspec.Struct):
    """Of one workload on one target. Times are in milliseconds; percentiles are over requests, of ITL over gaps."""

    target: str
    workload: str
    num_requests: int
    num_failed: int
    num_prompt_tokens: int
    num_output_tokens: int  # really generated
    seconds: float  # from the start to the last token
    tok_s: float
    ttft_ms: dict[str, float]
    itl_ms: dict[str, float]  # between two responses of a stream: what a reader waits
    tpot_ms: dict[str, float]  # of a request: time after its first response over the tokens after the first
    tokens_per_response: float
    cache_hit_rate: float | None  # share of prompt tokens; None where the target does not tell
    gpu_memory_mib: int | None
    num_ranks: int | None  # that computed; None where the target does not tell
    cpu_seconds: dict[str, float]
    facts: dict[str, float]
    errors: list[str]  # the first of each kind


def figures(
    target: str, workload: str, outcome: Outcome, gpu_memory_mib: int | None = None, num_ranks: int | None = None
) -> Figures:
    """Failed requests count for nothing but ``num_failed``."""
    good = [trace for trace in outcome.traces if not trace.error and trace.times]
    failed = [trace for trace in outcome.traces if trace not in good]
    seconds = max((trace.times[-1] for trace in good), default=0.0) - min((t.sent for t in outcome.traces), default=0)
    tokens = sum(trace.num_tokens for trace in good)
    prompts = sum(trace.num_prompt_tokens for trace in good)
    cached = [trace.num_cached_tokens for trace in good]
    known = [count for count in cached if count is not None]
    return Figures(
        target=target,
        workload=workload,
        num_requests=len(outcome.traces),
        num_failed=len(failed),
        num_prompt_tokens=prompts,
        num_output_tokens=tokens,
        seconds=round(seconds, 4),
        tok_s=round(tokens / seconds, 1) if good else 0.0,
        ttft_ms=_summary([trace.times[0] - trace.sent for trace in good]),
        itl_ms=_summary(np.concatenate([np.diff(trace.times) for trace in good]) if good else []),
        tpot_ms=_summary(
            [(trace.times[-1] - trace.times[0]) / (trace.num_tokens - 1) for trace in good if trace.num_tokens > 1]
        ),
        tokens_per_response=round(tokens / sum(len(trace.times) for trace in good), 3) if good else 0.0,
        cache_hit_rate=round(sum(known) / prompts, 4) if known and len(known) == len(good) else None,
        gpu_memory_mib=gpu_memory_mib,
        num_ranks=num_ranks,
        cpu_seconds=outcome.cpu_seconds,
        facts=outcome.facts,
        errors=sorted({trace.error or "no token came" for trace in failed})[:5],
    )


def _summary(seconds: Sequence[float] | np.ndarray[Any, Any]) -> dict[str, float]:
    """Mean and percentiles in milliseconds; empty for nothing."""
    if not len(seconds):
        return {}
    values = np.asarray(seconds) * 1e3
    percentiles = {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 99)}
    return {"mean": round(float(values.mean()), 3), **percentiles}


_COLUMNS = (
    ("workload", lambda f: f.workload),
    ("target", lambda f: f.target),
    ("tok/s", lambda f: f"{f.tok_s:,.0f}"),
    ("TTFT mean", lambda f: _ms(f.ttft_ms, "mean")),
    ("p50", lambda f: _ms(f.ttft_ms, "p50")),
    ("p99", lambda f: _ms(f.ttft_ms, "p99")),
    ("ITL p50", lambda f: _ms(f.itl_ms, "p50")),
    ("p99", lambda f: _ms(f.itl_ms, "p99")),
    ("TPOT", lambda f: _ms(f.tpot_ms, "mean")),
    ("tok/resp", lambda f: f"{f.tokens_per_response:.2f}"),
    ("cache hits", lambda f: "" if f.cache_hit_rate is None else f"{100 * f.cache_hit_rate:.1f} %"),
    ("GPU MiB", lambda f: "" if f.gpu_memory_mib is None else str(f.gpu_memory_mib)),
    ("tokens", lambda f: str(f.num_output_tokens)),
    ("failed", lambda f: str(f.num_failed)),
)


def _ms(summary: dict[str, float], key: str) -> str:
    return f"{summary[key]:.2f}" if key in summary else ""


def scaling(of: Figures, first: Figures) -> tuple[float, float | None]:
    """How many times the throughput of another target, and that for each rank; None where ranks are not known."""
    times = of.tok_s / first.tok_s if first.tok_s else 0.0
    return times, times * first.num_ranks / of.num_ranks if first.num_ranks and of.num_ranks else None


def table(all_figures: Sequence[Figures]) -> str:
    """Times in milliseconds; CPU time and errors below, where there are any.

    Where several targets had a workload, each is compared with the first of them: how many times its tok/s, and with
    several ranks, what share of that times their number.
    """
    rows = [[name for name, _ in _COLUMNS], *([show(each) for _, show in _COLUMNS] for each in all_figures)]
    first: dict[str, Figures] = {}
    compared = [scaling(each, first.setdefault(each.workload, each)) for each in all_figures]
    if len(first) < len(all_figures):
        rows[0] += ["x first", "efficiency"]
        for row, (times, efficiency) in zip(rows[1:], compared, strict=True):
            row += [f"{times:.2f}", "" if efficiency is None else f"{100 * efficiency:.0f} %"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for each in all_figures:
        name = f"{each.workload} {each.target}"
        if each.cpu_seconds and each.seconds:
            cores = ", ".join(f"{role} {cpu / each.seconds:.2f}" for role, cpu in each.cpu_seconds.items())
            lines.append(f"{name}: cores busy: {cores}")
        lines += [f"{name}: {error}" for error in each.errors]
    return "\n".join(lines)


def latencies(traces: Sequence[Trace]) -> tuple[list[float], list[float]]:
    """TTFT and ITL of all requests, in milliseconds, for plots."""
    good = [trace for trace in traces if not trace.error and trace.times]
    ttft = [1e3 * (trace.times[0] - trace.sent) for trace in good]
    return ttft, [1e3 * float(gap) for trace in good for gap in np.diff(trace.times)]
