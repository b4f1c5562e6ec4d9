"""How sure was the model? The probability of each generated token, and of those that it might have chosen instead.

    python client_examples/logprobs.py [HOST:PORT]

They are the model's own: before temperature, penalties and filters.
"""

import json
import math
import sys
import urllib.error
import urllib.request

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"

body = {
    "text_input": "The capital of France is",
    "max_tokens": 6,
    "temperature": 0,
    "logprobs": 3,  # of the chosen token, and of the three likeliest
    "return_logprobs": True,
    "return_cumulative_logprob": True,
}
request = urllib.request.Request(f"http://{address}/v2/models/radix/generate", json.dumps(body).encode())
try:
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
except urllib.error.HTTPError as error:
    sys.exit(json.load(error)["error"])

for token in json.loads(answer["logprobs"]):
    # {token id: {"logprob", "rank", "decoded_token"}}, the chosen token first
    print(", ".join(f"{entry['decoded_token']!r} {math.exp(entry['logprob']):.1%}" for entry in token.values()))
print(f"all of it: {math.exp(answer['cumulative_logprob']):.2%}")
