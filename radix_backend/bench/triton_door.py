"""Streams through Triton's gRPC. Messages are taken apart here, not by tritonclient: a generator must be cheap."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc.aio
import msgspec
import numpy as np
from tritonclient.grpc import service_pb2

from radix_backend.load import Trace

_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
# One connection a client, as real clients have.
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
_CONNECT_SECONDS = 30.0


class _Receipt(msgspec.Struct):
    cached_tokens: int


class TritonDoor:
    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._model = model

    async def connect(self) -> _Connection:
        channel = grpc.aio.insecure_channel(self._url, _OPTIONS)
        await asyncio.wait_for(channel.channel_ready(), _CONNECT_SECONDS)
        return _Connection(channel, self._model)

    async def __aenter__(self) -> TritonDoor:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


class _Connection:
    def __init__(self, channel: grpc.aio.Channel, model: str) -> None:
        self._channel = channel
        self._model = model

    async def ask(
        self, prompt: list[int], num_outputs: int, temperature: float, want_tokens: bool, trace: Trace
    ) -> list[int]:
        call = self._channel.stream_stream(_METHOD)()
        await call.write(request_bytes(self._model, prompt, num_outputs, temperature, want_tokens))
        await call.done_writing()  # the server closes the stream after the last response
        tokens: list[int] = []
        async for data in call:
            now = time.monotonic()
            message = service_pb2.ModelStreamInferResponse.FromString(data)
            if message.error_message:
                raise RuntimeError(message.error_message)
            response = message.infer_response
            for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
                if output.name == "num_output_tokens":
                    if count := int.from_bytes(content[:4], "little"):
                        trace.times.append(now)
                        trace.num_tokens += count
                elif output.name == "token_ids":
                    tokens += np.frombuffer(content, "<i4").tolist()
                elif output.name == "cache_receipt":
                    trace.num_cached_tokens = msgspec.json.decode(content[4:], type=_Receipt).cached_tokens
        return tokens

    async def close(self) -> None:
        await self._channel.close()


def request_bytes(model: str, prompt: list[int], num_outputs: int, temperature: float, want_tokens: bool) -> bytes:
    """A serialized ModelInferRequest."""
    request = service_pb2.ModelInferRequest(model_name=model)
    inputs: list[tuple[str, str, Any]] = [
        ("input_ids", "INT32", np.array(prompt, np.int32)),
        *((name, "BOOL", np.array([True])) for name in ("stream", "return_num_output_tokens", "return_cache_receipt")),
        ("return_token_ids", "BOOL", np.array([want_tokens])),
    ]
    for name, datatype, values in inputs:
        tensor = request.inputs.add()
        tensor.name, tensor.datatype = name, datatype
        tensor.shape.append(len(values))
        request.raw_input_contents.append(values.tobytes())
    request.parameters["max_tokens"].int64_param = num_outputs
    request.parameters["temperature"].double_param = temperature
    request.parameters["ignore_eos"].bool_param = True
    return bytes(request.SerializeToString())
