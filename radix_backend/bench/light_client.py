"""A gRPC client that costs next to nothing: responses stay bytes. Runs in its own process, driven over stdin/stdout.

``python -m radix_backend.bench.light_client URL MODEL`` reads one JSON `Load` a line, answers each with a `Result`.
"""

from __future__ import annotations

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


class Result(msgspec.Struct):
    """Seconds; one entry of ``first`` a stream."""

    seconds: float
    responses: int
    first: list[float]
    errors: int
    cpu_seconds: float


def request_bytes(model: str, prompt: list[int], max_tokens: int) -> bytes:
    """A serialized ModelInferRequest that streams exactly ``max_tokens`` tokens, greedily."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, datatype, values in (
        ("input_ids", "INT32", np.array(prompt, np.int32)),
        ("stream", "BOOL", np.array([True])),
    ):
        tensor = request.inputs.add()
        tensor.name, tensor.datatype = name, datatype
        tensor.shape.append(len(values))
        request.raw_input_contents.append(values.tobytes())
    request.parameters["max_tokens"].int64_param = max_tokens
    request.parameters["temperature"].double_param = 0.0
    request.parameters["ignore_eos"].bool_param = True
    return bytes(request.SerializeToString())


def run(url: str, model: str, load: Load) -> Result:
    requests = [request_bytes(model, prompt, load.max_tokens) for prompt in load.prompts]
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
    url, model = sys.argv[1:]
    for line in sys.stdin.buffer:
        result = run(url, model, msgspec.json.decode(line, type=Load))
        sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
