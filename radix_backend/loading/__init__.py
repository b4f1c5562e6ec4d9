"""Models on disk: finding, converting, describing and reading them."""

from radix_backend.loading.model_config import ModelConfig, Rope, effective_context_len, read_model_config
from radix_backend.loading.resolve import resolve_model
from radix_backend.loading.sharding import Shard, check_layout

__all__ = [
    "ModelConfig",
    "Rope",
    "Shard",
    "check_layout",
    "effective_context_len",
    "read_model_config",
    "resolve_model",
]
