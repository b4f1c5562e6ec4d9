"""A request to a served model over a gRPC stream."""

from __future__ import annotations

import queue
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import tritonclient.grpc
from tritonclient.utils import np_to_triton_dtype


def stream(address: str, model: str, inputs: Mapping[str, Any]) -> Generator[tritonclient.grpc.InferResult, None, None]:
    """The responses, up to the final one. Closing the iterator cancels the request.

    ``inputs`` are tensors by name: arrays, or single texts and truth values. Raises InferenceServerException.
    """
    responses: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    with tritonclient.grpc.InferenceServerClient(address) as triton:
        triton.start_stream(lambda result, error: responses.put((result, error)))
        try:
            triton.async_stream_infer(model, [_tensor(name, value) for name, value in inputs.items()])
            final = False
            while not final:
                result, error = responses.get()
                if error is not None:
                    raise error
                yield result
                final = result.get_response().parameters["triton_final_response"].bool_param
        finally:
            triton.stop_stream(cancel_requests=True)


def text_of(response: tritonclient.grpc.InferResult, output: str = "text_output") -> str:
    return str(response.as_numpy(output)[0].decode())


def _tensor(name: str, value: Any) -> tritonclient.grpc.InferInput:
    if isinstance(value, str):
        value = np.array([value.encode()], dtype=object)
    array = np.atleast_1d(value)
    tensor = tritonclient.grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor
