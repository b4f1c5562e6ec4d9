"""Hold a conversation, with the model's own chat template.

    pip install 'tritonclient[grpc]' transformers
    python client_examples/chat.py --tokenizer Qwen/Qwen3-0.6B "Who are you?" "What did I just ask?"

The client renders the template, so its tokenizer must be that of the served model. The server gets `input_ids`: a
template writes the special tokens itself, and `text_input` would be given another one where a model begins with it.
Each turn sends the whole conversation; what was said before is found in the server's prefix cache.
"""

import argparse
import json
import queue

import numpy as np
import tritonclient.grpc as grpcclient
from transformers import AutoTokenizer


def stream(address, input_ids, sampling_parameters):
    """Yield pieces of text. Raises InferenceServerException with the server's reason."""
    inputs = [
        tensor("input_ids", "INT32", np.array(input_ids, dtype=np.int32)),
        tensor("sampling_parameters", "BYTES", np.array([json.dumps(sampling_parameters).encode()], dtype=object)),
        tensor("stream", "BOOL", np.array([True])),
    ]
    responses = queue.Queue()
    with grpcclient.InferenceServerClient(address) as client:
        client.start_stream(callback=lambda result, error: responses.put((result, error)))
        client.async_stream_infer("radix", inputs)
        final = False
        while not final:
            result, error = responses.get()
            if error is not None:
                raise error
            yield result.as_numpy("text_output")[0].decode()
            final = result.get_response().parameters["triton_final_response"].bool_param


def tensor(name, data_type, values):
    made = grpcclient.InferInput(name, list(values.shape), data_type)
    made.set_data_from_numpy(values)
    return made


parser = argparse.ArgumentParser(description="Chat with the model of a Radix Backend server.")
parser.add_argument("questions", nargs="+", metavar="question")
parser.add_argument("--tokenizer", required=True, help="of the served model: a directory or a hub id")
parser.add_argument("--url", default="127.0.0.1:8001", help="of the server's gRPC port (default: 127.0.0.1:8001)")
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
conversation = []
for question in arguments.questions:
    conversation.append({"role": "user", "content": question})
    prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    input_ids = tokenizer.encode(prompt, add_special_tokens=False)
    print(f"> {question}")
    answer = ""
    for text in stream(arguments.url, input_ids, {"max_tokens": 64, "temperature": 0}):
        print(text, end="", flush=True)
        answer += text
    print()
    conversation.append({"role": "assistant", "content": answer})
