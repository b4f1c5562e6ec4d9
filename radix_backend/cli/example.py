"""One question through the served model, with an ordinary Triton client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import numpy as np
from tritonclient.utils import InferenceServerException

from radix_backend.cli.repository import MODEL
from radix_backend.cli.triton_stream import stream, text_of
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
    inputs = {
        "input_ids": np.array(input_ids, dtype=np.int32),
        "stream": True,
        "sampling_parameters": json.dumps({"temperature": 0, "max_tokens": _MAX_TOKENS}),
    }
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            for response in stream(address, MODEL, inputs):
                yield text_of(response)
            return
        except InferenceServerException as error:
            if "the engine is" not in error.message() or time.monotonic() > deadline:
                raise Unavailable(f"the example failed: {error.message()}") from None
            time.sleep(0.1)
