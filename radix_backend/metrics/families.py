"""Every metric family, once: what doors expose and what ``docs/metrics.md`` says are made from this table.

The names are vLLM's with our prefix, so that its dashboards need one replacement, and one family is TensorRT-LLM's,
from which Triton computes its ORCA response header.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from radix_backend.errors import CODES, Cancelled

Figures = Mapping[str, float]  # what `EngineClient.stats` answers

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"


@dataclass(frozen=True, eq=False)  # by identity: families are keys
class Family:
    """A metric family. Its series carry ``model`` and ``version``, and one for each of ``values`` where labelled.

    With ``read``, a family is about the engine: the function gives the value (a total, if a counter) from the engine's
    figures. Without, it is about the requests of a model instance or another door, or about what
    that knows of its engine.
    """

    name: str
    kind: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ("",)
    buckets: tuple[float, ...] = ()  # upper bounds, +Inf left out
    read: Mapping[str, Callable[[Figures], float]] | None = None  # by label value
    sampled: bool = False  # a histogram of what happens too often to observe it all (see publisher.py)


def _figure(name: str) -> dict[str, Callable[[Figures], float]]:
    return {"": lambda figures: figures[name]}


def _used_pages(figures: Figures) -> float:
    """Pages that a new request could not have: those of running requests, and quarantined ones."""
    return figures["pages"] - _free_pages(figures)


def _free_pages(figures: Figures) -> float:
    return figures["pages_free"] + figures["pages_evictable"]


def _usage(figures: Figures) -> float:
    return _used_pages(figures) / figures["pages"]


# Seconds, from the gap between two tokens on a fast GPU to the longest answers.
_LATENCY = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0),
)
_TOKENS = tuple(float(2**power) for power in range(18))  # 1 to 131,072

# The engine counts its steps in the same buckets (engine/stats.py).
ITERATION_TOKENS = Family(
    "radix:iteration_tokens_total",
    HISTOGRAM,
    "Tokens computed in one step of the engine: decoded ones and those of prefill chunks.",
    buckets=_TOKENS[:15],
)

ENGINE_UP = Family(
    "radix:engine_up", GAUGE, "1 while the engine takes requests, 0 while it starts, restarts or has failed."
)
ENGINE_RESTARTS = Family(
    "radix:engine_restarts_total", COUNTER, "Times the engine was started again after it had served."
)

# What every client of the same engine sees alike.
ENGINE = (
    ENGINE_UP,
    ENGINE_RESTARTS,
    Family("radix:num_requests_running", GAUGE, "Requests that the engine computes.", read=_figure("requests_running")),
    Family(
        "radix:num_requests_waiting",
        GAUGE,
        "Requests that wait to be admitted, retracted ones among them.",
        read=_figure("requests_waiting"),
    ),
    Family(
        "radix:kv_cache_usage_perc",
        GAUGE,
        "Share of the KV cache's pages that no new request could have, from 0 to 1. "
        "Cached prefixes that nobody uses can be evicted and do not count.",
        read={"": _usage},
    ),
    Family(
        "radix:kv_pages_quarantined",
        GAUGE,
        "Pages that the engine's audit has taken out of use. Anything but 0 is a defect to report.",
        read=_figure("pages_quarantined"),
    ),
    Family(
        "nv_trt_llm_kv_cache_block_metrics",
        GAUGE,
        "Pages of the KV cache under TensorRT-LLM's name; Triton's endpoint-load-metrics header is computed from it. "
        "A block is a page, 'tokens_per' its size in tokens, 'fraction' is used by max.",
        label="kv_cache_block_type",
        values=("max", "used", "free", "tokens_per", "fraction"),
        read={
            "max": lambda figures: figures["pages"],
            "used": _used_pages,
            "free": _free_pages,
            "tokens_per": lambda figures: figures["page_size"],
            "fraction": _usage,
        },
    ),
    Family(
        "radix:prompt_tokens_total",
        COUNTER,
        "Prompt tokens of admitted requests, those found in the cache among them.",
        read=_figure("prompt_tokens_total"),
    ),
    Family(
        "radix:prefix_cache_queries_total",
        COUNTER,
        "Prompt tokens looked up in the radix cache.",
        read=_figure("prompt_tokens_total"),
    ),
    Family(
        "radix:prefix_cache_hits_total",
        COUNTER,
        "Prompt tokens found in the radix cache.",
        read=_figure("cached_tokens_total"),
    ),
    Family(
        "radix:evicted_tokens_total",
        COUNTER,
        "Cached tokens evicted from the radix cache to make room.",
        read=_figure("evicted_tokens_total"),
    ),
    Family(
        "radix:num_preemptions_total",
        COUNTER,
        "Times a running request was retracted because pages ran out.",
        read=_figure("retractions_total"),
    ),
    Family(
        "radix:streams_resumed_total",
        COUNTER,
        "Streams that went on with tokens generated before an interruption.",
        read=_figure("resumed_total"),
    ),
    ITERATION_TOKENS,
)

GENERATION_TOKENS = Family("radix:generation_tokens_total", COUNTER, "Generated tokens, up to the stop where one cut.")
REQUEST_SUCCESS = Family(
    "radix:request_success_total",
    COUNTER,
    "Requests that ended: at a stop, at their length, or cancelled by the client (abort).",
    label="finished_reason",
    values=("stop", "length", "abort"),
)
REQUEST_FAILURE = Family(
    "radix:request_failure_total",
    COUNTER,
    "Requests that ended with an error, by its code. Triton's own counters take them for successes, since they end "
    "with a response.",
    label="code",
    values=tuple(code for code in CODES if code != Cancelled.code),
)
TIME_TO_FIRST_TOKEN = Family(
    "radix:time_to_first_token_seconds",
    HISTOGRAM,
    "From the arrival of a request in the door to its first token there.",
    buckets=_LATENCY,
)
INTER_TOKEN_LATENCY = Family(
    "radix:inter_token_latency_seconds",
    HISTOGRAM,
    "Between two successive steps that brought tokens to a request, as they arrive in the door.",
    buckets=_LATENCY,
    sampled=True,
)
E2E_LATENCY = Family(
    "radix:e2e_request_latency_seconds",
    HISTOGRAM,
    "From the arrival of a request in the door to its end there.",
    buckets=_LATENCY,
)
QUEUE_TIME = Family(
    "radix:request_queue_time_seconds",
    HISTOGRAM,
    "Time a request waited in the engine's queue before it was first admitted.",
    buckets=_LATENCY,
)
REQUEST_PROMPT_TOKENS = Family("radix:request_prompt_tokens", HISTOGRAM, "Prompt tokens of a request.", buckets=_TOKENS)
REQUEST_GENERATION_TOKENS = Family(
    "radix:request_generation_tokens", HISTOGRAM, "Generated tokens of a request.", buckets=_TOKENS
)
TOKENS_PER_RESPONSE = Family(
    "radix:tokens_per_response",
    HISTOGRAM,
    "Tokens in one response of a stream. It stays near 1 unless Triton or a client is slower than the engine.",
    buckets=_TOKENS[:11],
    sampled=True,
)

# What each door sees of its own requests: in Triton, each model instance.
REQUEST = (
    GENERATION_TOKENS,
    REQUEST_SUCCESS,
    REQUEST_FAILURE,
    TIME_TO_FIRST_TOKEN,
    INTER_TOKEN_LATENCY,
    E2E_LATENCY,
    QUEUE_TIME,
    REQUEST_PROMPT_TOKENS,
    REQUEST_GENERATION_TOKENS,
    TOKENS_PER_RESPONSE,
)
