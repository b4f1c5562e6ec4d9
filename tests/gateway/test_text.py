from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from radix_backend.errors import InvalidArgument, NotFound, Unsupported
from radix_backend.gateway.text import TextCodec
from tests.gateway.small_models import KINDS, LINES, byte_level, metaspace, sentencepiece, write_model


class Oracle:
    """Decodes all tokens at once."""

    def __init__(self, directory: Path, kind: str) -> None:
        tokenizer = KINDS[kind]()
        self.codec = TextCodec(write_model(directory, tokenizer))
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        pieces = {id: piece for piece, id in tokenizer.get_vocab().items() if piece not in special}
        self._pieces = pieces if kind == "sentencepiece" else {}

    def text(self, ids: list[int]) -> str:
        """As the library decodes; but in a run of byte tokens that is garbage, its valid beginning stays."""
        text = self.codec.decode(ids)
        if "\ufffd" not in text or not self._pieces:
            return text
        text = ""
        pieces = [self._pieces[token] for token in ids if token in self._pieces]
        for is_byte, group in itertools.groupby(pieces, key=lambda piece: bool(re.fullmatch("<0x..>", piece))):
            if is_byte:
                run = bytes(int(piece[3:5], 16) for piece in group)
                valid = max(n for n in range(len(run) + 1) if is_utf8(run[:n]))
                text += run[:valid].decode() + "\ufffd" * (len(run) - valid)
            else:
                text += "".join(group).replace("▁", " ")
        return text.removeprefix(" ")


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.fixture(scope="module", params=sorted(KINDS))
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def byte_codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    return TextCodec(write_model(tmp_path_factory.mktemp("byte_level"), byte_level()))


def stream(codec: TextCodec, ids: list[int]) -> list[str]:
    detokenizer = codec.detokenizer()
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


TOKENS = st.lists(st.integers(0, 399), max_size=40)  # beyond every small vocabulary: padded ids too


@settings(max_examples=400, deadline=None)
@given(ids=TOKENS)
def test_pieces_of_random_tokens_join_to_a_full_decode(oracle: Oracle, ids: list[int]) -> None:
    assert "".join(stream(oracle.codec, ids)) == oracle.text(ids)


@settings(max_examples=400, deadline=None)
@given(ids=st.lists(st.sampled_from([*range(2, 259), 259, 262]), max_size=24), data=st.data())
def test_pieces_of_garbage_bytes_join_to_a_full_decode(oracle: Oracle, ids: list[int], data: st.DataObject) -> None:
    """Byte tokens in any order, special tokens among them."""
    ids = [token for group in ids for token in ([group, 0] if data.draw(st.booleans()) else [group])]
    assert "".join(stream(oracle.codec, ids)) == oracle.text(ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=30) | st.sampled_from(LINES))
def test_pieces_of_any_text_join_to_a_full_decode(oracle: Oracle, text: str) -> None:
    ids = oracle.codec.encode(text).tolist()
    assert "".join(stream(oracle.codec, ids)) == oracle.codec.decode(ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=30) | st.sampled_from(LINES), cut=st.integers(0, 3))
def test_bytes_of_any_text_s_tokens_join_to_it_though_characters_span_them(oracle: Oracle, text: str, cut: int) -> None:
    codec = oracle.codec
    ids = codec.encode(text).tolist()
    ids = ids[: len(ids) - cut]
    detokenizer = codec.detokenizer()
    released = [detokenizer.push(token) for token in ids]
    if released:
        released[-1] += detokenizer.flush()
    joined = b"".join(map(detokenizer.own_bytes, ids, released))
    if "\ufffd" in codec.decode(ids):  # cut within a character
        assert codec.decode(codec.encode(text).tolist()).encode().startswith(joined)
    else:
        assert joined.decode() == codec.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_bytes_after_a_broken_character_are_the_token_s_own(tmp_path: Path, kind: str) -> None:
    codec = TextCodec(write_model(tmp_path, KINDS[kind]()))
    ids = codec.encode("the🦊").tolist()[:-1] + codec.encode("the").tolist()
    pieces = codec.pieces(ids)
    assert any("\ufffd" in piece and piece.endswith("the") for piece in pieces)
    joined = b"".join(map(codec.detokenizer().own_bytes, ids, pieces))
    broken = joined.removeprefix(b"the").removesuffix(b"the").strip()
    assert 0 < len(broken) < 4
    assert "🦊".encode().startswith(broken)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
