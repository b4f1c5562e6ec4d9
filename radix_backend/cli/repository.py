"""A Triton model repository that holds the model ``radix``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from radix_backend.errors import InvalidArgument, NotFound
from radix_backend.triton.settings import read_settings

MODEL = "radix"
_CHECKOUT = Path(__file__).resolve().parents[2]


class Repository:
    """Raises NotFound if ``path`` (default: one in the working directory, or of the checkout) has no such model."""

    def __init__(self, path: Path | None = None) -> None:
        places = [path] if path is not None else [Path("model_repository"), _CHECKOUT / "model_repository"]
        for place in places:
            if (place / MODEL / "config.pbtxt").exists():
                self.path = place.resolve()
                break
        else:
            raise NotFound(f"no model {MODEL!r} in {' or '.join(map(str, places))}; choose with --model-repository")
        config_file = self.path / MODEL / "config.pbtxt"
        try:
            self._config = text_format.Parse(config_file.read_text(), model_config_pb2.ModelConfig())
        except text_format.ParseError as error:
            raise InvalidArgument(f"{config_file} is not a model configuration: {error}") from None

    def settings(self) -> dict[str, Any]:
        """The settings that the model has without any flag."""
        versions = [path for path in (self.path / MODEL).iterdir() if path.name.isdigit()]
        version_dir = max(versions, key=lambda path: int(path.name))
        return read_settings(version_dir, json_format.MessageToDict(self._config, preserving_proto_field_name=True))

    def config_with(self, settings: dict[str, str]) -> str:
        """The model's configuration, as JSON for the server's load call, with these settings as parameters."""
        config = model_config_pb2.ModelConfig()
        config.CopyFrom(self._config)
        for name, value in settings.items():
            config.parameters[name].string_value = value
        return str(json_format.MessageToJson(config, preserving_proto_field_name=True, indent=None))
