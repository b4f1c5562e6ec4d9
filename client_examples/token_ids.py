"""Token ids in, token ids out: for clients that have a tokenizer of their own.

    pip install 'tritonclient[grpc]'
    python client_examples/token_ids.py [HOST:PORT]

`input_ids` replaces `text_input` and skips the server's tokenizer. Ids and text come together.
"""

import json
import queue
import sys

import numpy as np
import tritonclient.grpc as grpcclient

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"


def tensor(name, data_type, values):
    made = grpcclient.InferInput(name, list(values.shape), data_type)
    made.set_data_from_numpy(values)
    return made


sampling_parameters = json.dumps({"max_tokens": 8, "temperature": 0})
inputs = [
    # To the embedded model: "The capital of France is"
    tensor("input_ids", "INT32", np.array([504, 3575, 282, 4649, 314], dtype=np.int32)),
    tensor("sampling_parameters", "BYTES", np.array([sampling_parameters.encode()], dtype=object)),
    tensor("stream", "BOOL", np.array([True])),
    tensor("return_token_ids", "BOOL", np.array([True])),
]
responses = queue.Queue()
with grpcclient.InferenceServerClient(address) as client:
    client.start_stream(callback=lambda result, error: responses.put((result, error)))
    client.async_stream_infer("radix", inputs)
    final = False
    while not final:
        result, error = responses.get()
        if error is not None:
            sys.exit(error.message())
        print(*result.as_numpy("token_ids"), repr(result.as_numpy("text_output")[0].decode()))
        final = result.get_response().parameters["triton_final_response"].bool_param
