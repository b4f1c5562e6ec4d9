"""``python -m radix_backend.worker.prebuild CONFIG_JSON MODEL_DIR``: compile kernels that no start compiles unasked.

An engine whose attention is "auto" takes FlashInfer's prefill kernel for Hopper if it is there; compiling it takes nvcc
and minutes, so that a start never does. That it cannot be compiled here is a warning: everything works without it.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from pathlib import Path

import msgspec

from radix_backend.config import EngineConfig
from radix_backend.errors import RadixError
from radix_backend.loading import read_model_config
from radix_backend.process import setup_logging
from radix_backend.worker import settle_device

log = logging.getLogger(__name__)

_PERIOD = 15.0  # seconds between lines that say that it goes on


def main() -> None:
    config = EngineConfig.parse(msgspec.json.decode(sys.argv[1]))
    setup_logging(config.log_level)
    if settle_device(config).device == "cuda" and config.attention_backend == "auto":
        compile_attention(config, Path(sys.argv[2]))


def compile_attention(config: EngineConfig, model_dir: Path) -> None:
    from radix_backend.attention.cuda_backends import compile_fastest_prefill
    from radix_backend.worker.precision import compute_dtype

    started, done = time.monotonic(), threading.Event()
    log.info("compiling FlashInfer's prefill kernel, if there is one for this model and GPU: some minutes")
    threading.Thread(target=_report, args=(started, done), daemon=True).start()
    try:
        compile_fastest_prefill(compute_dtype(config), read_model_config(model_dir).head_dim)
        log.info("compiled FlashInfer's prefill kernel: %.0f s", time.monotonic() - started)
    except RadixError as error:
        log.info("no kernel of FlashInfer's: %s", error)
    except Exception as error:  # compilers fail in many ways
        log.warning("FlashInfer's prefill kernel cannot be compiled: %s: %s", type(error).__name__, error)
    finally:
        done.set()


def _report(started: float, done: threading.Event) -> None:
    while not done.wait(_PERIOD):
        log.info("compiling FlashInfer's prefill kernel: %.0f s", time.monotonic() - started)


if __name__ == "__main__":
    main()
