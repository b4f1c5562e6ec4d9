"""``python -m radix_backend.engine CONFIG_JSON MODEL_DIR ENGINE_ADDRESS``: the engine process, rank 0 included."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import msgspec

from radix_backend.config import EngineConfig
from radix_backend.engine.core import EngineCore, bind
from radix_backend.process import Reporter, die_with_parent, fatal_on_user_error, freeze_objects, setup_logging


def main() -> None:
    config_path, model_dir, address = sys.argv[1:]
    die_with_parent()
    config = msgspec.json.decode(Path(config_path).read_bytes(), type=EngineConfig)
    setup_logging(config.log_level)
    reporter = Reporter()
    with fatal_on_user_error(reporter):
        # Brings torch, which the engine's own floor does not need.
        from radix_backend.worker import create_profiler, create_worker, settle_device

        config = settle_device(config)
        worker = create_worker(config, Path(model_dir), reporter)
        context, socket = bind(address)
        core = EngineCore(config, worker, socket, reporter, create_profiler(config))
    signal.signal(signal.SIGTERM, lambda *_: core.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the supervisor decides
    freeze_objects()
    reporter.ready()
    core.run()
    context.destroy(linger=0)


if __name__ == "__main__":
    main()
