"""A GGUF file of llama architecture → a directory in Hugging Face layout, bf16.

The ``gguf`` package reads and dequantizes; what is ours is the naming, the order of q/k rows and the tokenizer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from radix_backend.errors import InvalidArgument, Unsupported
from radix_backend.loading.safetensors_writer import Bfloat16Writer
from radix_backend.validation import show

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType


def convert_gguf(path: Path, out: Path, progress: Callable[[float], None]) -> None:
    """Write config, tokenizer and weights of ``path`` into the directory ``out``; ``progress`` gets the done fraction.

    Raises InvalidArgument when the file is damaged, Unsupported for another architecture or tokenizer.
    """
    with _damage_named(path):
        from gguf import GGUFReader

        reader = GGUFReader(path)
        config = _config(reader)
        shapes = _shapes(config)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        if "output.weight" in tensors:
            shapes["output.weight"] = ("lm_head.weight", shapes["token_embd.weight"][1])
            config["tie_word_embeddings"] = False
        _check_tensors(tensors, shapes)
        _write_json(out / "config.json", config)
        _write_tokenizer(reader, out)
        _write_weights(tensors, shapes, config, out / "model.safetensors", progress)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """What the reader stumbles over in a truncated or corrupt file has many types."""
    try:
        yield
    except Unsupported as error:
        raise Unsupported(f"{path}: {error}") from None
    except InvalidArgument as error:
        raise InvalidArgument(f"{path} is damaged or incomplete: {error}") from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise InvalidArgument(f"{path} is damaged or incomplete: {type(error).__name__}: {error}") from error


def _field(reader: Any, name: str, default: Any = None) -> Any:
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _required(reader: Any, name: str) -> Any:
    value = _field(reader, name)
    if value is None:
        raise InvalidArgument(f"metadata {name!r} is missing")
    return value


def _config(reader: Any) -> dict[str, Any]:
    """config.json of the equivalent LlamaForCausalLM."""
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise Unsupported(f"GGUF architecture {show(architecture)}; accepted: 'llama'")
    for name, accepted in (("llama.expert_count", 0), ("llama.rope.scaling.type", "none")):
        value = _field(reader, name, accepted)
        if value != accepted:
            raise Unsupported(f"GGUF metadata {name!r} is {show(value)}; accepted: {show(accepted)}")
    hidden, heads = (
        int(_required(reader, "llama.embedding_length")),
        int(_required(reader, "llama.attention.head_count")),
    )
    head_dim = int(_field(reader, "llama.attention.key_length", hidden // heads))
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if _field(reader, name, head_dim) != head_dim:
            raise Unsupported(f"GGUF metadata {name!r} is {_field(reader, name)}; accepted: {head_dim} (the head size)")
    # Stored as f32: 9.999999747378752e-06 was 1e-5.
    epsilon = float(str(np.float32(_required(reader, "llama.attention.layer_norm_rms_epsilon"))))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": int(_required(reader, "llama.feed_forward_length")),
        "num_hidden_layers": int(_required(reader, "llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_field(reader, "llama.attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "vocab_size": len(_required(reader, "tokenizer.ggml.tokens")),
        "max_position_embeddings": int(_required(reader, "llama.context_length")),
        "rms_norm_eps": epsilon,
        "rope_theta": float(_field(reader, "llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
    }


def _shapes(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF tensor name → name and shape in the checkpoint."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, q),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": ("model.embed_tokens.weight", (config["vocab_size"], hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
    }
    for index in range(config["num_hidden_layers"]):
        for source, target in _LAYER_TENSORS.items():
            shapes[f"blk.{index}.{source}.weight"] = (f"model.layers.{index}.{target}.weight", layer[source])
    return shapes


def _check_tensors(tensors: dict[str, Any], shapes: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    for name in tensors:
        if name not in shapes:
            raise Unsupported(f"GGUF tensor {name!r}, which a plain llama model does not have")
    for name, (_, shape) in shapes.items():
        if name not in tensors:
            raise InvalidArgument(f"tensor {name!r} is missing")
        stored = tuple(int(size) for size in tensors[name].shape[::-1])
        if stored != shape:
            raise InvalidArgument(f"tensor {name!r} has shape {stored}; accepted: {shape}")


def _write_weights(
    tensors: dict[str, Any],
    shapes: dict[str, tuple[str, tuple[int, ...]]],
    config: dict[str, Any],
    path: Path,
    progress: Callable[[float], None],
) -> None:
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def convert(source: str) -> int:
        target, shape = shapes[source]
        try:
            values = dequantize(tensors[source].data, tensors[source].tensor_type)
        except NotImplementedError:
            kind = tensors[source].tensor_type.name
            raise Unsupported(f"GGUF tensor {source!r} is quantized as {kind}, which cannot be read") from None
        values = values.astype(np.float32, copy=False).reshape(shape)
        role = source.split(".")[-2]
        writer.write(target, _rotate_halves(values, heads[role]) if role in heads else values)
        return int(values.size)

    total = sum(int(np.prod(shape)) for _, shape in shapes.values())
    done = 0
    with Bfloat16Writer(path, dict(shapes.values())) as writer, ThreadPoolExecutor(_threads()) as pool:
        try:
            for future in as_completed([pool.submit(convert, source) for source in shapes]):
                done += future.result()
                progress(done / total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _threads() -> int:
    return min(4, len(os.sched_getaffinity(0)))


def _rotate_halves(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """llama.cpp stores the rows of q and k for a rope over neighbours (0,1), (2,3)…; ours pairs the two halves."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _write_tokenizer(reader: Any, out: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, pre = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre")
    if (kind, pre) != ("gpt2", "smollm"):
        raise Unsupported(
            f"GGUF tokenizer {show(kind)} with pre-tokenizer {show(pre)}; accepted: 'gpt2' with 'smollm'. "
            "Use the model's Hugging Face directory instead"
        )
    tokens, types = _required(reader, "tokenizer.ggml.tokens"), _required(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _required(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (_CONTROL, _USER_DEFINED):
            special = token_type == _CONTROL
            added = AddedToken(token, special=special, normalized=False)
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    tokenizer.save(str(out / "tokenizer.json"))

    ids = {
        name: _field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding", "unknown")
    }
    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _required(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        **{role: tokens[ids[key]] for role, key in named.items() if ids[key] is not None},
    }
    if template := _field(reader, "tokenizer.chat_template"):
        settings["chat_template"] = template
        (out / "chat_template.jinja").write_text(template)
    _write_json(out / "tokenizer_config.json", settings)
    eos = sorted({ids[key] for key in ("eos", "eot") if ids[key] is not None})
    generation = {"bos_token_id": ids["bos"], "eos_token_id": eos, "pad_token_id": ids["padding"]}
    _write_json(
        out / "generation_config.json", {name: value for name, value in generation.items() if value is not None}
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))
