"""From what the engine generated to the tensors of a Triton response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from radix_backend.protocol import FINISH_REASONS, Logprob, Receipt
from radix_backend.sidecar.sink import Choice, Delta, by_token_id
from radix_backend.triton.request import Request

Array = npt.NDArray[Any]


class Answer:
    """All completions of a request."""

    def __init__(self, n: int = 1) -> None:
        self.choices = [Choice() for _ in range(n)]
        self.prompt_logprobs: list[list[Logprob]] = []
        self.num_input_tokens = 0
        self._prompt_told = False  # the log probabilities of its tokens were returned

    def add(self, delta: Delta) -> None:
        if delta.num_input_tokens:
            self.num_input_tokens = delta.num_input_tokens
        elif delta.prompt_logprobs:
            self.prompt_logprobs += delta.prompt_logprobs
        else:
            self.choices[delta.index].add(delta)

    @property
    def has_text(self) -> bool:
        return any(choice.text for choice in self.choices)

    @property
    def finished(self) -> bool:
        return all(choice.finish for choice in self.choices)

    def encode(self, request: Request, namespace: str) -> list[tuple[str, Array]]:
        """Name and value of every output that ``request`` wants: a part of a stream, or the whole answer.

        What it returns is not returned again.
        """
        tensors = _encode(request, self, namespace)
        if self._prompt_is_scored(request):
            tensors.append(("prompt_logprobs", _bytes([_logprobs([None, *self.prompt_logprobs])])))
            self._prompt_told = True
        for choice in self.choices:
            choice.clear()
        return tensors

    def _prompt_is_scored(self, request: Request) -> bool:
        """Completely, and not told yet: other completions may have text before the first one's prompt is scored."""
        wanted = request.params.prompt_logprobs is not None and not self._prompt_told
        return wanted and len(self.prompt_logprobs) == self.num_input_tokens - 1


def size(tensors: Sequence[tuple[str, Array]]) -> int:
    """Bytes of content."""
    return sum(sum(map(len, value)) if value.dtype == object else value.nbytes for _, value in tensors)


def _encode(request: Request, answer: Answer, namespace: str) -> list[tuple[str, Array]]:
    returns, choices = request.returns, answer.choices
    tensors = [("text_output", _bytes([request.echo + "".join(choice.text) for choice in choices]))]
    if not returns:
        return tensors
    receipts = [choice.receipt for choice in choices if choice.receipt is not None]
    if "return_finish_reason" in returns:
        tensors.append(("finish_reason", _bytes([FINISH_REASONS[choice.finish] or "None" for choice in choices])))
    if "return_logprobs" in returns:
        shown = [_logprobs(choice.logprobs) if request.shows_logprobs else b"null" for choice in choices]
        tensors.append(("logprobs", _bytes(shown)))
    if "return_cumulative_logprob" in returns:
        sums = [choice.cumulative_logprob for choice in choices]
        tensors.append(("cumulative_logprob", np.array(sums, dtype=np.float32)))
    if "return_num_input_tokens" in returns:
        tensors.append(("num_input_tokens", np.array([answer.num_input_tokens], dtype=np.uint32)))
    if "return_num_output_tokens" in returns:
        counts = [len(choice.token_ids) for choice in choices]
        tensors.append(("num_output_tokens", np.array(counts, dtype=np.uint32)))
    if "return_token_ids" in returns:
        ids = [token for choice in choices for token in choice.token_ids]
        tensors.append(("token_ids", np.array(ids, dtype=np.int32)))
    if "return_cache_receipt" in returns and answer.finished and receipts:
        tensors.append(("cache_receipt", _bytes([_receipt(receipts, namespace)])))
    return tensors


def _bytes(texts: Sequence[str | bytes]) -> Array:
    return np.array([text.encode() if isinstance(text, str) else text for text in texts], dtype=object)


def _logprobs(tokens: Sequence[list[Logprob] | None]) -> bytes:
    """A JSON list with an object a token, as vllm_backend writes it."""
    return msgspec.json.encode([token and by_token_id(token) for token in tokens])


def _receipt(receipts: Sequence[Receipt], namespace: str) -> bytes:
    """Of the first completion, whose prompt the others found in the cache; the longest decode_ms, all retractions."""
    first = receipts[0]
    return msgspec.json.encode(
        {
            "cached_tokens": first.cached_tokens,
            "namespace": namespace,
            "queue_ms": round(first.queue_ms, 3),
            "prefill_ms": round(first.prefill_ms, 3),
            "decode_ms": round(max(receipt.decode_ms for receipt in receipts), 3),
            "retractions": sum(receipt.retractions for receipt in receipts),
            "resumed": any(receipt.resumed for receipt in receipts),
        }
    )
