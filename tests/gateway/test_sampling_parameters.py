"""The gateway's share of the sampling parameters: what concerns text, and log probabilities in words."""

from __future__ import annotations

from typing import Any

import pytest

from radix_backend.protocol import (
    LENGTH,
    RUNNING,
    STOP,
    Admit,
    Logprob,
    PromptLogprobs,
    PromptScores,
    Rejected,
    TokenLogprobs,
    array,
    column,
)
from tests.gateway.harness import Client, Sidecar
from tests.gateway.small_models import CONTEXT_LEN, byte_level

TOKENIZER = byte_level()
BOS, EOS = 0, 1


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text).ids
    return ids


def text_of(token: int) -> str:
    text: str = TOKENIZER.decode([token], skip_special_tokens=False)
    return text


def utf8(entry: Logprob) -> bytes:
    return entry.decoded_token.encode() if entry.raw is None else entry.raw


def admitted(sidecar: Sidecar, client: Client, text: str | None = "the fox", **submit: Any) -> Admit:
    client.submit(7, text, **submit)
    admit: Admit = sidecar.engine.receive(Admit)
    return admit


def scores(*entries: tuple[int, float], rank: int = 1) -> TokenLogprobs:
    ids, values = zip(*entries, strict=True)
    return TokenLogprobs(rank, column(ids, "<i4"), column(values, "<f4"))


@pytest.mark.parametrize(("count", "kept"), [(1, 1), (4, 4), (500, 500), (100_000, 600), (-1, CONTEXT_LEN - 100)])
def test_a_prompt_is_truncated_to_its_last_tokens(sidecar: Sidecar, client: Client, count: int, kept: int) -> None:
    prompt = [2 + n % 300 for n in range(600)]
    params = {"truncate_prompt_tokens": count, "max_tokens": 100}
    client.submit(7, None, input_ids=column(prompt, "<i4"), params=params)
    if kept >= CONTEXT_LEN:
        rejected = client.receive()
        assert isinstance(rejected, Rejected)
        assert f"'input_ids' is {kept} tokens long" in rejected.message
    else:
        assert array(sidecar.engine.receive(Admit).input_ids, "<i4").tolist() == prompt[-kept:]


def test_text_is_truncated_after_it_was_tokenized(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client, "the quick brown fox", params={"truncate_prompt_tokens": 3})
    assert array(admit.input_ids, "<i4").tolist() == ids_of("the quick brown fox")[-3:]


def test_special_tokens_are_spoken_if_asked_for(sidecar: Sidecar, client: Client) -> None:
    tokens = [BOS, *ids_of("Hi"), EOS, *ids_of("!")]
    for skip, expected in ((True, "Hi!"), (False, "<bos>Hi<eos>!")):
        admit = admitted(sidecar, client, params={"skip_special_tokens": skip, "ignore_eos": True})
        sidecar.engine.step((admit.id, tokens, LENGTH))
        assert client.row().text == expected


def test_the_stop_token_is_not_spoken_even_then(sidecar: Sidecar, client: Client) -> None:
    for include, expected in ((False, "Hi"), (True, "Hi<eos>")):
        params = {"skip_special_tokens": False, "include_stop_str_in_output": include}
        admit = admitted(sidecar, client, params=params)
        sidecar.engine.step((admit.id, [*ids_of("Hi"), EOS], STOP))
        assert client.row().text == expected


def test_bad_words_are_admitted_as_tokens_at_the_start_and_after_a_space(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client, params={"bad_words": ["dog", " fox"]})
    assert admit.bad_words == [ids_of("dog"), ids_of(" dog"), ids_of("fox"), ids_of(" fox")]


def test_biased_tokens_are_in_the_vocabulary(sidecar: Sidecar, client: Client) -> None:
    client.submit(7, params={"logit_bias": {400: 1.0}})
    assert "'logit_bias' holds 400; accepted: token ids from 0 to 399" in client.receive().message
    assert admitted(sidecar, client, params={"logit_bias": {399: 1.0}}).params.logit_bias == {399: 1.0}


def test_a_request_is_one_completion(sidecar: Sidecar, client: Client) -> None:
    client.submit(7, params={"n": 2})
    assert "'n' is 2; accepted: 1" in client.receive().message


