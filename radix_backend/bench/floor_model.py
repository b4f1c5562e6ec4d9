"""A Triton model with no engine: it streams as many responses at the same pace. What it costs, Triton costs.

Copied into a model repository by `radix_backend.bench.floor`; request parameters ``max_tokens`` (responses a stream),
``streams`` (that start together) and ``pace`` (seconds a step).
"""

import json
import threading
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.waiting: list[Any] = []

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            load = json.loads(request.parameters())
            self.waiting.append(request.get_response_sender())
            if len(self.waiting) == int(load["streams"]):
                streams, self.waiting = self.waiting, []
                threading.Thread(target=self.stream, args=(streams, load["max_tokens"], load["pace"])).start()

    def stream(self, senders: list[Any], count: int, pace: float) -> None:
        for step in range(1, count + 1):
            time.sleep(pace)
            for sender in senders:
                text = pb_utils.Tensor("text_output", np.array([b" token"], dtype=object))
                flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if step == count else 0
                sender.send(pb_utils.InferenceResponse([text]), flags=flags)
