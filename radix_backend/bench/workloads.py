"""Workloads of the bench. Token ids come from Python's generator, so that other engines can be given the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from radix_backend.errors import InvalidArgument
from radix_backend.validation import show

_VOCAB = 10_000  # every model's vocabulary is larger


@dataclass(frozen=True)
class Workload:
    """Requests that arrive at once: prompts and exactly how many tokens follow each."""

    prompts: list[list[int]]
    num_outputs: list[int]


def _prompt(generator: random.Random, length: int) -> list[int]:
    return [generator.randint(0, _VOCAB) for _ in range(length)]


def seed(number: int, requests: int = 256, least: int = 100, most: int = 1024) -> Workload:
    """Prompts and outputs of random lengths."""
    generator = random.Random(number)
    prompts = [_prompt(generator, generator.randint(least, most)) for _ in range(requests)]
    return Workload(prompts, [generator.randint(least, most) for _ in range(requests)])


def prefix(
    number: int, groups: int = 16, requests: int = 16, shared: int = 1500, own: int = 150, outputs: int = 64
) -> Workload:
    """Groups of requests that share a prefix, shuffled."""
    generator = random.Random(1000 + number)
    prompts = []
    for _ in range(groups):
        common = _prompt(generator, shared)
        prompts += [common + _prompt(generator, own) for _ in range(requests)]
    generator.shuffle(prompts)
    return Workload(prompts, [outputs] * len(prompts))


def prefixlong(number: int) -> Workload:
    """`prefix` with longer outputs."""
    return prefix(number, outputs=512)


def single(number: int, inputs: int = 128, outputs: int = 512) -> Workload:
    """One stream."""
    return Workload([_prompt(random.Random(2000 + number), inputs)], [outputs])


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "seed": seed,
    "prefix": prefix,
    "prefixlong": prefixlong,
    "single": single,
}


def workload(name: str) -> Workload:
    """Of "seed:1": the workload and the number its randomness starts from (0 if left out). Raises InvalidArgument."""
    kind, _, number = name.partition(":")
    if kind not in WORKLOADS or not (number or "0").isdecimal():
        raise InvalidArgument(f"workload {show(name)}; accepted: {', '.join(WORKLOADS)}, with :NUMBER or without")
    return WORKLOADS[kind](int(number or 0))
