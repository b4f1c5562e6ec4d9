"""What the gateway must know of a model directory: limits and end-of-sequence tokens. No weights, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument, NotFound
from radix_backend.protocol import ModelInfo
from radix_backend.validation import show


def read_model_info(model_dir: Path, config: EngineConfig) -> ModelInfo:
    """The facts that doors are told. Raises NotFound or InvalidArgument naming the file and the field."""
    path = model_dir / "config.json"
    model = read_json(path)
    if model is None:
        raise NotFound(f"{path} does not exist; a model directory holds config.json and tokenizer.json")
    limit = _positive(path, model, "max_position_embeddings")
    context_len = config.context_len or limit
    if context_len > limit:
        raise InvalidArgument(f"setting 'context_len' is {context_len}; accepted: 2 to {limit} (the model)")
    generation = read_json(model_dir / "generation_config.json") or {}
    return ModelInfo(
        name=config.model,
        context_len=context_len,
        vocab_size=_positive(path, model, "vocab_size"),
        eos_token_ids=_eos_token_ids(generation) or _eos_token_ids(model),
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file, None without the file. Raises InvalidArgument when it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InvalidArgument(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"{path} does not hold a JSON object")
    return value


def _positive(path: Path, model: dict[str, Any], name: str) -> int:
    value = model.get(name)
    if not isinstance(value, int) or value < 1:
        raise InvalidArgument(f"{path}: {name!r} is {show(value)}; accepted: a positive integer")
    return value


def _eos_token_ids(values: dict[str, Any]) -> list[int]:
    eos = values.get("eos_token_id")
    if eos is None:
        return []
    return list(eos) if isinstance(eos, list) else [eos]
