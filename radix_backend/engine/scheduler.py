"""Decides what each step computes. Plain Python over numpy: no torch, no I/O, no clock but the one it is given.

A step's token budget goes to running requests first (decodes, then prefill chunks), what is left admits waiting ones.
`schedule` may be called while earlier steps are in flight: a token that is not known yet counts as a placeholder, and
what ended requests gave up is not free before those steps have settled (see `KVCache`).

With several pipeline stages that many steps run at once, each a **microbatch** of other requests: one that decodes in
step *n* decodes again in step *n + pp_size* at the earliest, when its token is back at the first stage. Chunks of a
prompt need no token and may follow each other. Step numbers skip what a pipeline with little work skips.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from radix_backend.engine.kv_cache import KVCache
from radix_backend.engine.leaders import Leaders
from radix_backend.engine.radix_tree import Node
from radix_backend.engine.request import Request, State
from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.protocol import ABORT, LENGTH, RUNNING, STOP, PromptScores, Receipt, TokenLogprobs
from radix_backend.worker.interface import NewRequest, StepPlan, StepResult

# Admission expects running requests to generate this share of the tokens they may still generate. It decays while
# there is room and jumps up when a request had to be retracted (as in SGLang's new_token_ratio).
INITIAL_OUTPUT_SHARE, MIN_OUTPUT_SHARE, OUTPUT_SHARE_DECAY = 0.7, 0.1, 0.001


@dataclass(frozen=True)
class Output:
    """What a request got: a token, its end, or both. A receipt comes with the end."""

    id: int
    token: int | None
    finish: int
    receipt: Receipt | None = None
    logprobs: TokenLogprobs | None = None  # of the token, where they are wanted


@dataclass
class _Launched:
    """A step in flight: the requests whose rows bring something, in row order."""

    step: int
    sampled: list[Request]
    scored: list[Request]  # whose prompt tokens get log probabilities


@dataclass
class Counters:
    """Totals since the engine started."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    retractions: int = 0
    resumed: int = 0


@dataclass
class _Rows:
    """A step being put together. Decodes may still be revoked by a retraction, prefills are committed at once."""

    step: int
    decodes: dict[Request, None] = field(default_factory=dict)
    prefills: dict[Request, int] = field(default_factory=dict)  # request → tokens
    scored: set[Request] = field(default_factory=set)
    new: list[NewRequest] = field(default_factory=list)
    page_slots: list[int] = field(default_factory=list)
    page_index: list[int] = field(default_factory=list)
    page_ids: list[int] = field(default_factory=list)

    def sync_pages(self, request: Request) -> None:
        """Page table entries of ``request`` that the workers do not know yet."""
        lease = request.lease
        assert lease is not None
        changed = [*lease.remapped, *range(request.num_synced, len(lease.table))]
        self.page_slots += [request.slot] * len(changed)
        self.page_index += changed
        self.page_ids += [lease.table[index] for index in changed]
        lease.remapped = []
        request.num_synced = len(lease.table)


