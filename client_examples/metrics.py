"""Read the server's metrics, as Prometheus would.

    python client_examples/metrics.py [HOST:PORT]

docs/metrics.md lists them all. Triton shows them about a second after the fact.
"""

import re
import sys
import urllib.request

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8002"

with urllib.request.urlopen(f"http://{address}/metrics") as response:
    page = response.read().decode()
series = re.findall(r"^radix:(\w+)\{.*\} (\S+)$", page, re.MULTILINE)


def total(name):
    """The sum over all models, versions and other labels."""
    return sum(float(value) for found, value in series if found == name)


def mean(histogram):
    return total(f"{histogram}_sum") / max(total(f"{histogram}_count"), 1)


looked_up = max(total("prefix_cache_queries_total"), 1)
print(f"requests: {total('num_requests_running'):.0f} running, {total('num_requests_waiting'):.0f} waiting")
print(f"tokens generated: {total('generation_tokens_total'):.0f}")
print(f"prompt tokens found in the cache: {total('prefix_cache_hits_total') / looked_up:.0%}")
print(f"mean time to the first token: {1000 * mean('time_to_first_token_seconds'):.0f} ms")
print(f"mean time between tokens: {1000 * mean('inter_token_latency_seconds'):.0f} ms")
