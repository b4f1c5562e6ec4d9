"""Hold a conversation, in the model's own chat template. Needs nothing but Python.

    python client_examples/chat.py [--url HOST:PORT] "What is the capital of France?" "And of Italy?"

`messages` replaces `text_input`: the server renders the template. Each turn sends the whole conversation; what was said
before is found in the server's prefix cache.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request


def stream(address, conversation):
    """Yield pieces of the answer; exits with the server's reason if there is none."""
    body = {
        "messages": json.dumps(conversation),  # an input of type text: Triton takes no lists of objects
        "stream": True,
        "max_tokens": 64,
        "temperature": 0,
    }
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
                yield event["text_output"]


parser = argparse.ArgumentParser(description="Chat with the model of a Radix Backend server.")
parser.add_argument("questions", nargs="+", metavar="question")
parser.add_argument("--url", default="127.0.0.1:8000", help="of the server's HTTP port (default: 127.0.0.1:8000)")
arguments = parser.parse_args()

conversation = []
for question in arguments.questions:
    conversation.append({"role": "user", "content": question})
    print(f"> {question}")
    answer = ""
    for text in stream(arguments.url, conversation):
        print(text, end="", flush=True)
        answer += text
    print()
    conversation.append({"role": "assistant", "content": answer})
