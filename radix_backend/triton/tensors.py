"""The tensors that the model declares: Triton's vllm_backend's, and ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tensor:
    """An input or output; ``size`` -1 is any. ``help`` is what docs/requests.md says of it."""

    name: str
    data_type: str  # Triton's, without TYPE_
    size: int
    help: str

    @property
    def config(self) -> dict[str, Any]:
        """As in a model configuration."""
        return {"name": self.name, "data_type": f"TYPE_{self.data_type}", "dims": [self.size]}


PROMPTS = ("text_input", "input_ids", "messages")

# One BOOL input each: which outputs to add to the text.
SWITCHES = {
    "return_finish_reason": "adds `finish_reason`",
    "return_cumulative_logprob": "adds `cumulative_logprob`",
    "return_logprobs": "adds `logprobs`: those that the sampling parameter `logprobs` asks for",
    "return_num_input_tokens": "adds `num_input_tokens`",
    "return_num_output_tokens": "adds `num_output_tokens`",
    "return_token_ids": "adds `token_ids`",
    "return_cache_receipt": "adds `cache_receipt`",
}

INPUTS = (
    Tensor("text_input", "STRING", 1, "the prompt, in UTF-8; this, `input_ids` or `messages` is required"),
    Tensor("input_ids", "INT32", -1, "the prompt as token ids, which skips the tokenizer"),
    Tensor(
        "messages",
        "STRING",
        1,
        'the prompt as a conversation, which the model\'s chat template renders: JSON, a list of `{"role", "content"}`',
    ),
    Tensor("chat_template_kwargs", "STRING", 1, "a JSON object: further variables of the chat template"),
    Tensor("stream", "BOOL", 1, "true: a response for each piece of text; false, the default: one with all of it"),
    Tensor("sampling_parameters", "STRING", 1, "a JSON object; its members beat request parameters of the same name"),
    Tensor(
        "exclude_input_in_output",
        "BOOL",
        1,
        "false: the text begins with the prompt; by default true for streams, `input_ids` and `messages` (where false "
        "is refused), false otherwise",
    ),
    *(Tensor(name, "BOOL", 1, help) for name, help in SWITCHES.items()),
    Tensor("image", "STRING", -1, "declared for vllm_backend's clients; refused unless it is empty"),
)

OUTPUTS = (
    Tensor("text_output", "STRING", -1, "the text, or in a stream what is new of it; one element a completion"),
    Tensor(
        "finish_reason",
        "STRING",
        -1,
        "`stop`, `length` or `abort`; the text `None` while a stream goes on, as in vllm_backend",
    ),
    Tensor(
        "logprobs",
        "STRING",
        -1,
        'JSON: a list with an object a token, `{"<token id>": {"logprob", "rank", "decoded_token"}}`, the generated '
        "token first; `null` where the sampling parameter `logprobs` is not set",
    ),
    Tensor("cumulative_logprob", "FP32", -1, "the sum over all tokens generated so far"),
    Tensor(
        "prompt_logprobs",
        "STRING",
        1,
        "JSON: as `logprobs`, of the prompt's tokens, `null` for the first; where the sampling parameter is set",
    ),
    Tensor("num_input_tokens", "UINT32", 1, "tokens of the prompt"),
    Tensor("num_output_tokens", "UINT32", -1, "generated tokens, in a stream those of this response"),
    Tensor(
        "token_ids",
        "INT32",
        -1,
        "the generated tokens, in a stream those of this response; of all completions, one after the other",
    ),
    Tensor("cache_receipt", "STRING", 1, "JSON, on the last response: what the request cost, see below"),
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
        if tensor.name not in inputs:
            config.add_input(tensor.config | {"optional": True})
    for tensor in OUTPUTS:
        if tensor.name not in outputs:
            config.add_output(tensor.config)
    config.set_max_batch_size(0)
    config.set_model_transaction_policy({"decoupled": True})
