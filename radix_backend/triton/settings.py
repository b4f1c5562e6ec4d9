"""The settings of a model in a Triton repository: ``1/model.json``, and parameters of ``config.pbtxt`` that beat it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument
from radix_backend.validation import show

FILE = "model.json"

# Parameters that are meant for Triton's Python backend.
_TRITONS_OWN = {"EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS"}


def read_settings(version_dir: Path, model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as written, for `EngineConfig.parse`.

    ``model_config`` is Triton's, with parameters such as ``{"max_bs": {"string_value": "8"}}``. A relative path in
    ``model`` may be relative to the version directory, so that weights can lie beside ``model.json``.
    Raises InvalidArgument if the file is not a JSON object.
    """
    settings = _read_file(version_dir / FILE)
    for name, value in (model_config.get("parameters") or {}).items():
        if name not in _TRITONS_OWN:
            settings[name] = value["string_value"]
    model = settings.get("model")
    if isinstance(model, str) and model and (version_dir / model).exists():
        settings["model"] = str((version_dir / model).resolve())
    return settings


def load_config(version_dir: Path, model_config: Mapping[str, Any]) -> EngineConfig:
    """The engine that this model wants. Raises InvalidArgument or Unsupported naming the setting."""
    return EngineConfig.parse(read_settings(version_dir, model_config))


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        settings = msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise InvalidArgument(f"{path} holds {show(settings)}; accepted: a JSON object of settings")
    return settings
