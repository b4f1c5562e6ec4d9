"""A Triton Inference Server backend for LLMs with a radix-tree KV cache in a sidecar engine.

``from radix_backend import LLM, EngineConfig, SamplingParams`` is the offline door. Names are imported when they are
used, so that other doors stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from radix_backend.config import EngineConfig
    from radix_backend.llm import LLM, Generation
    from radix_backend.output import Completion, Output
    from radix_backend.sampling_params import SamplingParams

_HOMES = {
    "Completion": "output",
    "EngineConfig": "config",
    "Generation": "llm",
    "LLM": "llm",
    "Output": "output",
    "SamplingParams": "sampling_params",
}

__all__ = ["LLM", "Completion", "EngineConfig", "Generation", "Output", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
