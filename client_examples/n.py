"""Several completions of one prompt, which is computed once.

    python client_examples/n.py [HOST:PORT]

Every output of a completion then has one element for each of them.
"""

import json
import sys
import urllib.error
import urllib.request

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"

body = {
    "text_input": "The capital of France is",
    "exclude_input_in_output": True,
    "n": 3,
    "max_tokens": 12,
    "temperature": 0.9,
    "seed": 7,  # with it the same three come again
    "return_num_output_tokens": True,
    "return_finish_reason": True,
}
request = urllib.request.Request(f"http://{address}/v2/models/radix/generate", json.dumps(body).encode())
try:
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
except urllib.error.HTTPError as error:
    sys.exit(json.load(error)["error"])

columns = answer["text_output"], answer["num_output_tokens"], answer["finish_reason"]
for text, tokens, reason in zip(*columns, strict=True):
    print(f"{tokens} tokens, {reason}: {text!r}")
