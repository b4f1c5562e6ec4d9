"""Models on disk: finding, converting, describing and reading them."""

from radix_backend.loading.model_config import ModelConfig, Rope, effective_context_len, read_model_config
from radix_backend.loading.resolve import resolve_model

__all__ = ["ModelConfig", "Rope", "effective_context_len", "read_model_config", "resolve_model"]
