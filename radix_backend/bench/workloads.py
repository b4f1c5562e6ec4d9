"""Workloads of the bench. Token ids come from Python's generator, so that other engines can be given the same."""

from __future__ import annotations

import random
from collections.abc import Callable

from radix_backend.errors import InvalidArgument
from radix_backend.load import Load, Session, Turn
from radix_backend.validation import show

VOCAB = 10_000  # token ids are 0 to VOCAB; every model's vocabulary is larger


def _prompt(generator: random.Random, length: int) -> list[int]:
    return [generator.randint(0, VOCAB) for _ in range(length)]


def _at_once(prompts: list[list[int]], num_outputs: list[int]) -> Load:
    turns = [Turn(prompt, count) for prompt, count in zip(prompts, num_outputs, strict=True)]
    return Load([Session([turn]) for turn in turns])


def seed(number: int, requests: int = 256, least: int = 100, most: int = 1024) -> Load:
    """256 requests at once, prompts and outputs of 100 to 1024 tokens."""
    generator = random.Random(number)
    prompts = [_prompt(generator, generator.randint(least, most)) for _ in range(requests)]
    return _at_once(prompts, [generator.randint(least, most) for _ in range(requests)])


def prefix(
    number: int, groups: int = 16, requests: int = 16, shared: int = 1500, own: int = 150, outputs: int = 64
) -> Load:
    """16 groups of 16 requests at once: 1500 tokens shared in the group, 150 of their own, 64 outputs."""
    generator = random.Random(1000 + number)
    prompts = []
    for _ in range(groups):
        common = _prompt(generator, shared)
        prompts += [common + _prompt(generator, own) for _ in range(requests)]
    generator.shuffle(prompts)
    return _at_once(prompts, [outputs] * len(prompts))


def prefixlong(number: int) -> Load:
    """prefix with 512 outputs."""
    return prefix(number, outputs=512)


def single(number: int, inputs: int = 128, outputs: int = 512) -> Load:
    """One stream: 128 in, 512 out."""
    return _at_once([_prompt(random.Random(2000 + number), inputs)], [outputs])


def multi_turn(number: int, sessions: int = 64, turns: int = 6, own: int = 120, outputs: int = 80) -> Load:
    """64 conversations of 6 turns: 120 new tokens and 80 outputs a turn, behind everything said before."""
    generator = random.Random(3000 + number)
    return Load([Session([Turn(_prompt(generator, own), outputs) for _ in range(turns)]) for _ in range(sessions)])


def rate(number: int, per_second: float) -> Load:
    """Requests of seed's lengths, arriving independently of each other (Poisson) at so many a second."""
    # No rate finds the prompts of another in the cache.
    load, generator, arrival = seed(5000 + 1000 * number + round(per_second)), random.Random(4000 + number), 0.0
    for session in load.sessions:
        arrival += generator.expovariate(per_second)
        session.arrival = arrival
    return load


def warm_up() -> Load:
    """What is measured is not what runs first."""
    return _at_once([[i % 1000 + 1 for i in range(start, start + 200)] for start in range(8)], [32] * 8)


WORKLOADS: dict[str, Callable[[int], Load]] = {
    "seed": seed,
    "prefix": prefix,
    "prefixlong": prefixlong,
    "single": single,
    "multi-turn": multi_turn,
}
ACCEPTED = f"{', '.join(WORKLOADS)}, seed@REQUESTS, each with :NUMBER or without, and rate@REQUESTS_A_SECOND"


def workload(name: str) -> Load:
    """Of "seed:1", "seed@512" or "rate@20:1": the number is where its randomness starts from (0 if left out).

    Raises InvalidArgument.
    """
    kind, _, number = name.partition(":")
    kind, at, many = kind.partition("@")
    if (number or "0").isdecimal():
        start = int(number or 0)
        if kind in WORKLOADS and not at:
            return WORKLOADS[kind](start)
        if kind == "seed" and many.isdecimal() and int(many):
            return seed(start + 1_000_000 * int(many), int(many))  # whose prompts no other workload has cached
        if kind == "rate" and (speed := _positive(many)):
            return rate(start, speed)
    raise InvalidArgument(f"workload {show(name)}; accepted: {ACCEPTED}")


def _positive(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None
