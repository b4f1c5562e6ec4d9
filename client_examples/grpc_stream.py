"""Stream a completion over gRPC, token by token.

    pip install 'tritonclient[grpc]'
    python client_examples/grpc_stream.py "The three primary colours are"

Sampling parameters travel as one JSON object; one stream serves one request, so that an error tells whose it is.
"""

import argparse
import json
import queue
import sys

import numpy as np
import tritonclient.grpc as grpcclient


def stream(url, prompt, sampling_parameters):
    """Yield pieces of text. Raises InferenceServerException with the server's reason."""
    inputs = [
        bytes_tensor("text_input", prompt),
        bytes_tensor("sampling_parameters", json.dumps(sampling_parameters)),
        bool_tensor("stream", True),
    ]
    responses = queue.Queue()
    with grpcclient.InferenceServerClient(url) as client:
        client.start_stream(callback=lambda result, error: responses.put((result, error)))
        client.async_stream_infer("radix", inputs)
        final = False
        while not final:
            result, error = responses.get()
            if error is not None:
                raise error
            yield result.as_numpy("text_output")[0].decode()
            final = result.get_response().parameters["triton_final_response"].bool_param


def bytes_tensor(name, text):
    tensor = grpcclient.InferInput(name, [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=object))
    return tensor


def bool_tensor(name, value):
    tensor = grpcclient.InferInput(name, [1], "BOOL")
    tensor.set_data_from_numpy(np.array([value]))
    return tensor


def main():
    parser = argparse.ArgumentParser(description="Stream a completion from a Radix Backend server.")
    parser.add_argument("prompt")
    parser.add_argument("--url", default="127.0.0.1:8001", help="of the server's gRPC port (default: 127.0.0.1:8001)")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    arguments = parser.parse_args()
    sampling_parameters = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    try:
        for text in stream(arguments.url, arguments.prompt, sampling_parameters):
            print(text, end="", flush=True)
    except grpcclient.InferenceServerException as error:
        sys.exit(f"\n{error.message()}")
    print()


if __name__ == "__main__":
    main()
