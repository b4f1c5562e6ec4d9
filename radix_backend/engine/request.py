"""A request inside the engine: always ``(prompt, output_ids)`` plus where it stands."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np

from radix_backend.engine.kv_cache import Lease
from radix_backend.engine.radix_tree import Tokens
from radix_backend.protocol import Receipt
from radix_backend.sampling_params import SamplingParams

AGING_SECONDS = 10.0  # a request waiting this long overtakes one of the next higher priority that comes now
PROMPT_TOKEN_SECONDS = 25e-6  # a token of a prompt counts, in the queue, as having come this much later


class State(enum.Enum):
    """
    WAITING ──► RUNNING ──► FINISHED        any state may go to FINISHED (abort)
      ▲  ▲         │
      │  └─────────┘ retracted
      ▼
    FOLLOWING   until the leader has published the shared prefix, or ends
    """

    WAITING = "waiting"
    FOLLOWING = "following"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    id: int
    prompt: Tokens
    params: SamplingParams
    stop_token_ids: frozenset[int]
    max_tokens: int  # outputs, at most; within the context
    priority: int = 0
    arrival: float = 0.0  # seconds, monotonic
    namespace: str = ""
    bad_words: tuple[tuple[int, ...], ...] = ()
    output_ids: list[int] = field(default_factory=list)  # known outputs, those generated before a restart included

    state: State = State.WAITING
    slot: int = -1
    lease: Lease | None = None
    num_prefill: int = 0  # tokens known when it was admitted: they are prefilled, outputs among them
    num_computed: int = 0  # tokens whose KV launched steps have written or will
    num_in_flight: int = 0  # sampled tokens that launched steps will bring
    num_scored: int = 0  # prompt tokens of whose log probabilities launched steps take care; the first has none
    num_synced: int = 0  # entries of the lease's page table that the workers know
    followers: list[tuple[int, Request]] = field(default_factory=list)  # (pages they wait for, follower)
    leader: Request | None = None

    # for the receipt
    resumed: bool = False
    cached_tokens: int | None = None  # set at the first admission
    started: float | None = None
    first_token: float | None = None
    retractions: int = 0

    @property
    def key(self) -> float:
        """Order of service: first come first served within a priority; waiting longer outweighs priority."""
        return self.arrival + self.priority * AGING_SECONDS

    @property
    def queue_key(self) -> float:
        """Order of admission: of those that come at the same moment short prompts first, so that fewer wait for long
        ones."""
        return self.key + len(self.prompt) * PROMPT_TOKEN_SECONDS

    @property
    def effective_key(self) -> float:
        """A leader inherits the urgency of those who wait for its prefix."""
        return min([self.key, *(follower.key for _, follower in self.followers)])

    @property
    def known_tokens(self) -> Tokens:
        return np.concatenate([self.prompt, np.asarray(self.output_ids, np.int32)]) if self.output_ids else self.prompt

    @property
    def matchable_tokens(self) -> Tokens:
        """Leading tokens whose KV may come from the cache: those to be scored have to be computed."""
        if self.params.prompt_logprobs is None or self.num_scored >= len(self.prompt):
            return self.known_tokens
        return self.prompt[: max(self.num_scored, 1)]

    @property
    def num_known(self) -> int:
        return len(self.prompt) + len(self.output_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens it will have when the steps in flight have completed."""
        return self.num_known + self.num_in_flight

    @property
    def remaining_tokens(self) -> int:
        """Outputs that no launched step samples yet."""
        return self.max_tokens - len(self.output_ids) - self.num_in_flight

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < self.num_prefill

    @property
    def decodes(self) -> bool:
        """Whether what it computes next, while it runs, is one token after the prompt."""
        return not self.is_prefilling and self.remaining_tokens > 0

    def receipt(self, now: float) -> Receipt:
        started = self.started if self.started is not None else now
        first_token = self.first_token if self.first_token is not None else now
        return Receipt(
            num_input_tokens=len(self.prompt),
            num_output_tokens=len(self.output_ids),
            cached_tokens=self.cached_tokens or 0,
            queue_ms=round((started - self.arrival) * 1e3, 3),
            prefill_ms=round((first_token - started) * 1e3, 3),
            decode_ms=round((now - first_token) * 1e3, 3),
            retractions=self.retractions,
            resumed=self.resumed,
        )
