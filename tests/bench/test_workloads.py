import pytest

from radix_backend.bench.workloads import workload
from radix_backend.errors import InvalidArgument


def lengths(name: str) -> tuple[int, int]:
    """Prompt and output tokens."""
    turns = [turn for session in workload(name).sessions for turn in session.turns]
    return sum(len(turn.tokens) for turn in turns), sum(turn.num_outputs for turn in turns)


def test_seed_is_the_workload_that_other_engines_were_measured_with() -> None:
    assert lengths("seed:0") == (142_827, 133_966)


def test_a_workload_without_a_number_is_number_0() -> None:
    assert workload("prefix") == workload("prefix:0") != workload("prefix:1")


def test_seed_of_more_requests_asks_for_lengths_like_seeds_and_for_no_prompt_of_it() -> None:
    many = [session.turns[0] for session in workload("seed@512").sessions]
    assert all(100 <= length <= 1024 for turn in many for length in (len(turn.tokens), turn.num_outputs))
    few = [session.turns[0] for session in workload("seed").sessions]
    assert len({tuple(turn.tokens[:16]) for turn in many + few}) == 512 + 256


def test_groups_of_prefix_share_exactly_their_prefix() -> None:
    prompts = [session.turns[0].tokens for session in workload("prefix").sessions]
    assert len(prompts) == 256
    assert len({tuple(prompt[:1500]) for prompt in prompts}) == 16
    assert len({tuple(prompt[:1501]) for prompt in prompts}) == 256


def test_rate_asks_for_lengths_like_seeds_over_time_and_for_no_prompt_twice() -> None:
    turns = [session.turns[0] for session in workload("rate@20:3").sessions]
    assert all(100 <= length <= 1024 for turn in turns for length in (len(turn.tokens), turn.num_outputs))
    prompts = [
        tuple(session.turns[0].tokens[:16])
        for name in ("seed:0", "rate@20", "rate@21", "rate@20:1")
        for session in workload(name).sessions
    ]
    assert len(set(prompts)) == len(prompts) == 4 * 256
    arrivals = [session.arrival for session in workload("rate@20:3").sessions]
    assert arrivals == sorted(arrivals)
    assert 256 / 20 / 2 < arrivals[-1] < 256 / 20 * 2


@pytest.mark.parametrize(
    "name", ["nope", "seed:x", "seed@", "seed@0", "prefix@3", "rate", "rate@0", "rate@x", "rate@inf", "single:-1"]
)
def test_an_unknown_workload_is_refused_with_what_is_accepted(name: str) -> None:
    with pytest.raises(InvalidArgument, match="accepted: seed, prefix"):
        workload(name)