def test_logprobs_name_tokens_and_ranks(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client, params={"logprobs": 3})
    silent = 8
    client.submit(silent, "other")
    other = sidecar.engine.receive(Admit)
    the, dog, fox = ids_of("the")[0], ids_of("d")[0], ids_of("f")[0]
    sidecar.engine.step(
        (other.id, [the], RUNNING),
        (admit.id, [the, BOS], RUNNING),
        logprobs=[
            None,
            scores((the, -3.0), (dog, -0.5), (fox, -0.5), (BOS, -1.0), rank=9),
            scores((BOS, -0.25), (BOS, -0.25)),
        ],
    )
    rows = {row.id: row for row in (client.row(), client.row())}
    assert rows[silent].logprobs == []
    assert rows[7].logprobs == [
        [
            Logprob(the, -3.0, 9, text_of(the)),
            Logprob(dog, -0.5, 1, "d"),
            Logprob(fox, -0.5, 1, "f"),  # as likely as the first
            Logprob(BOS, -1.0, 3, "<bos>"),
        ],
        [Logprob(BOS, -0.25, 1, ""), Logprob(BOS, -0.25, 1, "<bos>")],  # generated, it released no text
    ]


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("generated", "params", "finish"),
    [
        ("Größe 😀 fox", {}, LENGTH),
        ("the end ends here", {"stop": ["end h", "ends x"]}, LENGTH),
        ("the dog STOP and more", {"stop": ["STOP"]}, STOP),
        ("the dog STOP and more", {"stop": ["STOP"], "include_stop_str_in_output": True}, STOP),
        ("the dog STO", {"stop": ["STOP"]}, LENGTH),
    ],
)
def test_decoded_tokens_join_to_the_text_and_are_cut_with_it(
    sidecar: Sidecar, client: Client, generated: str, params: dict[str, Any], finish: int, chunk: int
) -> None:
    tokens = ids_of(generated) + (ids_of("😀")[:1] if finish == LENGTH else [])  # ends within a character
    admit = admitted(sidecar, client, params={"logprobs": 0, **params})
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        end = LENGTH if start + chunk >= len(tokens) else RUNNING
        sidecar.engine.step((admit.id, part, end), logprobs=[scores((token, -1.0)) for token in part])
    rows = client.rows(7)
    assert rows[-1].finish == finish
    kept = [token for row in rows for token in row.tokens]
    chosen = [token for row in rows for token, *_ in row.logprobs]
    assert [entry.token_id for entry in chosen] == kept
    text = "".join(row.text for row in rows)
    assert "".join(entry.decoded_token for entry in chosen) == text
    assert b"".join(utf8(entry) for entry in chosen).decode(errors="replace") == text
    if "stop" not in params:
        assert b"".join(utf8(entry) for entry in chosen) == generated.encode() + "😀".encode()[:2]
    assert (len(kept) < len(tokens)) == (finish == STOP)


def test_a_stop_token_that_is_left_out_has_no_bytes(sidecar: Sidecar, client: Client) -> None:
    half = ids_of("😀")[0]
    for stop, include, ends in ((half, False, b""), (half, True, b"\xf0\x9f"), (EOS, True, b"")):
        admit = admitted(sidecar, client, params={"logprobs": 0, "include_stop_str_in_output": include})
        tokens = [*ids_of("a"), half, stop]
        sidecar.engine.step((admit.id, tokens, STOP), logprobs=[scores((token, -1.0)) for token in tokens])
        assert b"".join(utf8(entry) for (entry,) in client.row().logprobs) == b"a\xf0\x9f" + ends


def test_likeliest_tokens_that_are_part_of_a_character_have_their_bytes(sidecar: Sidecar, client: Client) -> None:
    parts = ids_of("😀")
    the = ids_of("the")[0]
    admit = admitted(sidecar, client, params={"logprobs": len(parts)})
    sidecar.engine.step((admit.id, [the], LENGTH), logprobs=[scores((the, -2.0), *((token, -1.0) for token in parts))])
    ((_, *likeliest),) = client.row().logprobs
    assert [entry.decoded_token for entry in likeliest] == ["\ufffd", "\ufffd\ufffd"]
    assert b"".join(utf8(entry) for entry in likeliest) == "😀".encode()


def test_prompt_logprobs_come_before_the_tokens(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client, params={"prompt_logprobs": 1})
    the, fox = ids_of("the")[0], ids_of("f")[0]
    sidecar.engine.send(PromptScores(admit.id, [scores((the, -2.0), (fox, -1.0), rank=5), scores((EOS, -1.0))]))
    sidecar.engine.step((admit.id, [the], LENGTH))
    assert client.receive() == PromptLogprobs(
        7,
        [
            [Logprob(the, -2.0, 5, text_of(the)), Logprob(fox, -1.0, 1, "f")],
            [Logprob(EOS, -1.0, 1, "<eos>")],
        ],
    )
    assert client.row().finish == LENGTH


def test_prompt_logprobs_of_a_request_that_ended_are_nobodys(sidecar: Sidecar, client: Client) -> None:
    sidecar.engine.send(PromptScores(123456, [scores((5, -2.0))]))
    admit = admitted(sidecar, client)
    sidecar.engine.step((admit.id, ids_of("a"), LENGTH))
    assert client.row().text == "a"
