"""Requests through a real gateway process; the test is the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from radix_backend.protocol import (
    ABORT,
    LENGTH,
    RUNNING,
    STOP,
    Abort,
    Admit,
    EngineRejected,
    Rejected,
    array,
    column,
)
from tests.gateway.harness import Client, Sidecar
from tests.gateway.small_models import CONTEXT_LEN, byte_level, sentencepiece, write_model

TOKENIZER = byte_level()
EOS = 1


def ids_of(text: str, tokenizer: Tokenizer = TOKENIZER) -> list[int]:
    ids: list[int] = tokenizer.encode(text).ids
    return ids


def admitted(sidecar: Sidecar, client: Client, **submit: Any) -> Admit:
    client.submit(7, **submit)
    admit: Admit = sidecar.engine.receive(Admit)
    return admit


# ── admission ──────────────────────────────────────────────────────────────────────────────


def test_a_prompt_is_admitted_as_the_engine_wants_it(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client, text="the fox", params={"stop_token_ids": [9, 5], "max_tokens": 3}, priority=-2)
    assert array(admit.input_ids, "<i4").tolist() == ids_of("the fox")
    assert admit.stop_token_ids == [EOS, 5, 9]
    assert (admit.params.max_tokens, admit.params.seed, admit.priority) == (3, 1, -2)


def test_a_door_learns_how_long_its_prompt_is(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client, text="the fox")
    sidecar.engine.step((admit.id, ids_of("a"), RUNNING))
    assert client.row().text == "a"
    assert client.prompt_lengths == {7: len(ids_of("the fox"))}


def test_a_conversation_is_rendered_and_gets_no_further_special_tokens(
    start_sidecar: Callable[..., Sidecar], tmp_path: Path
) -> None:
    tokenizer = sentencepiece()  # adds a BOS to plain text
    model_dir = write_model(tmp_path / "model", tokenizer)
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ mark }}{% endfor %}"
    facts = {"bos_token": "<bos>", "chat_template": template}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(facts))
    sidecar = start_sidecar(model_dir)
    sidecar.report("ready")
    client = sidecar.client()
    messages = [{"role": "user", "content": "the fox"}]
    admit = admitted(sidecar, client, text=None, messages=messages, chat_template_kwargs={"mark": "!"})
    expected = tokenizer.encode("<bos>the fox!", add_special_tokens=False).ids
    assert array(admit.input_ids, "<i4").tolist() == expected
    client.submit(8, None, messages=[{"content": "no role"}])
    assert "'messages' holds {'content': 'no role'}; accepted: objects with a string 'role'" in client.receive().message
    client.close()


def test_token_ids_are_admitted_as_they_are(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client, text=None, input_ids=column([3, 2, 1], "<i4"), params={"ignore_eos": True})
    assert array(admit.input_ids, "<i4").tolist() == [3, 2, 1]
    assert admit.stop_token_ids == []


def test_limits_are_brought_into_the_context_and_the_vocabulary(sidecar: Sidecar, client: Client) -> None:
    params = {"max_tokens": 10**6, "min_tokens": 10**5, "top_k": 2**40}
    admit = admitted(sidecar, client, text=None, input_ids=column([2] * (CONTEXT_LEN - 3), "<i4"), params=params)
    assert (admit.params.max_tokens, admit.params.min_tokens, admit.params.top_k) == (3, 3, 400)


@pytest.mark.parametrize(
    ("submit", "complaint"),
    [
        ({"text": None}, "exactly one of 'text_input', 'input_ids' and 'messages' is accepted; 0 are given"),
        ({"input_ids": column([2], "<i4")}, "2 are given"),
        ({"text": ""}, f"'text_input' is 0 tokens long; accepted: 1 to {CONTEXT_LEN - 1}"),
        ({"text": "\x00" * CONTEXT_LEN}, f"'text_input' is {CONTEXT_LEN} tokens long; accepted: 1 to"),
        ({"text": "\x00" * 5000}, "'text_input' is 5000 tokens long"),
        ({"text": None, "input_ids": column([2] * 512, "<i4")}, "'input_ids' is 512 tokens long"),
        ({"text": None, "input_ids": b"123"}, "'input_ids' is 3 bytes long; accepted: whole 32-bit integers"),
        ({"text": None, "input_ids": column([5, 400], "<i4")}, "'input_ids' holds 400; accepted: 0 to 399"),
        ({"text": None, "input_ids": column([-1], "<i4")}, "'input_ids' holds -1"),
        ({"output_ids": column([400], "<i4")}, "'output_ids' holds 400"),
        ({"emitted_chars": -1}, "'emitted_chars' is -1"),
        ({"params": {"stop_token_ids": [400]}}, "'stop_token_ids' holds 400; accepted: token ids from 0 to 399"),
        ({"params": {"seed": None}}, "'seed' is None"),
        ({"params": {"temperature": -1.0}}, "Expected `float` >= 0.0 - at `$[2].temperature`"),
        ({"params": {"temperature": float("inf")}}, "'temperature' is inf; accepted: a finite number"),
        ({"params": {"stop": 5}}, "Expected `array`, got `int` - at `$[2].stop`"),
        ({"priority": "high"}, "Expected `int`, got `str`"),
    ],
)
def test_a_wrong_request_is_rejected_with_what_is_accepted(
    sidecar: Sidecar, client: Client, submit: dict[str, Any], complaint: str
) -> None:
    client.submit(7, **submit)
    rejected = client.receive()
    assert isinstance(rejected, Rejected)
    assert (rejected.id, rejected.code) == (7, "INVALID_ARG")
    assert complaint in rejected.message
    assert admitted(sidecar, client)  # the id is free, and the gateway lives


def test_an_id_that_is_running_cannot_be_used_again(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client)
    client.submit(7)
    assert client.receive().message == "'id' is 7; accepted: one that is not running"
    assert sidecar.engine.is_told_to_finish(ABORT, admit.id)


def test_what_the_engine_rejects_is_rejected(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client)
    sidecar.engine.send(EngineRejected(admit.id, "UNAVAILABLE", "the queue is full"))
    assert client.receive() == Rejected(7, "UNAVAILABLE", "the queue is full")


# ── streaming ──────────────────────────────────────────────────────────────────────────────


def test_a_stream_is_text_and_tokens_and_ends_with_the_receipt(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client)
    ids = ids_of("Hello 🦊!")
    for token in ids[:-1]:
        sidecar.engine.step((admit.id, [token], RUNNING))
    sidecar.engine.step((admit.id, ids[-1:], LENGTH))
    rows = client.rows(7)
    assert [row.tokens for row in rows] == [[token] for token in ids]
    assert "".join(row.text for row in rows) == "Hello 🦊!"
    assert "" in [row.text for row in rows]  # tokens travel while their character is open
    assert rows[-1].finish == LENGTH
    receipt = rows[-1].receipt
    assert receipt is not None
    assert (receipt.num_output_tokens, receipt.num_input_tokens, receipt.cached_tokens) == (len(ids), 10 + admit.id, 4)


def test_an_open_character_is_flushed_when_the_length_is_reached(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client)
    ids = ids_of("a🦊")[:-1]
    sidecar.engine.step((admit.id, ids, LENGTH))
    row = client.row()
    assert row.text == TOKENIZER.decode(ids)
    assert row.text.endswith("\ufffd")


def test_each_client_gets_its_own_rows(sidecar: Sidecar, client: Client) -> None:
    other = sidecar.client()
    admits = []
    for who, id in ((client, 1), (other, 1), (client, 2)):
        who.submit(id)
        admits.append(sidecar.engine.receive(Admit).id)
    sidecar.engine.step((admits[0], ids_of("a"), RUNNING), (admits[1], ids_of("b"), RUNNING), (10**6, [5], RUNNING))
    sidecar.engine.step((admits[2], ids_of("c"), LENGTH), (admits[1], ids_of("d"), LENGTH), (10**6, [5], LENGTH))
    assert [(row.id, row.text) for row in (client.row(), client.row())] == [(1, "a"), (2, "c")]
    assert [(row.id, row.text) for row in (other.row(), other.row())] == [(1, "b"), (1, "d")]
    other.close()
    assert sidecar.client()  # sweeps the other out
    client.send(Abort([1]))
    assert sidecar.engine.is_told_to_finish(ABORT, admits[0])


# ── stops ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("include", "text"), [(False, "one"), (True, "one</x>")])
def test_a_stop_string_ends_text_tokens_and_counts(sidecar: Sidecar, client: Client, include: bool, text: str) -> None:
    admit = admitted(sidecar, client, params={"stop": ["</x>"], "include_stop_str_in_output": include})
    ids = ids_of("one</x>two")
    end = next(n for n in range(len(ids)) if "</x>" in TOKENIZER.decode(ids[:n]))
    for token in ids[: end - 1]:
        sidecar.engine.step((admit.id, [token], RUNNING))
    sidecar.engine.step((admit.id, ids[end - 1 :], RUNNING))
    assert sidecar.engine.is_told_to_finish(STOP, admit.id)
    sidecar.engine.step((admit.id, ids_of("late"), RUNNING))  # was in flight
    sidecar.engine.step((admit.id, [], STOP))
    rows = client.rows(7)
    assert "".join(row.text for row in rows) == text
    assert [token for row in rows for token in row.tokens] == ids[:end]
    assert [row.finish for row in rows[-2:]] == [RUNNING, STOP]
    receipt = rows[-1].receipt
    assert receipt is not None
    assert receipt.num_output_tokens == end


def test_a_stop_string_beats_a_length_that_the_engine_reached_meanwhile(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client, params={"stop": ["b"]})
    sidecar.engine.step((admit.id, ids_of("ab"), RUNNING))
    assert sidecar.engine.is_told_to_finish(STOP, admit.id)
    sidecar.engine.step((admit.id, ids_of("c"), LENGTH))
    assert [(row.text, row.finish) for row in client.rows(7)] == [("a", RUNNING), ("", STOP)]
    admit = admitted(sidecar, client, params={"stop": ["b"]})
    sidecar.engine.step((admit.id, ids_of("ab"), LENGTH))
    assert [(row.text, row.finish) for row in client.rows(7)] == [("a", STOP)]
    assert sidecar.engine.hears_nothing()


def test_the_beginning_of_a_stop_string_is_held_back_and_flushed(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client, params={"stop": ["\n\n###"]})
    for token in ids_of("a\n\n"):
        sidecar.engine.step((admit.id, [token], RUNNING))
    sidecar.engine.step((admit.id, [EOS], STOP))
    rows = client.rows(7)
    assert [row.text for row in rows if row.text] == ["a", "\n\n"]
    assert (rows[-1].text, rows[-1].finish, rows[-1].tokens) == ("\n\n", STOP, [EOS])


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "aZ")])
def test_a_stop_token_counts_but_its_text_is_left_out(
    sidecar: Sidecar, client: Client, include: bool, text: str
) -> None:
    [stop] = ids_of("Z")
    admit = admitted(sidecar, client, params={"stop_token_ids": [stop], "include_stop_str_in_output": include})
    assert admit.stop_token_ids == [EOS, stop]
    sidecar.engine.step((admit.id, ids_of("a"), RUNNING))
    sidecar.engine.step((admit.id, [stop], STOP))
    rows = client.rows(7)
    assert "".join(row.text for row in rows) == text
    assert [row.tokens for row in rows] == [ids_of("a"), [stop]]
    receipt = rows[-1].receipt
    assert receipt is not None
    assert receipt.num_output_tokens == 2


def test_no_stop_string_is_honoured_before_min_tokens(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client, params={"stop": ["b"], "min_tokens": 2})
    for token in ids_of("b") * 2:
        sidecar.engine.step((admit.id, [token], RUNNING))
    sidecar.engine.step((admit.id, ids_of("b"), RUNNING))
    assert sidecar.engine.is_told_to_finish(STOP, admit.id)
    sidecar.engine.step((admit.id, [], STOP))
    assert "".join(row.text for row in client.rows(7)) == "bb"


# ── abort ──────────────────────────────────────────────────────────────────────────────


def test_an_aborted_request_is_forgotten_at_once(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client)
    client.send(Abort([7, 7, 12345]))
    assert sidecar.engine.is_told_to_finish(ABORT, admit.id)
    sidecar.engine.step((admit.id, ids_of("late"), LENGTH))
    assert client.hears_nothing()
    assert admitted(sidecar, client).id != admit.id


def test_a_request_aborted_while_it_is_tokenized_never_reaches_the_engine(sidecar: Sidecar, client: Client) -> None:
    client.submit(7, "the fox " * 30_000)
    client.send(Abort([7]))
    assert sidecar.engine.hears_nothing()
    assert admitted(sidecar, client)


def test_tokenizing_a_long_prompt_does_not_hold_up_other_streams(sidecar: Sidecar, client: Client) -> None:
    admit = admitted(sidecar, client)
    other = sidecar.client()
    other.submit(1, "the fox " * 400_000)  # a second of work or two
    for _ in range(20):
        sidecar.engine.step((admit.id, ids_of("a"), RUNNING))
        assert client.row().text == "a"
    assert not other.has_mail()
    assert "'text_input' is" in other.receive().message
    other.close()


# ── going on ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stop", [[], ["the end"], ["🦊!"]])
def test_a_request_goes_on_with_no_text_twice_and_none_missing(
    sidecar: Sidecar, client: Client, stop: list[str]
) -> None:
    ids = ids_of("then the 🦊 went <the e>, 你 the end")
    whole = TOKENIZER.decode(ids).split("the end")[0] if stop == ["the end"] else TOKENIZER.decode(ids)
    admit = admitted(sidecar, client, params={"stop": stop})
    for token in ids[:-1]:
        sidecar.engine.step((admit.id, [token], RUNNING))
    emitted = [client.row().text for _ in ids[:-1]]
    client.send(Abort([7]))
    assert sidecar.engine.is_told_to_finish(ABORT, admit.id)
    for cut in range(len(ids)):
        before = "".join(emitted[:cut])
        again = admitted(
            sidecar,
            client,
            params={"stop": stop},
            output_ids=column(ids[:cut], "<i4"),
            emitted_chars=len(before),
        )
        assert array(again.output_ids, "<i4").tolist() == ids[:cut]
        for token in ids[cut:-1]:
            sidecar.engine.step((again.id, [token], RUNNING))
        sidecar.engine.step((again.id, ids[-1:], LENGTH))
        rows = client.rows(7)
        assert before + "".join(row.text for row in rows) == whole
        assert [token for row in rows for token in row.tokens] == ids[cut:]
        receipt = rows[-1].receipt
        assert receipt is not None
        assert receipt.num_output_tokens == len(ids)


def test_text_that_was_released_but_not_delivered_is_sent_before_the_next_token(
    sidecar: Sidecar, client: Client
) -> None:
    admit = admitted(sidecar, client, output_ids=column(ids_of("Hello"), "<i4"), emitted_chars=2)
    row = client.row()
    assert (row.text, row.tokens, row.finish) == ("llo", [], RUNNING)
    sidecar.engine.step((admit.id, ids_of("!"), LENGTH))
    assert client.row().text == "!"


@pytest.mark.parametrize(
    ("params", "outputs", "text", "finish"),
    [
        ({"max_tokens": 3}, ids_of("abc"), "c", LENGTH),
        ({}, [*ids_of("abc"), EOS], "c", STOP),
        ({"stop": ["bc"]}, ids_of("abc"), "", STOP),
        ({"stop": ["c"]}, ids_of("abc"), "", STOP),
        ({"ignore_eos": True, "max_tokens": 4}, [*ids_of("abc"), EOS], "c", LENGTH),
    ],
)
def test_a_request_whose_end_was_not_heard_ends_without_the_engine(
    sidecar: Sidecar, client: Client, params: dict[str, Any], outputs: list[int], text: str, finish: int
) -> None:
    client.submit(7, params=params, output_ids=column(outputs, "<i4"), emitted_chars=2)
    row = client.row()
    assert (row.text, row.tokens, row.finish) == (text, [], finish)
    receipt = row.receipt
    assert receipt is not None
    assert (receipt.num_output_tokens, receipt.num_input_tokens) == (len(outputs), len(ids_of("the")))
    assert receipt.resumed
    assert sidecar.engine.hears_nothing()
    assert admitted(sidecar, client)
