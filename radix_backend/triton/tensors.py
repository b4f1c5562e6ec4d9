"""The tensors that the model declares: Triton's vllm_backend's, and ours."""

from __future__ import annotations

from typing import Any

Tensor = dict[str, Any]


def _tensor(name: str, data_type: str, size: int) -> Tensor:
    return {"name": name, "data_type": f"TYPE_{data_type}", "dims": [size]}


# One BOOL input each: which outputs to add to the text.
SWITCHES = (
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "return_token_ids",
    "return_cache_receipt",
)

INPUTS = (
    _tensor("text_input", "STRING", 1),
    _tensor("input_ids", "INT32", -1),
    _tensor("stream", "BOOL", 1),
    _tensor("sampling_parameters", "STRING", 1),
    _tensor("exclude_input_in_output", "BOOL", 1),
    *(_tensor(name, "BOOL", 1) for name in SWITCHES),
    _tensor("image", "STRING", -1),
)

OUTPUTS = (
    _tensor("text_output", "STRING", -1),
    _tensor("finish_reason", "STRING", -1),
    _tensor("logprobs", "STRING", -1),
    _tensor("cumulative_logprob", "FP32", -1),
    _tensor("prompt_logprobs", "STRING", 1),
    _tensor("num_input_tokens", "UINT32", 1),
    _tensor("num_output_tokens", "UINT32", -1),
    _tensor("token_ids", "INT32", -1),
    _tensor("cache_receipt", "STRING", 1),
)


def declare(config: Any) -> None:
    """Complete the model configuration that Triton read from ``config.pbtxt`` (a ``pb_utils.ModelConfig``).

    What the file declares itself is left as it is: ``input_ids`` may be TYPE_INT64 there. Every input is optional to
    Triton, because either prompt will do and a missing one deserves a better error than Triton's.
    """
    declared = config.as_dict()
    inputs = {tensor["name"] for tensor in declared["input"]}
    outputs = {tensor["name"] for tensor in declared["output"]}
    for tensor in INPUTS:
        if tensor["name"] not in inputs:
            config.add_input(tensor | {"optional": True})
    for tensor in OUTPUTS:
        if tensor["name"] not in outputs:
            config.add_output(tensor)
    config.set_max_batch_size(0)
    config.set_model_transaction_policy({"decoupled": True})
