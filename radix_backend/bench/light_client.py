"""A gRPC client that costs next to nothing: responses stay bytes. Runs in its own process, driven over stdin/stdout.

``python -m radix_backend.bench.light_client triton|openai URL MODEL`` (openai: over HTTP, see `light_http`) reads one
JSON `Load` a line, answers each with a `Result`.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import grpc
import msgspec
import numpy as np
from tritonclient.grpc import service_pb2


class Load(msgspec.Struct):
    """One stream a prompt, all at once."""

    prompts: list[list[int]]
    max_tokens: int
    parameters: dict[str, float] = {}  # further request parameters


class Result(msgspec.Struct):
    """Seconds; one entry of ``first`` a stream."""

    seconds: float
    responses: int
    first: list[float]
    errors: int
    cpu_seconds: float


class LightClient:
    """This module in a process of its own."""

    def __init__(self, url: str, model: str, kind: str = "triton") -> None:
        command = [sys.executable, "-m", "radix_backend.bench.light_client", kind, url, model]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, load: Load) -> Result:
        """Raises RuntimeError if a stream failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(load) + b"\n")
        self._process.stdin.flush()
        result = msgspec.json.decode(self._process.stdout.readline(), type=Result)
        if result.errors:
            raise RuntimeError(f"{result.errors} of {len(load.prompts)} streams failed")
        return result

    def __enter__(self) -> LightClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def request_bytes(model: str, prompt: list[int], load: Load) -> bytes:
    """A serialized ModelInferRequest that streams exactly ``load.max_tokens`` tokens, greedily."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, datatype, values in (
        ("input_ids", "INT32", np.array(prompt, np.int32)),
        ("stream", "BOOL", np.array([True])),
    ):
        tensor = request.inputs.add()
        tensor.name, tensor.datatype = name, datatype
        tensor.shape.append(len(values))
        request.raw_input_contents.append(values.tobytes())
    request.parameters["max_tokens"].int64_param = load.max_tokens
    request.parameters["temperature"].double_param = 0.0
    request.parameters["ignore_eos"].bool_param = True
    for name, value in load.parameters.items():
        request.parameters[name].double_param = value
    return bytes(request.SerializeToString())


def stream_all(url: str, model: str, load: Load) -> Result:
    requests = [request_bytes(model, prompt, load) for prompt in load.prompts]
    first = [0.0] * len(requests)
    responses = [0] * len(requests)
    errors = [0] * len(requests)
    start_line = threading.Barrier(len(requests) + 1)

    def stream(index: int) -> None:
        with grpc.insecure_channel(url, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            grpc.channel_ready_future(channel).result(30)
            call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
            start_line.wait()
            started = time.perf_counter()
            try:
                sent: Iterator[bytes] = iter([requests[index]])
                for _ in call(sent):  # the server closes the stream after the last response
                    if not responses[index]:
                        first[index] = time.perf_counter() - started
                    responses[index] += 1
            except grpc.RpcError:
                errors[index] = 1

    threads = [threading.Thread(target=stream, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    start_line.wait()
    started, cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    return Result(seconds, sum(responses), first, sum(errors), time.process_time() - cpu)


def main() -> None:
    kind, url, model = sys.argv[1:]
    stream = stream_all
    if kind == "openai":
        from radix_backend.bench.light_http import stream_all as stream
    for line in sys.stdin.buffer:
        result = stream(url, model, msgspec.json.decode(line, type=Load))
        sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
