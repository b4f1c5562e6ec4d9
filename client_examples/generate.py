"""Ask for a whole completion over HTTP. Needs nothing but Python.

    python client_examples/generate.py [HOST:PORT]

Inputs and sampling parameters are members of one JSON object; docs/requests.md lists them.
"""

import json
import sys
import urllib.error
import urllib.request

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"

body = {
    "text_input": "The capital of France is",
    "exclude_input_in_output": True,  # else the text begins with the prompt
    "max_tokens": 16,
    "temperature": 0,
    "return_finish_reason": True,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
}
request = urllib.request.Request(f"http://{address}/v2/models/radix/generate", json.dumps(body).encode())
try:
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
except urllib.error.HTTPError as error:
    sys.exit(json.load(error)["error"])  # names what is wrong, and what is accepted

print(answer["text_output"])
print(
    f"{answer['num_input_tokens']} + {answer['num_output_tokens']} tokens; it ended because: {answer['finish_reason']}"
)
