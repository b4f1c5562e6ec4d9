"""A client in a process of its own. Arguments: the supervisor's command, the configuration, both JSON, and a mode.

Says "ready" on stdout and leaves when its stdin ends; as "orphan" it names its parent, and its only thread hangs.
"""

import json
import os
import sys
import time

from radix_backend.client import EngineClient
from radix_backend.config import EngineConfig
from radix_backend.sidecar import lease

lease.SUPERVISOR = json.loads(sys.argv[1])
mode = sys.argv[3]
client = EngineClient(EngineConfig.parse(json.loads(sys.argv[2])), parent=os.getppid() if mode == "orphan" else 0)
client.wait_ready(60)
print("ready", flush=True)
if mode == "orphan":
    time.sleep(3600)
sys.stdin.read()
if mode == "close":
    client.close()
