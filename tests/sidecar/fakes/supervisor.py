"""The real supervisor over the fake processes of this directory. Arguments: seconds until a hang, then the usual.

Or "foreground", the configuration as JSON and a directory.
"""

import json
import sys
from pathlib import Path

from radix_backend import supervisor
from radix_backend.config import EngineConfig

HERE = Path(__file__).parent

programs = supervisor.Programs(*([str(HERE / f"{name}.py")] for name in ("loading", "gateway", "engine")))
if sys.argv[1] == "foreground":
    supervisor.run_foreground(EngineConfig.parse(json.loads(sys.argv[2])), Path(sys.argv[3]), programs)
else:
    supervisor.HANG_SECONDS = float(sys.argv[1])
    supervisor.main(sys.argv[2:], programs)
