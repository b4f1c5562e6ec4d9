"""Writes ``docs/metrics.md`` from the table of metrics: ``python -m radix_backend.triton.metrics_reference``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from radix_backend.triton.metrics import ENGINE, HISTOGRAM, REQUEST, Family
from radix_backend.triton.publisher import SAMPLES

_INTRODUCTION = """\
# Metrics

<!-- Generated: python -m radix_backend.triton.metrics_reference docs/metrics.md -->

On Triton's own endpoint, `http://<server>:8002/metrics`, beside Triton's families (`nv_inference_*` and others).

The names are vLLM's with the prefix `radix:`, so that a dashboard made for vLLM needs one replacement. Every series is
labelled `model` and `version` like Triton's own; further labels are in the tables. Values are brought to Triton about
once a second, never on the path of a token. They begin at 0 when the model is loaded; those of a model that is unloaded
disappear.
"""

_ENGINE = """\
## The engine

What it does for all its clients: models with equal settings share one engine, and each of them shows it. With several
instances of a model the first one publishes these. Gauges are 0 while the engine is not up. Counters go on when the
engine is restarted; what it did in the last second before its death may be missing. Values stand still when the stub
itself dies, until the model is unloaded and loaded again.
"""

_REQUEST = """\
## Requests

What the model's own requests were given. With several instances of a model, those beyond the first have a further label
`model_instance` (Triton cannot share a series between instances): sum over it.

The tokens of a request that is cancelled or fails count in `radix:generation_tokens_total` and in their latencies.
`radix:e2e_request_latency_seconds`, `radix:request_queue_time_seconds`, `radix:request_prompt_tokens` and
`radix:request_generation_tokens` are of requests that ended with `stop` or `length`.
"""

_NOTES = """\
## Load in a response header

Servers that know ORCA answer a `/generate` request that has the header `endpoint-load-metrics-format: json` (or `text`)
with a header `endpoint-load-metrics`: `kv_cache_utilization` is `used` by `max`, `max_token_capacity` is `max` by
`tokens_per` of `nv_trt_llm_kv_cache_block_metrics`. Triton takes the last model it finds, whichever was asked: with
several models in one server, read `/metrics`. Triton 2.51, which `script/server` installs, does not know ORCA.

## Prometheus

```
scrape_configs:
  - job_name: triton
    scrape_interval: 5s
    static_configs: [{ targets: ["127.0.0.1:8002"] }]
```

`promtool check metrics` has two remarks, both the price of vLLM's names: "metric names should not contain ':'" for each
`radix:` name, and 'non-counter metrics should not have "_total" suffix' for `radix:iteration_tokens_total`.
"""


def render() -> str:
    """The whole page."""
    parts = [
        _INTRODUCTION,
        _ENGINE,
        _table(ENGINE),
        _REQUEST,
        _table(REQUEST),
        _sampled(REQUEST),
        _buckets(ENGINE + REQUEST),
        _NOTES,
    ]
    return "\n".join(parts)


def _table(families: Iterable[Family]) -> str:
    rows = ["| metric | kind | |", "|---|---|---|"]
    for family in families:
        name = f"`{family.name}`"
        if family.label:
            name += f"<br>`{family.label}`: " + ", ".join(f"`{value}`" for value in family.values)
        rows.append(f"| {name} | {family.kind} | {family.help} |")
    return "\n".join(rows) + "\n"


def _sampled(families: Iterable[Family]) -> str:
    names = " and ".join(f"`{family.name}`" for family in families if family.sampled)
    return (
        f"Beyond {SAMPLES:,} observations a second, {names}\n"
        "are of a random sample: their quantiles and means stay right, their `_count` falls behind\n"
        "`radix:generation_tokens_total`. Everything else is counted in full.\n"
    )


def _buckets(families: Iterable[Family]) -> str:
    names: dict[tuple[float, ...], list[str]] = {}
    for family in families:
        if family.kind == HISTOGRAM:
            names.setdefault(family.buckets, []).append(f"`{family.name}`")
    rows = ["## Buckets", "", "| histogram | upper bounds |", "|---|---|"]
    for bounds, sharing in names.items():
        rows.append(f"| {'<br>'.join(sharing)} | {', '.join(f'{bound:g}' for bound in bounds)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the metrics reference.")
    parser.add_argument("file", nargs="?", type=Path, help="where to; standard output by default")
    file = parser.parse_args().file
    if file is None:
        sys.stdout.write(render())
    else:
        file.write_text(render())


if __name__ == "__main__":
    main()
