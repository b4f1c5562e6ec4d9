"""Memory-mapped safetensors, in one file or several: a tensor is read from disk when its bytes are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from safetensors import SafetensorError, safe_open

from radix_backend.errors import InvalidArgument, NotFound, Unsupported

_INDEX = "model.safetensors.index.json"
_DTYPES = ("BF16", "F16", "F32")


class Part(NamedTuple):
    """Of a tensor, along one dimension."""

    dim: int
    range: range


class Weights(Protocol):
    """Where a model gets its tensors by name."""

    def get(self, name: str, *shape: int, part: Part | None = None) -> Any:
        """The tensor, of ``shape``, or a part of it."""


class Checkpoint:
    """The tensors of a model directory by name."""

    def __init__(self, model_dir: Path | str) -> None:
        """Raises NotFound when there are no weights, InvalidArgument when a file is damaged or missing."""
        self._dir = Path(model_dir)
        self._files: dict[str, Any] = {}  # tensor name → open file
        for path in self._paths():
            try:
                file: Any = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise InvalidArgument(f"{path}, which {_INDEX} names, does not exist") from None
            except SafetensorError as error:
                raise InvalidArgument(f"{path} is damaged or incomplete: {error}") from None
            self._files.update(dict.fromkeys(file.keys(), file))

    def _paths(self) -> list[Path]:
        index = self._dir / _INDEX
        if index.is_file():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise InvalidArgument(f"{index} is not a safetensors index: {error!r}") from None
            return [self._dir / name for name in sorted(names)]
        paths = sorted(self._dir.glob("*.safetensors"))
        if not paths:
            raise NotFound(f"{self._dir} has no *.safetensors")
        return paths

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str, *shape: int, part: Part | None = None) -> Any:
        """The torch tensor ``name``, in its stored dtype, over the mapped file: copy it before writing to it.

        Of a ``part`` nothing else is read.

        Raises InvalidArgument when it is missing or not of ``shape``, Unsupported when it is not bf16, f16 or f32.
        """
        if name not in self._files:
            raise InvalidArgument(f"{self._dir} lacks the tensor {name!r}")
        stored = self._files[name].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            found = tuple(stored.get_shape())
            raise InvalidArgument(f"tensor {name!r} in {self._dir} has shape {found}; accepted: {shape} (config.json)")
        if stored.get_dtype() not in _DTYPES:
            raise Unsupported(f"tensor {name!r} in {self._dir} is {stored.get_dtype()}; accepted: {', '.join(_DTYPES)}")
        if part is None:
            return self._files[name].get_tensor(name)
        wanted = slice(part.range.start, part.range.stop)
        return stored[(slice(None),) * part.dim + (wanted,)]
