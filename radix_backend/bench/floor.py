"""What Triton itself costs a response: `floor_model` in a server of its own, under the same light client."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from radix_backend.bench.light_client import LightClient, Load
from radix_backend.bench.processes import cpu_seconds, free_ports, triton_processes
from radix_backend.cli.ports import Ports
from radix_backend.cli.server_process import ServerProcess
from radix_backend.cli.tritonserver import find_server

MODEL = "floor"
_CONFIG = """\
backend: "python"
model_transaction_policy { decoupled: true }
input [
  { name: "input_ids" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] }
]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]
instance_group [ { kind: KIND_MODEL count: 1 } ]
"""


def floor_us_per_response(load: Load, pace: float) -> dict[str, float]:
    """CPU microseconds a response of ``tritonserver`` and ``stub``, with a step of all streams every ``pace`` s."""
    with tempfile.TemporaryDirectory(prefix="radix-floor-") as directory:
        model_dir = Path(directory) / MODEL
        (model_dir / "1").mkdir(parents=True)
        (model_dir / "config.pbtxt").write_text(_CONFIG)
        shutil.copy(Path(__file__).with_name("floor_model.py"), model_dir / "1" / "model.py")
        ports = Ports("127.0.0.1", *free_ports(3))
        server = ServerProcess(find_server(), Path(directory), ports, Path(directory) / "log")
        try:
            server.wait_live()
            server.load(MODEL, None)
            processes = triton_processes(os.getpid())
            with LightClient(ports.address(ports.grpc), MODEL) as client:
                parameters = {"streams": len(load.prompts), "pace": pace}
                client.run(Load(load.prompts, 4, parameters))
                before = {name: cpu_seconds(pid) for name, pid in processes.items()}
                result = client.run(Load(load.prompts, load.max_tokens, parameters))
                return {
                    name: 1e6 * (cpu_seconds(pid) - before[name]) / result.responses for name, pid in processes.items()
                }
        finally:
            server.stop()
