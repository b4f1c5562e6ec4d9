"""Drives a worker by hand-made plans: a scheduler that does as it is told."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from radix_backend.protocol import TokenLogprobs
from radix_backend.sampling_params import SamplingParams
from radix_backend.worker.interface import NewRequest, StepPlan, Worker


@dataclass
class Row:
    """A request in the driver's hands."""

    slot: int
    tokens: list[int]  # known ones
    pages: list[int]
    computed: int = 0
    prompt_len: int = 0
    outputs: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def is_prefilling(self) -> bool:
        """Whether some of what it came with is not computed yet."""
        return self.computed < len(self.tokens) - len(self.outputs)


class Driver:
    """Hands pages out in ascending order; none comes back unless a row names it itself."""

    def __init__(self, worker: Worker, page_size: int) -> None:
        self.worker, self.page_size = worker, page_size
        self._next_page = 0
        self._step = 0
        self._plan = StepPlan(0)
        self._pages: list[tuple[int, int, int]] = []
        self._sent: dict[int, int] = {}
        self.prompt_logprobs: list[list[TokenLogprobs]] = []  # of all settled steps

    def new(
        self, slot: int, tokens: list[int], *, pages: list[int] | None = None, prompt_len: int | None = None, **sampling
    ) -> Row:
        """A request whose first ``len(pages)`` pages are there already."""
        row = Row(slot, list(tokens), list(pages or []), len(pages or []) * self.page_size)
        row.prompt_len = len(tokens) if prompt_len is None else prompt_len
        described = {
            name: sampling.pop(name) for name in ("stop_token_ids", "bad_words", "num_scored") if name in sampling
        }
        params = SamplingParams(**{"temperature": 0.0, "seed": 0, "max_tokens": 1000, **sampling})
        new = NewRequest(slot, np.array(tokens, np.int32), row.prompt_len, row.computed, params, **described)
        self._plan.new.append(new)
        self._sent[slot] = 0
        return row

    def remap(self, row: Row, pages: list[int]) -> None:
        """From the next step on the row's first pages are these."""
        row.pages[: len(pages)] = pages
        self._pages += [(row.slot, i, page) for i, page in enumerate(pages)]

    def launch(self, *rows: tuple[Row, int]) -> list[Row]:
        """One step computing so many tokens of each row, decodes first. Returns the sampling rows.

        Pages are handed out in the order of the arguments.
        """
        order = sorted(rows, key=lambda row: row[0].is_prefilling)
        num_decode = sum(not row.is_prefilling for row, _ in rows)
        for row, count in rows:
            row.computed += count
            while len(row.pages) * self.page_size < row.computed:
                row.pages.append(self._next_page)
                self._next_page += 1
            self._pages += [(row.slot, i, row.pages[i]) for i in range(self._sent[row.slot], len(row.pages))]
            self._sent[row.slot] = len(row.pages)
        sample = [row.computed >= len(row.tokens) for row, _ in order]
        self._step += 1
        columns = np.array(self._pages, np.int32).reshape(-1, 3)
        self.worker.launch(
            dataclasses.replace(
                self._plan,
                step=self._step,
                page_slots=columns[:, 0],
                page_index=columns[:, 1],
                page_ids=columns[:, 2],
                slots=np.array([row.slot for row, _ in order], np.int32),
                num_tokens=np.array([count for _, count in order], np.int32),
                sample=np.array(sample, np.bool_),
                num_decode=num_decode,
            )
        )
        self._plan, self._pages = StepPlan(0), []
        return [row for (row, _), sampled in zip(order, sample, strict=True) if sampled]

    def settle(self, sampling: list[Row]) -> None:
        result = self.worker.settle()
        assert len(result.tokens) == len(sampling)
        for n, (row, token) in enumerate(zip(sampling, result.tokens.tolist(), strict=True)):
            row.outputs.append(token)
            row.tokens.append(token)
            if result.logprobs and (logprobs := result.logprobs[n]) is not None:
                row.logprobs.append(logprobs)
        self.prompt_logprobs += result.prompt_logprobs

    def step(self, *rows: tuple[Row, int]) -> None:
        self.settle(self.launch(*rows))

    def decode(self, *rows: Row, count: int) -> None:
        """So many more tokens of each row, every step launched before the last one's tokens are read."""
        in_flight = None
        for _ in range(count):
            sampling = self.launch(*[(row, 1) for row in rows])
            if in_flight is not None:
                self.settle(in_flight)
            in_flight = sampling
        if in_flight is not None:
            self.settle(in_flight)
