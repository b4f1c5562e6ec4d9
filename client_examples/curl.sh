#!/bin/sh
# Both of Triton's HTTP endpoints for text: a whole answer, then a stream of events.
#
#   client_examples/curl.sh [HOST:PORT]
set -eu

model="http://${1:-127.0.0.1:8000}/v2/models/radix"

curl --silent --show-error "$model/generate" -d '{
  "text_input": "The capital of France is",
  "max_tokens": 8,
  "temperature": 0,
  "exclude_input_in_output": true,
  "return_finish_reason": true
}'
echo

# Triton takes no lists as parameters: what is one goes into sampling_parameters, a text that holds JSON.
curl --silent --show-error --no-buffer "$model/generate_stream" -d '{
  "text_input": "The capital of France is",
  "stream": true,
  "sampling_parameters": "{\"max_tokens\": 8, \"temperature\": 0, \"stop\": [\"\\n\", \"!\"]}"
}'