def test_a_byte_level_stream_never_shows_part_of_a_character(byte_codec: TextCodec, text: str) -> None:
    ids = byte_codec.encode(text).tolist()
    seen = ""
    for piece in stream(byte_codec, ids):
        seen += piece
        assert text.startswith(seen)
    assert seen == text


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_truncated_character_comes_out_as_a_full_decode_gives_it(tmp_path: Path, kind: str) -> None:
    codec = TextCodec(write_model(tmp_path, KINDS[kind]()))
    ids = codec.encode("the🦊").tolist()[:-1]
    pieces = stream(codec, ids)
    assert set(pieces[-1]) == {"\ufffd"}
    assert "".join(pieces) == codec.decode(ids)


def test_a_byte_level_stream_of_invalid_bytes_is_not_held_back(byte_codec: TextCodec) -> None:
    """A model that is stuck on half a character must not make the gateway remember all of it."""
    half = byte_codec.encode("🦊").tolist()[0]
    assert "".join(stream(byte_codec, [half] * 50)[:-1]).count("\ufffd") >= 49


def test_a_byte_token_that_is_a_character_is_released_at_once(tmp_path: Path) -> None:
    """Llama 2 writes a newline this way; a stop string that ends with one must not wait for the next token."""
    codec = TextCodec(write_model(tmp_path, sentencepiece()))
    ids = codec.encode("the\n🦊\nthe", add_special_tokens=False).tolist()
    assert stream(codec, ids) == ["the", "\n", "", "", "", "🦊", "\n", "t", "he", ""]


def test_special_tokens_have_no_text_and_added_ones_do(byte_codec: TextCodec) -> None:
    ids = byte_codec.encode("<bos>a<think>b「思」c<|sep|><eos>").tolist()
    assert "".join(stream(byte_codec, ids)) == "a<think>b「思」c"


def test_plain_prompts_get_the_tokenizers_own_special_tokens_and_chat_prompts_none(tmp_path: Path) -> None:
    codec = TextCodec(write_model(tmp_path, sentencepiece()))
    assert codec.encode("the fox").tolist()[0] == 0
    assert 0 not in codec.encode("the fox", add_special_tokens=False)
    assert codec.encode("<bos>the fox", add_special_tokens=False).tolist().count(0) == 1


@pytest.mark.parametrize("bos", ["<bos>", {"content": "<bos>", "special": True}])
def test_a_bos_asked_for_in_tokenizer_config_is_added_once(tmp_path: Path, bos: object) -> None:
    for name, tokenizer in (("without", metaspace()), ("with", sentencepiece())):
        directory = write_model(tmp_path / name, tokenizer)
        (directory / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": bos}))
        codec = TextCodec(directory)
        assert codec.encode("the fox").tolist().count(0) == 1
        assert codec.encode("the fox", add_special_tokens=False).tolist().count(0) == 0


def test_truncation_and_padding_of_the_file_are_ignored(byte_codec: TextCodec, tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    codec = TextCodec(write_model(tmp_path, tokenizer))
    text = "The quick brown fox"
    assert codec.decode(codec.encode(text).tolist()) == text
    assert codec.encode(text).tolist() == byte_codec.encode(text).tolist()


def test_a_missing_corrupt_or_unknown_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"tokenizer\.json"):
        TextCodec(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(InvalidArgument, match=r"tokenizer\.json is not a tokenizer"):
        TextCodec(tmp_path)
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    with pytest.raises(Unsupported, match="ByteLevel, or any of"):
        TextCodec(write_model(tmp_path, tokenizer))


@pytest.mark.model
def test_streams_of_the_embedded_model_join_to_a_full_decode(embedded_model_dir: Path) -> None:
    codec = TextCodec(embedded_model_dir)
    reference = Tokenizer.from_file(str(embedded_model_dir / "tokenizer.json"))
    for line in LINES:
        ids = codec.encode(line).tolist()
        assert ids == reference.encode(line).ids
        for end in range(len(ids) + 1):
            assert "".join(stream(codec, ids[:end])) == reference.decode(ids[:end])
