"""A worker without a model: it executes step plans on a simulated KV memory and checks everything it reads.

The KV of a token is the hash of the whole prefix up to it, so a stale, missing or foreign page shows at once, and the
"model" samples a token that depends on the whole prefix. As on a device, steps run in the order they are launched,
possibly long after; within a step all rows write before any row reads. With several pipeline stages a token is there
for the step that comes ``pp_size`` after the one that sampled it, and not before.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from radix_backend.engine.kv_cache import KVCache
from radix_backend.engine.request import Request
from radix_backend.engine.scheduler import Scheduler
from radix_backend.protocol import TokenLogprobs
from radix_backend.sampling_params import SamplingParams
from radix_backend.worker.interface import NewRequest, StepPlan, StepResult, Worker

VOCAB = 50
UNWRITTEN = -1


def extend_hash(prefix: int, token: int) -> int:
    return hash((prefix, token)) & 0x7FFFFFFFFFFFFFFF


def next_token(prefix: int) -> int:
    return prefix % VOCAB


def continuation(tokens: list[int], count: int) -> list[int]:
    """What the "model" generates after ``tokens``: the oracle."""
    prefix, out = 0, []
    for token in tokens:
        prefix = extend_hash(prefix, token)
    for _ in range(count):
        out.append(next_token(prefix))
        prefix = extend_hash(prefix, out[-1])
    return out


class SimWorker:
    def __init__(self, num_pages: int, page_size: int, max_bs: int, max_tokens: int = 4096, pp_size: int = 1) -> None:
        self.num_pages = num_pages
        self.pp_size = pp_size
        self.page_size = page_size
        self.kv = np.full((num_pages, page_size), UNWRITTEN, np.int64)
        self.table = np.full((max_bs, max_tokens // page_size + 1), -1, np.int64)
        self.tokens = np.full((max_bs, max_tokens), -1, np.int64)
        self.computed = np.zeros(max_bs, np.int64)
        self.described: dict[int, NewRequest] = {}
        self.num_computed_tokens = 0
        self.entered = np.zeros(max_bs, np.int64)  # step
        self.under_way: deque[tuple[int, int, int, int]] = deque()  # step, slot, position, token
        self.queue: deque[StepPlan] = deque()

    def launch(self, plan: StepPlan) -> None:
        self.queue.append(plan)

    def settle(self) -> StepResult:
        return self._execute(self.queue.popleft())

    def close(self) -> None:
        pass

    def _at(self, slot: int, position: int) -> tuple[int, int]:
        page = self.table[slot, position // self.page_size]
        assert page >= 0, f"slot {slot} has no page for position {position}"
        return int(page), position % self.page_size

    def _execute(self, plan: StepPlan) -> StepResult:
        while self.under_way and self.under_way[0][0] <= plan.step - self.pp_size:
            step, slot, position, token = self.under_way.popleft()
            if self.entered[slot] <= step:
                self.tokens[slot, position] = token
        for new in plan.new:
            self.entered[new.slot] = plan.step
            self.tokens[new.slot] = -1
            self.tokens[new.slot, : len(new.token_ids)] = new.token_ids
            self.computed[new.slot] = new.num_computed
            self.described[new.slot] = new
            self.table[new.slot] = -1
        self.table[plan.page_slots, plan.page_index] = plan.page_ids
        assert len(set(plan.slots.tolist())) == len(plan.slots)
        assert (plan.num_tokens[: plan.num_decode] == 1).all()
        assert plan.sample[: plan.num_decode].all()
        assert not {new.slot for new in plan.new} & set(plan.slots[: plan.num_decode].tolist())
        rows = list(zip(plan.slots.tolist(), plan.num_tokens.tolist(), plan.sample.tolist(), strict=True))
        written: dict[tuple[int, int], int] = {}
        for row, (slot, count, _) in enumerate(rows):  # every row writes the KV of its tokens …
            prefix = 0
            for position in range(self.computed[slot] + count):
                token = int(self.tokens[slot, position])
                assert token >= 0
                prefix = extend_hash(prefix, token)
                if position >= self.computed[slot]:
                    at = self._at(slot, position)
                    assert at not in written, f"two rows write {at} in one step"
                    written[at] = row
                    self.kv[at] = prefix
        sampled, scored = [], []
        for slot, count, _ in rows:
            if scores := self._score(self.described[slot], int(self.computed[slot]), count):
                scored.append(scores)
        # … before any reads that of its whole prefix; a step may be cut, so what it reads lies in no row after it.
        for row, (slot, count, samples) in enumerate(rows):
            self.computed[slot] += count
            self.num_computed_tokens += count
            prefix = 0
            for position in range(self.computed[slot]):
                prefix = extend_hash(prefix, int(self.tokens[slot, position]))
                at = self._at(slot, position)
                assert self.kv[at] == prefix, f"wrong KV at position {position} of slot {slot}"
                assert written.get(at, 0) <= row, f"row {row} reads what row {written[at]} writes"
            if samples:
                token = next_token(prefix)
                self.under_way.append((plan.step, slot, int(self.computed[slot]), token))
                sampled.append(token)
        return StepResult(plan.step, np.array(sampled, np.int32), prompt_logprobs=scored)

    @staticmethod
    def _score(new: NewRequest, computed: int, count: int) -> list[TokenLogprobs]:
        """The "rank" of a prompt token is its position."""
        if new.params.prompt_logprobs is None:
            return []
        positions = range(max(computed + 1, new.num_scored, 1), min(computed + count + 1, new.prompt_len))
        return [TokenLogprobs(position, b"", b"") for position in positions]


class SimEngine:
    """A scheduler and a worker (a `SimWorker` by default), with the outputs of every request collected by id."""

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 4,
        max_bs: int = 8,
        budget: int = 32,
        queue: int = 1000,
        worker: Worker | None = None,
        pp_size: int = 1,
        ahead: int = 1,
    ) -> None:
        self.worker = worker or SimWorker(num_pages, page_size, max_bs, pp_size=pp_size)
        self.now = 0.0
        self.scheduler = Scheduler(
            KVCache(num_pages, page_size),
            max_bs=max_bs,
            max_batched_tokens=budget,
            max_queue_size=queue,
            pp_size=pp_size,
            ahead=ahead,
            clock=lambda: self.now,
        )
        self.outputs: dict[int, list[int]] = {}
        self.scored: dict[int, list[int]] = {}  # positions of prompt tokens
        self.logprobs: dict[int, list[TokenLogprobs]] = {}  # of outputs
        self.finish: dict[int, int] = {}
        self.receipts: dict[int, object] = {}
        self._next_id = 0

    @property
    def cache(self) -> KVCache:
        return self.scheduler.cache

    def add(
        self,
        prompt: list[int],
        max_tokens: int = 4,
        priority: int = 0,
        stop: tuple[int, ...] = (),
        output_ids: tuple[int, ...] = (),
        namespace: str = "",
        **sampling: Any,
    ) -> int:
        self._next_id += 1
        self.now += 0.001
        request = Request(
            id=self._next_id,
            prompt=np.array(prompt, np.int32),
            params=SamplingParams(max_tokens=max_tokens, **sampling),
            stop_token_ids=frozenset(stop),
            max_tokens=max_tokens,
            priority=priority,
            namespace=namespace,
            output_ids=list(output_ids),
        )
        self.outputs[request.id] = []
        self.scheduler.add(request)
        self.take()
        return request.id

    def launch(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.worker.launch(plan)
        self.take()
        return plan

    def settle(self) -> None:
        self.scheduler.settle(self.worker.settle())
        self.take()

    def take(self) -> None:
        prompt_scores, self.scheduler.prompt_scores = self.scheduler.prompt_scores, []
        for scores in prompt_scores:
            assert scores.id not in self.finish, "something came after the end"
            assert not self.outputs[scores.id], "the prompt was scored after tokens were generated"
            self.scored.setdefault(scores.id, []).extend(token.rank for token in scores.tokens)
        outputs, self.scheduler.outputs = self.scheduler.outputs, []
        for output in outputs:
            assert output.id not in self.finish, "something came after the end"
            if output.token is not None:
                self.outputs[output.id].append(output.token)
            if output.logprobs is not None:
                self.logprobs.setdefault(output.id, []).append(output.logprobs)
            if output.finish:
                self.finish[output.id] = output.finish
                self.receipts[output.id] = output.receipt

    def run(self, depth: int = 2, max_steps: int = 10_000) -> None:
        """Until nothing is left to do, with up to ``depth`` steps in flight, auditing after every step."""
        for _ in range(max_steps):
            plan = self.launch()
            in_flight = len(self.scheduler._launched)
            if in_flight == depth or (plan is None and in_flight):
                self.settle()
            elif plan is None:
                assert not self.scheduler.requests, "requests are left, but nothing can be scheduled"
                return
            assert self.cache.audit() == []
        raise AssertionError("it does not end")
