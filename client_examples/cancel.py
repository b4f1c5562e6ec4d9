"""Cancel a stream, and see that the server stops computing it.

pip install 'tritonclient[grpc]'
python client_examples/cancel.py [HOST:PORT [METRICS_HOST:PORT]]
"""

import json
import queue
import re
import sys
import time
import urllib.request

import numpy as np
import tritonclient.grpc as grpcclient

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"
metrics = sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1:8002"


def tensor(name, data_type, values):
    made = grpcclient.InferInput(name, list(values.shape), data_type)
    made.set_data_from_numpy(values)
    return made


def metric(series):
    """The value of a series, about a second old."""
    with urllib.request.urlopen(f"http://{metrics}/metrics") as response:
        page = response.read().decode()
    return sum(float(value) for value in re.findall(rf"^radix:{series} (\S+)$", page, re.MULTILINE))


def cancelled():
    return metric(r'request_success_total\{.*finished_reason="abort".*\}')


cancelled_before = cancelled()
endless = json.dumps({"max_tokens": 8000, "ignore_eos": True})
inputs = [
    tensor("text_input", "BYTES", np.array([b"Count to a million: one, two,"], dtype=object)),
    tensor("sampling_parameters", "BYTES", np.array([endless.encode()], dtype=object)),
    tensor("stream", "BOOL", np.array([True])),
]
responses = queue.Queue()
with grpcclient.InferenceServerClient(address) as client:
    client.start_stream(callback=lambda result, error: responses.put(result))
    client.async_stream_infer("radix", inputs)
    for _ in range(5):
        responses.get()
    client.stop_stream(cancel_requests=True)
print("cancelled after 5 responses")

while cancelled() == cancelled_before or metric(r"num_requests_running\{.*\}") > 0:
    time.sleep(0.2)
print(f"requests cancelled: {cancelled() - cancelled_before:.0f}, running: 0")
