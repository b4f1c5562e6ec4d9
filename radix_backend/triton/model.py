"""The class that Triton's Python backend drives. Everything that needs `triton_python_backend_utils` is here."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from radix_backend.client import EngineClient
from radix_backend.errors import RadixError
from radix_backend.metrics.publisher import Publisher
from radix_backend.metrics.recorder import Recorder
from radix_backend.protocol import Status
from radix_backend.triton.bridge import Bridge, suitable_senders
from radix_backend.triton.lifecycle import Lifecycle
from radix_backend.triton.series import Turn, identify
from radix_backend.triton.settings import load_config
from radix_backend.triton.tensors import declare

_SHARED_MEMORY = "/dev/shm"  # through which Triton's Python backend passes tensors
_GROWTH_BYTES = 8 << 20  # the region grows by whole steps
_ERROR_STATES = ("failed", "restarting")


class TritonPythonModel:
    """One instance of the served model: a client of the engine, and nothing more."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        declare(config)
        return config

    def initialize(self, args: Mapping[str, str]) -> None:
        """Returns quickly: the whole server waits for it. The engine loads the model meanwhile.

        Raises TritonModelException with a message for the user if a setting is wrong.
        """
        _log_to_triton()
        version_dir = Path(args["model_repository"]) / args["model_version"]
        try:
            model_config = json.loads(args["model_config"])
            config = load_config(version_dir, model_config)
            self._client = EngineClient(config, on_log=_show_line, on_status=_show_status, parent=os.getppid())
        except RadixError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        recorder = Recorder()
        is_model_ready = partial(pb_utils.is_model_ready, args["model_name"], args["model_version"])
        lifecycle = Lifecycle(os.getppid(), is_model_ready)
        self._bridge = Bridge(
            self._client, config.namespace, recorder, lifecycle.ending, lifecycle.arrive, suitable_senders()
        )
        identity = identify(args, model_config.get("instance_group") or [])
        self._publisher = Publisher(self._client, recorder, identity, pb_utils.MetricFamily, Turn(identity.labels))

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._bridge.execute(_TritonWire(request.get_response_sender()), partial(_read, request))

    def is_ready(self) -> bool:
        """Newer servers ask this for ``/v2/models/<model>/ready``."""
        return not self._client.ailment

    def finalize(self) -> None:
        """Called when the model is unloaded or the server stops, unless it is killed."""
        self._bridge.close()
        self._publisher.close()
        self._client.close()


class _TritonWire:
    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def send(self, tensors: list[tuple[str, npt.NDArray[Any]]], final: bool) -> None:
        response = pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in tensors])
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)

    def has_room(self, size: int) -> bool:
        shared = os.statvfs(_SHARED_MEMORY)
        return shared.f_bavail * shared.f_frsize >= 2 * size + _GROWTH_BYTES

    def refuse(self, error: RadixError) -> None:
        triton_error = pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, error.code))
        response = pb_utils.InferenceResponse(error=triton_error)
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


def _read(request: Any) -> tuple[dict[str, npt.NDArray[Any]], str]:
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}, request.parameters()


def _show_status(status: Status) -> None:
    line = f"the engine is {status.state}" + (f": {status.detail}" if status.detail else "")
    _show_line("warning" if status.state in _ERROR_STATES else "info", "sidecar", line)


def _show_line(level: str, source: str, line: str) -> None:
    logger = pb_utils.Logger
    log = {"debug": logger.log_verbose, "info": logger.log_info, "warning": logger.log_warn}.get(
        level, logger.log_error
    )
    log(f"[radix {source}] {line}")


class _TritonHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _show_line(record.levelname.lower(), "stub", self.format(record))


def _log_to_triton() -> None:
    logging.basicConfig(level=logging.INFO, handlers=[_TritonHandler()], force=True)
