from pathlib import Path

import pytest

from radix_backend.bench.report import figures, table
from radix_backend.load import Outcome, Trace

# Two responses, of 1 and 4 tokens; one of 2; and a failed one, of which nothing may count.
TRACES = [
    Trace(sent=0.0, times=[0.5, 2.0], num_tokens=5, num_prompt_tokens=10, num_cached_tokens=4),
    Trace(sent=1.0, times=[1.1], num_tokens=2, num_prompt_tokens=10, num_cached_tokens=6),
    Trace(sent=0.0, times=[9.0], num_tokens=50, num_prompt_tokens=10, error="HTTP 500"),
]


def test_figures_are_those_of_requests_that_did_not_fail() -> None:
    found = figures("offline", "seed", Outcome(TRACES))
    assert (found.num_requests, found.num_failed, found.errors) == (3, 1, ["HTTP 500"])
    assert (found.num_output_tokens, found.seconds, found.tok_s) == (7, 2.0, 3.5)
    assert found.ttft_ms == pytest.approx({"mean": 300, "p50": 300, "p99": 496})
    assert found.itl_ms["p50"] == pytest.approx(1500)
    assert found.tpot_ms["mean"] == pytest.approx((1500 / 4 + 0) / 2)
    assert found.cache_hit_rate == 0.5
    assert found.tokens_per_response == pytest.approx(7 / 3, abs=1e-3)


def test_a_cache_hit_rate_that_not_every_answer_tells_is_not_given() -> None:
    silent = Trace(sent=0.0, times=[1.0], num_tokens=1, num_prompt_tokens=10)
    assert figures("openai", "seed", Outcome([*TRACES[:2], silent])).cache_hit_rate is None


def test_a_target_where_everything_failed_still_has_a_row_with_the_reason() -> None:
    text = table([figures("openai", "seed", Outcome([TRACES[2]]))])
    assert "seed" in text
    assert "HTTP 500" in text


def test_targets_of_one_workload_are_compared_with_the_first() -> None:
    slow, fast = ([Trace(sent=0.0, times=[seconds], num_tokens=30, num_prompt_tokens=1)] for seconds in (3.0, 2.0))
    one = figures("offline", "seed", Outcome(slow), num_ranks=1)
    two = figures("offline@2x1", "seed", Outcome(fast), num_ranks=2)
    other = figures("openai", "seed", Outcome(fast))
    head, *rows = (line.split() for line in table([one, two, other]).splitlines())
    assert head[-3:] == ["x", "first", "efficiency"]
    assert [row[-3:] for row in rows] == [["1.00", "100", "%"], ["1.50", "75", "%"], ["30", "0", "1.50"]]
    assert "first" not in table([one, figures("offline", "single", Outcome(slow))])


def test_plots_are_png_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from radix_backend.bench.plots import plot

    path = plot(tmp_path / "plots", "rate@5:1", {"offline": Outcome(TRACES), "triton": Outcome(TRACES[:1])})
    assert path.read_bytes().startswith(b"\x89PNG")
