"""A Triton Inference Server backend for LLMs with a radix-tree KV cache in a sidecar engine."""