class Scheduler:
    def __init__(
        self,
        cache: KVCache,
        *,
        max_bs: int,
        max_batched_tokens: int,
        max_queue_size: int,
        pp_size: int = 1,
        ahead: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``ahead``: how many tokens of a request may be unknown when its next step is planned before its turn."""
        if max_batched_tokens < max_bs:
            raise InvalidArgument(
                f"setting 'max_batched_tokens' is {max_batched_tokens}; accepted: at least max_bs ({max_bs})"
            )
        self.cache = cache
        self.counters = Counters()
        self.requests: dict[int, Request] = {}  # all that have not ended
        self.running: list[Request] = []
        self.num_waiting = 0
        # What happened since the owner last took it; the first comes before the second.
        self.prompt_scores: list[PromptScores] = []
        self.outputs: list[Output] = []
        self._max_batched_tokens = max_batched_tokens
        self._max_queue_size = max_queue_size
        self._pp_size, self._ahead = pp_size, ahead
        self._clock = clock
        self._slots = list(range(max_bs - 1, -1, -1))
        self._queue: list[tuple[float, int, Request]] = []  # heap by key; entries not WAITING any more are skipped
        self._pushes = 0
        self._step = 0
        self._launched: deque[_Launched] = deque()
        self._leaders = Leaders(cache.page_size)
        self._output_share = INITIAL_OUTPUT_SHARE

    # ── requests come and go ────────────────────────────────────────────────────────────────────────────────

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidArgument when it can never run, Unavailable when the queue is full."""
        usable = self.cache.pool.num_pages - self.cache.num_quarantined
        if self._pages(request.num_known + 1) > usable:
            raise InvalidArgument(
                f"the prompt has {request.num_known} tokens; "
                f"accepted: at most {usable * self.cache.page_size - 1}, what the KV cache holds"
            )
        if self.num_waiting >= self._max_queue_size:
            raise Unavailable(f"the queue is full: {self.num_waiting} requests wait (max_queue_size)")
        request.arrival = self._clock()
        request.resumed = bool(request.output_ids)
        self.requests[request.id] = request
        self._enqueue(request)
        if request.remaining_tokens <= 0:
            self._end(request, LENGTH)

    def finish(self, request_id: int, reason: int) -> None:
        """End a request now, whatever it does. STOP is answered with a receipt, ABORT is silent."""
        request = self.requests.get(request_id)
        if request is None:
            return
        if reason == ABORT:
            self._drop(request)
        else:
            self._end(request, reason)

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def has_steps_in_flight(self) -> bool:
        return bool(self._launched)

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can be computed now."""
        order = sorted(self.running, key=lambda request: request.effective_key)
        decoding = [request for request in order if request.decodes]
        rows = _Rows(self._next_step(decoding))
        # An equal share for each microbatch: stages are idle where one has all the requests.
        share = -(-len(decoding) // self._pp_size)
        for request in decoding:
            # The one before it may have had it retracted.
            due = request.state is State.RUNNING and self._due(request) <= rows.step
            if due and len(rows.decodes) < share and self._make_room(request, 1, rows):
                rows.decodes[request] = None
        budget = self._max_batched_tokens - len(rows.decodes)
        for request in order:
            if budget > 0 and request.state is State.RUNNING and request.is_prefilling:
                count = min(budget, request.num_prefill - request.num_computed)
                if self._make_room(request, count, rows):
                    self._prefill(request, count, rows)
                    budget -= count
        self._admit(budget, rows)
        if not rows.decodes and not rows.prefills:
            return None
        self._output_share = max(MIN_OUTPUT_SHARE, self._output_share - OUTPUT_SHARE_DECAY)
        return self._launch(rows)

    def settle(self, result: StepResult) -> None:
        """Take the tokens of the oldest step in flight."""
        launched = self._launched.popleft()
        assert launched.step == result.step
        assert len(launched.sampled) == len(result.tokens)
        self.cache.settle(launched.step)
        for request, scores in zip(launched.scored, result.prompt_logprobs, strict=True):
            if request.state is not State.FINISHED:
                self.prompt_scores.append(PromptScores(request.id, scores))
        now = self._clock()
        every = result.logprobs or [None] * len(result.tokens)
        for request, token, logprobs in zip(launched.sampled, result.tokens.tolist(), every, strict=True):
            request.num_in_flight -= 1
            if request.state is State.FINISHED:
                continue  # sampled past its end: discarded
            request.output_ids.append(token)
            self.counters.generation_tokens += 1
            if request.first_token is None:
                request.first_token = now
            num_outputs = len(request.output_ids)
            if token in request.stop_token_ids and num_outputs > request.params.min_tokens:
                self._end(request, STOP, token, logprobs)
            elif num_outputs >= request.max_tokens:
                self._end(request, LENGTH, token, logprobs)
            else:
                self.outputs.append(Output(request.id, token, RUNNING, None, logprobs))

    def _next_step(self, decoding: list[Request]) -> int:
        """Its number. Where only tokens can be computed, and none is due yet, that of the first that will be: it can be
        launched now, and the stages begin as soon as they can."""
        step = max(self._step + 1, self.cache.settled_step + self._pp_size)
        if self._pp_size == 1 or self.num_waiting or any(request.is_prefilling for request in self.running):
            return step
        dues = (self._due(request) for request in decoding if request.num_in_flight <= self._ahead)
        return max(step, min(dues, default=step))

    def _due(self, request: Request) -> int:
        """The first step before which its last token will be at the first stage."""
        assert request.lease is not None
        return request.lease.last_step + self._pp_size

    # ── parts of a step ─────────────────────────────────────────────────────────────────────────────────────

    def _make_room(self, request: Request, count: int, rows: _Rows) -> bool:
        """Pages for the next ``count`` tokens, at the cost of the least urgent request. False: not in this step."""
        assert request.lease is not None
        while not self.cache.grow(request.lease, request.num_computed + count):
            if self.cache.is_settling:
                return False  # pages are on their way: stall this row
            victims = [other for other in self.running if other not in rows.prefills]
            victim = max(victims, key=lambda other: other.effective_key)
            if len(self.running) > 1:
                self._retract(victim, rows)
            elif not request.num_in_flight:
                self._end(request, LENGTH)  # it fills the whole cache: there is nothing to wait for
            if victim is request:
                return False
        return True

    def _prefill(self, request: Request, count: int, rows: _Rows) -> None:
        """Commit a chunk. Its whole pages are published at once, for readers in this step and later ones."""
        assert request.lease is not None
        rows.prefills[request] = count
        rows.sync_pages(request)
        self._advance(request, count, rows.step)
        if request.params.prompt_logprobs is not None:
            self._score(request, rows)
        self._leaders.remove(request)
        self.cache.publish(request.lease, request.known_tokens[: request.num_computed], rows.step)
        self._leaders.add(request)
        self._wake(request, up_to=request.lease.num_published)

    @staticmethod
    def _score(request: Request, rows: _Rows) -> None:
        """The chunk scores the prompt tokens that follow its own."""
        scored = min(request.num_computed + 1, len(request.prompt))
        if scored > max(request.num_scored, 1):
            request.num_scored = scored
            rows.scored.add(request)

    def _admit(self, budget: int, rows: _Rows) -> None:
        later = []
        reserved = sum(self._expected_pages(request) for request in self.running) if self._queue else 0
        while budget > 0 and self._slots and self._queue:
            request = self._queue[0][2]
            if request.state is not State.WAITING:
                heapq.heappop(self._queue)
                continue
            if request.num_in_flight:  # retracted, and a token of it is still to come
                later.append(heapq.heappop(self._queue))
                continue
            tokens = request.known_tokens
            matchable = request.matchable_tokens
            node, pages = self.cache.match(request.namespace, matchable)
            if len(matchable) == len(tokens) and self._leaders.follow(request, node, tokens, len(pages)):
                heapq.heappop(self._queue)
                continue
            needed = self._pages(len(tokens) + 1) - len(pages)
            if self.running:
                needed += reserved + self._expected_pages(request)
            if needed > self.cache.num_available - self.cache.tree.num_unlocked(node):
                if self.running or self.cache.is_settling:
                    break
                self._end(request, LENGTH)  # it has outgrown the whole cache
                continue
            heapq.heappop(self._queue)
            self._start(request, node, pages, rows)
            count = min(budget, request.num_prefill - request.num_computed)
            if not self._make_room(request, count, rows):
                raise AssertionError("an admitted request found no pages")
            self._prefill(request, count, rows)
            reserved += self._expected_pages(request)
            budget -= count
        for entry in later:
            heapq.heappush(self._queue, entry)

    def _start(self, request: Request, node: Node, pages: list[int], rows: _Rows) -> None:
        request.state = State.RUNNING
        request.slot = self._slots.pop()
        request.lease = self.cache.open(node, pages)
        request.num_prefill = request.num_known
        request.num_computed = len(pages) * self.cache.page_size
        request.num_synced = 0
        if request.cached_tokens is None:
            request.started = self._clock()
            request.cached_tokens = min(request.num_computed, len(request.prompt))
            self.counters.prompt_tokens += len(request.prompt)
            self.counters.cached_tokens += request.cached_tokens
            self.counters.resumed += request.resumed
        self.running.append(request)
        self.num_waiting -= 1
        rows.new.append(
            NewRequest(
                slot=request.slot,
                token_ids=request.known_tokens,
                prompt_len=len(request.prompt),
                num_computed=request.num_computed,
                params=request.params,
                stop_token_ids=tuple(request.stop_token_ids),
                bad_words=request.bad_words,
                num_scored=request.num_scored,
            )
        )

    def _launch(self, rows: _Rows) -> StepPlan:
        self._step = rows.step
        for request in rows.decodes:
            rows.sync_pages(request)
            self._advance(request, 1, rows.step)
        # Chunks in the order of their commitment: what one reads of this step was published by those before it.
        counts = {**dict.fromkeys(rows.decodes, 1), **rows.prefills}
        sample = [request.num_computed == request.num_tokens for request in counts]
        for request, sampled in zip(counts, sample, strict=True):
            request.num_in_flight += sampled
        sampling = [request for request, sampled in zip(counts, sample, strict=True) if sampled]
        self._launched.append(_Launched(rows.step, sampling, [request for request in counts if request in rows.scored]))
        return StepPlan(
            step=rows.step,
            new=rows.new,
            page_slots=np.array(rows.page_slots, np.int32),
            page_index=np.array(rows.page_index, np.int32),
            page_ids=np.array(rows.page_ids, np.int32),
            slots=np.array([request.slot for request in counts], np.int32),
            num_tokens=np.array(list(counts.values()), np.int32),
            sample=np.array(sample, np.bool_),
            num_decode=len(rows.decodes),
        )

    @staticmethod
    def _advance(request: Request, count: int, step: int) -> None:
        assert request.lease is not None
        request.num_computed += count
        request.lease.last_step = step

    # ── ends ────────────────────────────────────────────────────────────────────────────────────────────────

    def _retract(self, request: Request, rows: _Rows) -> None:
        """Take a running request's pages away; it waits to be admitted again with what it has generated."""
        rows.decodes.pop(request, None)
        generated = sum(len(other.output_ids) for other in self.running)
        self._output_share = min(1.0, generated / sum(other.max_tokens for other in self.running) + 0.2)
        self.counters.retractions += 1
        request.retractions += 1
        self._release(request)
        self._enqueue(request)

    def _end(
        self, request: Request, reason: int, token: int | None = None, logprobs: TokenLogprobs | None = None
    ) -> None:
        self._drop(request)
        self.outputs.append(Output(request.id, token, reason, request.receipt(self._clock()), logprobs))

    def _drop(self, request: Request) -> None:
        if request.state is State.RUNNING:
            self._release(request)
        else:
            self.num_waiting -= 1
        self._leaders.unfollow(request)
        request.state = State.FINISHED
        del self.requests[request.id]

    def _release(self, request: Request) -> None:
        """Give up lease and slot. What launched steps have written of its known tokens stays in the tree."""
        assert request.lease is not None
        self._leaders.remove(request)
        written = min(request.num_computed, request.num_known)
        self.cache.close(request.lease, request.known_tokens[:written])
        request.lease = None
        self._slots.append(request.slot)
        self.running.remove(request)
        self._wake(request)

    def _wake(self, leader: Request, up_to: int | None = None) -> None:
        for follower in self._leaders.release(leader, up_to):
            self.num_waiting -= 1
            self._enqueue(follower)

    def _enqueue(self, request: Request) -> None:
        request.state = State.WAITING
        self.num_waiting += 1
        self._pushes += 1
        heapq.heappush(self._queue, (request.queue_key, self._pushes, request))

    # ── sizes ───────────────────────────────────────────────────────────────────────────────────────────────

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.cache.page_size)

    def _expected_pages(self, request: Request) -> int:
        """Pages that a running request is expected to take beyond those it has."""
        outputs = int(request.remaining_tokens * self._output_share)
        held = len(request.lease.table) if request.lease is not None else self._pages(request.num_known + 1)
        return max(0, self._pages(max(request.num_prefill, request.num_tokens) + outputs) - held)
