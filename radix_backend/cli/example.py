"""One question through the served model, with an ordinary Triton client."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tritonclient.grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from radix_backend.cli.repository import MODEL
from radix_backend.client import EngineClient
from radix_backend.errors import InvalidArgument, Unavailable

QUESTION = "What is the capital of France?"
# Without it the embedded model's first token is a tie in bf16: "The", or "L" and French gibberish.
_INSTRUCTION = "Answer in one sentence."
_MAX_TOKENS = 64
_PATIENCE = 10.0  # seconds for the stub to learn, after us, that the engine is ready


def answer(address: str, client: EngineClient) -> Iterator[str]:
    """The answer to QUESTION, token by token. Raises Unavailable with Triton's error."""
    try:
        prompt = client.render_chat(
            [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": QUESTION}]
        )
    except InvalidArgument:  # not a chat model
        prompt = QUESTION
    input_ids = client.tokenize(prompt, add_special_tokens=prompt == QUESTION)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            yield from _stream(address, input_ids)
            return
        except InferenceServerException as error:
            if "the engine is" not in error.message() or time.monotonic() > deadline:
                raise Unavailable(f"the example failed: {error.message()}") from None
            time.sleep(0.1)


def _stream(address: str, input_ids: list[int]) -> Iterator[str]:
    responses: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    inputs = [
        _tensor("input_ids", np.array(input_ids, dtype=np.int32)),
        _tensor("stream", np.array([True])),
        _tensor(
            "sampling_parameters",
            np.array([json.dumps({"temperature": 0, "max_tokens": _MAX_TOKENS}).encode()], dtype=object),
        ),
    ]
    with tritonclient.grpc.InferenceServerClient(address) as triton:
        triton.start_stream(lambda result, error: responses.put((result, error)))
        triton.async_stream_infer(MODEL, inputs)
        final = False
        while not final:
            result, error = responses.get()
            if error is not None:
                raise error
            yield result.as_numpy("text_output")[0].decode()
            final = result.get_response().parameters["triton_final_response"].bool_param


def _tensor(name: str, value: np.ndarray[Any, Any]) -> Any:
    tensor = tritonclient.grpc.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
    tensor.set_data_from_numpy(value)
    return tensor
