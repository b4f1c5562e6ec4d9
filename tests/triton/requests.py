"""Requests of the tensor contract through tritonclient, over gRPC."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio

GREEDY = {"temperature": 0}


@dataclass(frozen=True)
class Response:
    """One response of a stream: outputs by name, as lists of str or numbers."""

    outputs: dict[str, list[Any]]
    final: bool
    request_id: str

    @property
    def text(self) -> str:
        (text,) = self.outputs.get("text_output", [""])
        return str(text)


def tensors(**inputs: Any) -> list[Any]:
    """str: BYTES, dict: BYTES holding JSON, bool: BOOL, list: INT32; an array: as it is."""
    made = []
    for name, value in inputs.items():
        if isinstance(value, dict):
            value = json.dumps(value)
        if isinstance(value, str):
            value = np.array([value.encode()], dtype=object)
        elif isinstance(value, bool):
            value = np.array([value])
        elif isinstance(value, list):
            value = np.array(value, dtype=np.int32)
        data_type = tritonclient.utils.np_to_triton_dtype(value.dtype)
        tensor = tritonclient.grpc.InferInput(name, list(value.shape), data_type)
        tensor.set_data_from_numpy(value)
        made.append(tensor)
    return made


def stream(
    port: int, *, parameters: dict[str, Any] | None = None, headers: dict[str, str] | None = None, **inputs: Any
) -> Iterator[Response]:
    """One request, alone on its stream. Raises InferenceServerException; leaving the iterator cancels the request."""
    with Stream(port, headers) as one:
        one.submit(parameters=parameters, **inputs)
        while True:
            response = one.receive()
            yield response
            if response.final:
                return


class Stream:
    """A gRPC stream for several requests. Leaving it cancels what runs."""

    def __init__(self, port: int, headers: dict[str, str] | None = None) -> None:
        self._responses: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{port}")
        self._running = 0
        self._client.start_stream(lambda result, error: self._responses.put((result, error)), headers=headers)

    def submit(self, *, request_id: str = "", parameters: dict[str, Any] | None = None, **inputs: Any) -> None:
        inputs.setdefault("stream", True)
        self._running += 1
        self._client.async_stream_infer("radix", tensors(**inputs), request_id=request_id, parameters=parameters)

    def receive(self, timeout: float = 60.0) -> Response:
        result, error = self._responses.get(timeout=timeout)
        if error is not None:
            self._running -= 1
            raise error
        response = _response(result)
        self._running -= response.final
        return response

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        # Cancelling a stream that ended with a gRPC status can crash Triton 2.51.
        self._client.stop_stream(cancel_requests=self._running > 0)
        self._client.close()


async def aio_stream(client: tritonclient.grpc.aio.InferenceServerClient, **inputs: Any) -> AsyncIterator[Response]:
    """One request on a stream of an asyncio client."""
    inputs.setdefault("stream", True)
    done = asyncio.Event()

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "radix", "inputs": tensors(**inputs)}
        await done.wait()

    try:
        async for result, error in client.stream_infer(requests()):
            if error is not None:
                raise error
            response = _response(result)
            yield response
            if response.final:
                return
    finally:
        done.set()


def _response(result: Any) -> Response:
    raw = result.get_response()
    outputs = {}
    for output in raw.outputs:
        values = result.as_numpy(output.name).tolist()
        outputs[output.name] = [value.decode() if isinstance(value, bytes) else value for value in values]
    return Response(outputs, raw.parameters["triton_final_response"].bool_param, raw.id)


def joined(responses: list[Response], output: str) -> list[Any]:
    """An output of all responses of one request, one after the other."""
    return [value for response in responses for value in response.outputs.get(output, [])]


def text_of(responses: list[Response]) -> str:
    return "".join(response.text for response in responses)
