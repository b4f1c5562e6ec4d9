"""From what the engine generated to the tensors of a Triton response."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from radix_backend.protocol import FINISH_REASONS, RUNNING, Receipt
from radix_backend.triton.request import Request

Array = npt.NDArray[Any]


@dataclass
class Part:
    """What one response carries: the tokens of one step, or of several."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish: int = RUNNING
    receipt: Receipt | None = None  # of the last part

    def add(self, token_ids: npt.NDArray[np.int32], text: str, finish: int, receipt: Receipt | None) -> None:
        if text:
            self.text.append(text)
        self.token_ids += token_ids.tolist()
        self.finish, self.receipt = finish, receipt


def encode(request: Request, part: Part, namespace: str) -> list[tuple[str, Array]]:
    """Name and value of every output that ``request`` wants; a part of a stream, or the whole answer."""
    returns = request.returns
    tensors = [("text_output", _bytes(request.echo + "".join(part.text)))]
    if not returns:
        return tensors
    if "return_finish_reason" in returns:
        reason = FINISH_REASONS[part.finish] if part.finish else "None"
        tensors.append(("finish_reason", _bytes(reason)))
    if "return_num_input_tokens" in returns:
        if request.input_ids is not None:
            tensors.append(("num_input_tokens", np.array([request.input_ids.size], dtype=np.uint32)))
        elif part.receipt is not None:
            tensors.append(("num_input_tokens", np.array([part.receipt.num_input_tokens], dtype=np.uint32)))
    if "return_num_output_tokens" in returns:
        tensors.append(("num_output_tokens", np.array([len(part.token_ids)], dtype=np.uint32)))
    if "return_token_ids" in returns:
        tensors.append(("token_ids", np.array(part.token_ids, dtype=np.int32)))
    if "return_cache_receipt" in returns and part.receipt is not None:
        tensors.append(("cache_receipt", _bytes(_receipt(part.receipt, namespace))))
    return tensors


def _bytes(text: str | bytes) -> Array:
    return np.array([text.encode() if isinstance(text, str) else text], dtype=object)


def _receipt(receipt: Receipt, namespace: str) -> bytes:
    return msgspec.json.encode(
        {
            "cached_tokens": receipt.cached_tokens,
            "namespace": namespace,
            "queue_ms": round(receipt.queue_ms, 3),
            "prefill_ms": round(receipt.prefill_ms, 3),
            "decode_ms": round(receipt.decode_ms, 3),
            "retractions": receipt.retractions,
            "resumed": receipt.resumed,
        }
    )
