"""How the engine's totals become counters."""

from __future__ import annotations

from radix_backend.metrics.publisher import SAMPLES, Totals, observe_steps, sample


def test_totals_go_on_when_the_engine_restarts() -> None:
    totals = Totals(since=100.0)
    assert totals.advance({"start_time": 101.0, "tokens": 5})[0] == 0
    assert totals.advance({"start_time": 101.0, "tokens": 12})[1]["tokens"] == 7
    restarts, new = totals.advance({"start_time": 150.0, "tokens": 3})
    assert (restarts, new["tokens"]) == (1, 3)


def test_what_an_engine_did_for_others_before_is_not_counted() -> None:
    totals = Totals(since=100.0)
    restarts, new = totals.advance({"start_time": 50.0, "tokens": 1000})
    assert (restarts, new["tokens"]) == (0, 0)
    assert totals.advance({"start_time": 50.0, "tokens": 1004})[1]["tokens"] == 4


def test_steps_are_observed_in_their_buckets_and_add_up() -> None:
    observed: list[float] = []

    class Histogram:
        observe = staticmethod(observed.append)

    new = {"iteration_tokens_le_1": 2, "iteration_tokens_sum_le_1": 2, "steps_total": 5}
    new |= {"iteration_tokens_le_8": 3, "iteration_tokens_sum_le_8": 20}
    observe_steps(Histogram(), new)
    assert observed[:2] == [1, 1]
    assert all(4 < value <= 8 for value in observed[2:])
    assert (len(observed), round(sum(observed), 9)) == (5, 22)


def test_what_happens_too_often_is_sampled_without_a_bias() -> None:
    few = [float(value) for value in range(SAMPLES)]
    assert sample(few) == few
    alternating = [1.0, 3.0] * (10 * SAMPLES)  # a regular choice could see one of the two alone
    drawn = sample(alternating)
    assert len(drawn) == SAMPLES
    assert 1.7 < sum(drawn) / SAMPLES < 2.3  # nine standard deviations
