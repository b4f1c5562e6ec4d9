"""``python -m radix_backend.bench.offline``: workloads on the engine alone, without doors. One JSON line each."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from radix_backend.bench.shapes import SHAPES, write_config
from radix_backend.bench.workloads import workload
from radix_backend.cli.settings import add_settings, given_settings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b", help="of the model, with random weights")
    parser.add_argument("--workloads", default="seed:0", help="such as seed:0,prefixlong:1,single")
    add_settings(parser)
    arguments = parser.parse_args()
    settings = {"load_format": "dummy", "max_bs": 256, "max_batched_tokens": 16384, "context_len": 4096}
    settings |= given_settings(arguments)
    # What is measured is not what is measured first.
    warm_up = {"name": "warm-up", "prompts": [[i % 1000 + 1 for i in range(j, j + 200)] for j in range(8)]}
    lines = [json.dumps({**warm_up, "num_outputs": [32] * 8})]
    for name in arguments.workloads.split(","):
        work = workload(name)
        lines.append(json.dumps({"name": name, "prompts": work.prompts, "num_outputs": work.num_outputs}))
    with tempfile.TemporaryDirectory() as directory:
        write_config(Path(directory), arguments.shape)
        engine = [sys.executable, "-m", "radix_backend.engine.offline", json.dumps(settings), directory]
        return subprocess.run(engine, input="\n".join(lines) + "\n", text=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
