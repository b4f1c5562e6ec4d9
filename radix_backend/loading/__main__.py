"""``python -m radix_backend.loading <config.json>`` prints the directory of the configured model, made if need be."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from radix_backend.config import EngineConfig
from radix_backend.loading import resolve_model
from radix_backend.process import Reporter, die_with_parent, fatal_on_user_error, setup_logging


def main() -> None:
    die_with_parent()
    config = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=EngineConfig)
    setup_logging(config.log_level)
    reporter = Reporter()
    with fatal_on_user_error(reporter):
        print(resolve_model(config, reporter), flush=True)


if __name__ == "__main__":
    main()
