"""Model directories without weights, for tests: tokenizers of the kinds that LLMs come with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CONTEXT_LEN = 512
SPECIAL = ["<bos>", "<eos>"]  # ids 0 and 1 everywhere
LONG_TEXT = "long" * 25_000  # of one token, where a test adds it: fills queues quickly
LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind.",
    "  def f(x):\n\n    return x  # 1234567890",
    "Größe, œuvre, 你好世界, привет, 😀 👩‍👩‍👧 ﬁn\ufffd",
    "stop END STOP stopping the end ends here.",
]


def byte_level() -> Tokenizer:
    """GPT-2's kind: every byte is a token, so that a token may be part of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    _add_tokens(tokenizer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama 2's kind: ``▁`` for spaces, bytes for characters that the vocabulary lacks, a BOS before every prompt."""
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnoprstuTEND.,!ö你"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "f"), ("o", "u"), ("▁", "▁"), ("▁▁", "▁▁"), ("i", "n")]
    pieces += ["".join(merge) for merge in merges]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.add_special_tokens([*SPECIAL, "<unk>"])
    _add_tokens(tokenizer)
    return tokenizer


def metaspace() -> Tokenizer:
    """T5's kind: a unigram model whose decoder treats the first token of a text differently."""
    pieces = [*SPECIAL, "<unk>", "▁", "▁the", "▁fox", "▁▁", "s", "th", "e", "f", "o", "x", "ö", "你", "."]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - len(pieces) / 9) for piece in pieces], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*SPECIAL, "<unk>"])
    _add_tokens(tokenizer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
}


def _add_tokens(tokenizer: Tokenizer) -> None:
    """Tokens outside the model's vocabulary: plain ones are part of the text, special ones are not."""
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("「思」", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|sep|>", normalized=False)])


def write_model(directory: Path, tokenizer: Tokenizer, **config: object) -> Path:
    """A model directory; ``config`` replaces entries of config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    facts = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tokenizer.get_vocab_size() + 8,  # padded, as most models' embeddings are
        "max_position_embeddings": CONTEXT_LEN,
        "eos_token_id": 1,
    }
    (directory / "config.json").write_text(json.dumps(facts | config))
    return directory
