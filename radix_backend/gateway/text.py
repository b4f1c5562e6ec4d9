"""Text to tokens and back: encoding, decoding, and decoding token by token."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from radix_backend.errors import InvalidArgument, NotFound, Unsupported
from radix_backend.gateway.model import read_json

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PIECE_DECODERS = {"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "none"}


class Detokenizer(Protocol):
    """Turns one stream of tokens into text. What it releases joins to what decoding all tokens at once gives."""

    def push(self, token: int) -> str:
        """The text that is certain now; "" while a character is open."""

    def flush(self) -> str:
        """What was open at the end of the stream: an incomplete character comes out as U+FFFD."""

    def own_bytes(self, token: int, text: str) -> bytes:
        """Of ``token``, which released ``text``: its share of the text's UTF-8, be it part of a character."""


class TextCodec:
    """The tokenizer of a model directory. Safe to use from several threads."""

    def __init__(self, model_dir: Path) -> None:
        """Raises NotFound, InvalidArgument or Unsupported."""
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise NotFound(f"{path} does not exist; a model directory holds config.json and tokenizer.json")
        source = path.read_text(encoding="utf-8")
        try:
            self._tokenizer = Tokenizer.from_str(source)
        except Exception as error:  # the library raises plain Exception
            raise InvalidArgument(f"{path} is not a tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._bos_id = self._missing_bos(read_json(model_dir / "tokenizer_config.json") or {})
        self._anchor = self._find_anchor()
        decoders = _decoder_types(json.loads(source).get("decoder"))
        self._detokenizers = {skip: self._choose_detokenizer(decoders, path, skip) for skip in (True, False)}
        self._shown = self.detokenizer(skip_special_tokens=False)
        self._tokens: dict[int, tuple[str, bytes | None]] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> npt.NDArray[np.int32]:
        """Token ids, "<i4". Special tokens written out in ``text`` become their ids, as in transformers.

        ``add_special_tokens`` applies the tokenizer's own post-processing (usually a leading BOS); the output of a
        chat template has its special tokens already. Raises InvalidArgument for text outside a closed vocabulary.
        """
        try:  # of the library's ways to encode, only the batched ones release the GIL
            [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except Exception as error:  # the library raises plain Exception
            raise InvalidArgument(f"the text cannot be tokenized: {error}") from None
        ids = np.array(encoding.ids, dtype="<i4")
        if add_special_tokens and self._bos_id is not None:
            ids = np.concatenate([np.array([self._bos_id], dtype="<i4"), ids])
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text of all: "" for a special one, and for one that leaves a character open."""
        detokenizer = self.detokenizer()
        pieces = [detokenizer.push(token) for token in ids]
        if pieces:
            pieces[-1] += detokenizer.flush()
        return pieces

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """A decoder for one new stream."""
        return self._detokenizers[skip_special_tokens]()

    def token(self, token: int) -> tuple[str, bytes | None]:
        """The text of a token, special or not, in the middle of others; of part of a character U+FFFD. And its bytes,
        where they are not that text's UTF-8."""
        shown = self._tokens.get(token)
        if shown is None:
            anchor, anchor_text = self._anchor
            text = self.decode([anchor, token], skip_special_tokens=False)[len(anchor_text) :]
            shown = self._tokens[token] = text, unless_utf8(self._shown.own_bytes(token, text), text)
        return shown

    def spellings(self, word: str) -> list[list[int]]:
        """The ways to write ``word`` in tokens: at the start of a text and after a space."""
        found = []
        for text in (word.lstrip() or word, " " + word.lstrip()):
            ids = self.encode(text, add_special_tokens=False).tolist()
            if ids and ids not in found:
                found.append(ids)
        return found

    def _choose_detokenizer(
        self, decoders: set[str], path: Path, skip_special_tokens: bool
    ) -> Callable[[], Detokenizer]:
        pieces = _pieces(self._tokenizer, skip_special_tokens)
        if decoders <= {"ByteLevel", "Fuse"}:
            return partial(_ByteDetokenizer, [_to_bytes(piece) for piece in pieces])
        if not decoders <= _PIECE_DECODERS:
            accepted = f"ByteLevel, or any of {', '.join(sorted(_PIECE_DECODERS))}"
            raise Unsupported(f"{path} decodes by {' + '.join(sorted(decoders))}; accepted: {accepted}")
        spoken = {token: piece for token, piece in enumerate(pieces) if piece is not None}
        byte_values = {}
        if "ByteFallback" in decoders:
            byte_values = {token: int(piece[3:5], 16) for token, piece in spoken.items() if _BYTE.fullmatch(piece)}
        decode = partial(self.decode, skip_special_tokens=skip_special_tokens)
        return partial(_PieceDetokenizer, decode, frozenset(spoken), byte_values, self._anchor)

    def _find_anchor(self) -> tuple[int, str]:
        """A token that is text and no byte, with its text: others are decoded behind it as in the middle of a text."""
        for token, piece in enumerate(_pieces(self._tokenizer, skip_special_tokens=True)):
            if piece is not None and not _BYTE.fullmatch(piece):
                text = self.decode([token])
                if text and "\ufffd" not in text:
                    return token, text
        raise InvalidArgument("the tokenizer has no token that is text")

    def _missing_bos(self, config: dict[str, Any]) -> int | None:
        """Older checkpoints ask for a BOS in tokenizer_config.json and leave it out of tokenizer.json."""
        bos = config.get("bos_token")
        bos_id = self._tokenizer.token_to_id(bos["content"] if isinstance(bos, dict) else bos) if bos else None
        if config.get("add_bos_token") is not True or bos_id in self._tokenizer.encode("").ids:
            return None
        return bos_id


class _ByteDetokenizer:
    """For byte-level vocabularies: every token is some bytes, the text is their UTF-8."""

    __slots__ = ("_bytes", "_decode")

    def __init__(self, token_bytes: list[bytes]) -> None:
        self._bytes = token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token: int) -> str:
        return self._decode(self._bytes[token]) if token < len(self._bytes) else ""

    def flush(self) -> str:
        return self._decode(b"", True)

    def own_bytes(self, token: int, text: str) -> bytes:
        return self._bytes[token] if token < len(self._bytes) else b""


class _PieceDetokenizer:
    """For vocabularies of text pieces (SentencePiece), where only the first token of a text is decoded specially.

    So a token in the middle is decoded behind an *anchor*, any token whose text is then cut off. Byte tokens
    (``<0xE4><0xBD>…``) are released as soon as they are characters. In a run of them that turns out to be garbage
    those characters stay, which a decode of all tokens at once would replace too.
    """

    __slots__ = ("_anchor", "_anchor_chars", "_byte_values", "_decode", "_open", "_open_bytes", "_spoken", "_start")

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        spoken: frozenset[int],
        byte_values: dict[int, int],
        anchor: tuple[int, str],
    ) -> None:
        """``spoken``: tokens that have text. ``byte_values``: those that are bytes. ``anchor``: one that is not."""
        self._decode = decode
        self._spoken = spoken
        self._byte_values = byte_values
        self._anchor, text = anchor
        self._anchor_chars = len(text)
        self._open: list[int] = []
        self._open_bytes = bytearray()
        self._start = True

    def push(self, token: int) -> str:
        if token not in self._spoken:
            return ""
        self._open.append(token)
        if token in self._byte_values:
            self._open_bytes.append(self._byte_values[token])
            try:
                self._open_bytes.decode()
            except UnicodeDecodeError:
                return ""
        return self.flush()

    def flush(self) -> str:
        if not self._open:
            return ""
        if self._start:
            text = self._decode(self._open)
        else:
            text = self._decode([self._anchor, *self._open])[self._anchor_chars :]
        self._start = False
        self._open.clear()
        self._open_bytes.clear()
        return text

    def own_bytes(self, token: int, text: str) -> bytes:
        if token in self._byte_values:
            return bytes([self._byte_values[token]])
        if text.startswith("\ufffd"):  # it may have released bytes before it that are no character
            text = self._decode([self._anchor, token])[self._anchor_chars :]
        return text.encode()


def unless_utf8(data: bytes, text: str) -> bytes | None:
    """``data`` if it is not ``text`` in UTF-8."""
    return None if data == text.encode() else data


def _pieces(tokenizer: Tokenizer, skip_special_tokens: bool) -> list[str | None]:
    """What the decoder gets for each token id; None where it gets nothing: skipped tokens, gaps in the vocabulary."""
    special = set()
    if skip_special_tokens:
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    pieces = [tokenizer.id_to_token(token) for token in range(size)]
    return [None if piece in special else piece for piece in pieces]


def _decoder_types(decoder: dict[str, object] | None) -> set[str]:
    if decoder is None:
        return {"none"}
    nested = decoder.get("decoders")
    if isinstance(nested, list):
        return {name for child in nested for name in _decoder_types(child)}
    return {str(decoder["type"])}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable ones stand for themselves, the rest for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _to_bytes(piece: str | None) -> bytes:
    """The bytes of a byte-level token; one with other characters (an added token) stands for its own UTF-8."""
    if piece is None:
        return b""
    try:
        return bytes([_ALPHABET[char] for char in piece])
    except KeyError:
        return piece.encode()
