"""Ask several questions about one text at the same moment: the server computes the text once.

    python client_examples/shared_prefix.py [HOST:PORT]

The cache receipt of an answer tells how many tokens of its prompt were found in the prefix cache.
"""

import json
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"
# The time makes it a text that no earlier run has left in the cache.
TEXT = f"Letter {time.time_ns()}. " + "The quick brown fox jumps over the lazy dog. " * 40
QUESTIONS = ("Who wrote it?", "Where is it?", "When was it?", "Why was it?", "What is it?", "How was it?")


def ask(question):
    """Tokens of the prompt, and how many of them were cached."""
    body = {
        "text_input": TEXT + question,
        "max_tokens": 1,
        "return_num_input_tokens": True,
        "return_cache_receipt": True,
    }
    request = urllib.request.Request(f"http://{address}/v2/models/radix/generate", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        sys.exit(json.load(error)["error"])
    return answer["num_input_tokens"], json.loads(answer["cache_receipt"])["cached_tokens"]


with ThreadPoolExecutor(len(QUESTIONS)) as pool:
    answers = list(pool.map(ask, QUESTIONS))
for question, (tokens, cached) in zip(QUESTIONS, answers, strict=True):
    print(f"{question:14} {tokens} prompt tokens, {cached} of them cached")
tokens, cached = map(sum, zip(*answers, strict=True))
print(f"computed {tokens - cached} of {tokens}")
