"""Stream several completions at once with tritonclient's asyncio client.

    pip install 'tritonclient[grpc]'
    python client_examples/grpc_stream_aio.py [HOST:PORT]

All streams share one connection; one stream serves one request, so that an error tells whose it is.
"""

import asyncio
import json
import sys

import numpy as np
import tritonclient.grpc.aio as grpcclient

PROMPTS = ("The sun is", "The moon is", "The sea is")


async def stream(client, prompt, sampling_parameters):
    """Yield pieces of text. Raises InferenceServerException with the server's reason."""

    async def requests():
        yield {"model_name": "radix", "inputs": inputs}

    inputs = [
        tensor("text_input", "BYTES", np.array([prompt.encode()], dtype=object)),
        tensor("sampling_parameters", "BYTES", np.array([json.dumps(sampling_parameters).encode()], dtype=object)),
        tensor("stream", "BOOL", np.array([True])),
    ]
    responses = client.stream_infer(requests())
    try:
        async for result, error in responses:
            if error is not None:
                raise error
            yield result.as_numpy("text_output")[0].decode()
    finally:
        responses.cancel()  # has an effect only where somebody left before the end


def tensor(name, data_type, values):
    made = grpcclient.InferInput(name, list(values.shape), data_type)
    made.set_data_from_numpy(values)
    return made


async def main(address):
    async def complete(prompt):
        return prompt + "".join([text async for text in stream(client, prompt, {"max_tokens": 16, "temperature": 0})])

    async with grpcclient.InferenceServerClient(address) as client:
        for text in await asyncio.gather(*map(complete, PROMPTS)):
            print(repr(text))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"))
