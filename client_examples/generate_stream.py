"""Stream a completion over HTTP as server-sent events. Needs nothing but Python.

    python client_examples/generate_stream.py [HOST:PORT]

The status tells only whether the first event is an error: later errors are events like any other.
"""

import json
import sys
import urllib.error
import urllib.request

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"

body = {"text_input": "The capital of France is", "stream": True, "max_tokens": 16, "temperature": 0}
request = urllib.request.Request(f"http://{address}/v2/models/radix/generate_stream", json.dumps(body).encode())
try:
    events = urllib.request.urlopen(request)
except urllib.error.HTTPError as error:
    events = error

with events:
    for line in events:
        if line := line.removeprefix(b"data:").strip():
            event = json.loads(line)
            if "error" in event:
                sys.exit(event["error"])
            print(event["text_output"], end="", flush=True)
print()
