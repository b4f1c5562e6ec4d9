"""A request in the gateway: from a door's `Submit` to the engine's `Admit`, and from tokens to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from radix_backend.errors import InvalidArgument
from radix_backend.gateway.doors import Door
from radix_backend.gateway.stop import StopMatcher
from radix_backend.gateway.text import Detokenizer, TextCodec, unless_utf8
from radix_backend.protocol import (
    LENGTH,
    RUNNING,
    STOP,
    Admit,
    Logprob,
    ModelInfo,
    Receipt,
    Submit,
    TokenLogprobs,
    array,
)
from radix_backend.sampling_params import SamplingParams
from radix_backend.validation import show

Ids = npt.NDArray[np.int32]

_INT64 = range(-(2**63), 2**63)


class Row(NamedTuple):
    """What some tokens of a request come to."""

    texts: list[str]  # released by each token that is kept; those after the one that completed a stop string are cut
    rest: str  # released by the end of the text, with no token here
    finish: int

    @property
    def text(self) -> str:
        return "".join(self.texts) + self.rest


class Request:
    """One request between its door and the engine."""

    __slots__ = (
        "_detokenizer",
        "_include_stop",
        "_matcher",
        "_min_tokens",
        "_skip_chars",
        "admitted",
        "client_id",
        "door",
        "id",
        "num_tokens",
        "stopping",
    )

    def __init__(self, id: int, door: Door, submit: Submit, codec: TextCodec) -> None:
        self.id = id  # the gateway's, known to the engine
        self.door = door
        self.client_id = submit.id
        self.num_tokens = 0  # outputs so far
        self.admitted = False  # the engine knows it
        self.stopping = False  # ended by a stop string; the engine's receipt is awaited
        params = submit.params
        self._detokenizer: Detokenizer = codec.detokenizer(params.skip_special_tokens)
        self._matcher = StopMatcher(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        self._skip_chars = submit.emitted_chars

    def advance(self, tokens: list[int], finish: int) -> Row | None:
        """Take what a step did; None if there is nothing to tell.

        With ``finish`` STOP the last token is a stop token, whose text is left out. A stop string in the text of a
        request that the engine thinks RUNNING makes it `stopping`; its end is told when the engine's receipt comes.
        """
        if self.stopping:
            return Row([], "", STOP) if finish != RUNNING else None
        texts = []
        spoken = len(tokens) - 1 if finish == STOP and not self._include_stop else len(tokens)
        for n, token in enumerate(tokens):
            self.num_tokens += 1
            texts.append(self._release(self._detokenizer.push(token)) if n < spoken else "")
            if self._matcher is not None and self._matcher.stopped:
                self.stopping = finish == RUNNING
                return Row(texts, "", RUNNING if self.stopping else STOP)
        if finish == RUNNING:
            return Row(texts, "", RUNNING)
        rest = self._release(self._detokenizer.flush())
        if self._matcher is not None:
            rest += self._unseen(self._matcher.flush())
            if self._matcher.stopped:
                finish = STOP
        if texts:  # what the end releases is the last token's
            texts[-1] += rest
            rest = ""
        return Row(texts, rest, finish)

    def own_bytes(self, tokens: Sequence[int], row: Row) -> list[bytes]:
        """Of the ``tokens`` that are kept in ``row``: they join to the text's UTF-8.

        With stop strings they are those of what each released: of a character whose beginning is told already, the end
        may be cut.
        """
        if self._matcher is not None:
            return [text.encode() for text in row.texts]
        kept = list(zip(tokens, row.texts, strict=False))
        if row.finish == STOP and not self._include_stop:
            return [*(self._detokenizer.own_bytes(*each) for each in kept[:-1]), b""]
        return [self._detokenizer.own_bytes(*each) for each in kept]

    def replay(self, admit: Admit) -> Row:
        """Take the outputs of a request that goes on. Its row has text only where the door has not had it all yet.

        A request that was at its end, of which the door did not hear, ends here.
        """
        outputs: list[int] = array(admit.output_ids, "<i4").tolist()
        finish = RUNNING
        if outputs and outputs[-1] in admit.stop_token_ids and len(outputs) > self._min_tokens:
            finish = STOP
        elif len(outputs) >= admit.params.max_tokens:
            finish = LENGTH
        row = self.advance(outputs, finish)
        assert row is not None
        return Row([], row.text, STOP if self.stopping else row.finish)

    def _release(self, piece: str) -> str:
        if self._matcher is not None and piece:
            piece = self._matcher.push(piece, honoured=self.num_tokens > self._min_tokens)
        return self._unseen(piece)

    def _unseen(self, text: str) -> str:
        """``text`` without what the door delivered before the request was submitted again."""
        if self._skip_chars:
            skipped = min(self._skip_chars, len(text))
            self._skip_chars -= skipped
            return text[skipped:]
        return text


def check(submit: Submit, model: ModelInfo) -> None:
    """What can be said before the prompt is tokenized. Raises InvalidArgument."""
    if submit.id not in _INT64:
        raise InvalidArgument(f"'id' is {submit.id}; accepted: 64-bit integers")
    given = [submit.text is not None, bool(submit.input_ids), bool(submit.messages)]
    if sum(given) != 1:
        raise InvalidArgument(
            f"exactly one of 'text_input', 'input_ids' and 'messages' is accepted; {sum(given)} are given"
        )
    if submit.params.seed is None:
        raise InvalidArgument("sampling parameter 'seed' is None; accepted: one that the client drew")
    if submit.params.n != 1:
        raise InvalidArgument(f"sampling parameter 'n' is {submit.params.n}; accepted: 1 a request, the client's part")
    if submit.emitted_chars < 0:
        raise InvalidArgument(f"'emitted_chars' is {submit.emitted_chars}; accepted: 0 or more")
    for name, data in (("input_ids", submit.input_ids), ("output_ids", submit.output_ids)):
        _check_ids(name, data, model)
    for name, tokens in (
        ("stop_token_ids", submit.params.stop_token_ids),
        ("logit_bias", submit.params.logit_bias),
    ):
        for token in tokens:
            if not 0 <= token < model.vocab_size:
                accepted = f"token ids from 0 to {model.vocab_size - 1}"
                raise InvalidArgument(f"sampling parameter {name!r} holds {token}; accepted: {accepted}")


def to_admit(id: int, submit: Submit, prompt: Ids, model: ModelInfo, codec: TextCodec) -> Admit:
    """``submit`` in the engine's terms. Raises InvalidArgument when the prompt is empty or too long."""
    name = "input_ids" if submit.input_ids else "messages" if submit.messages else "text_input"
    prompt = _truncate(prompt, submit.params, model)
    room = model.context_len - len(prompt)
    if not len(prompt) or room < 1:
        accepted = f"1 to {model.context_len - 1} (the context of {model.context_len}, less one to generate)"
        raise InvalidArgument(f"{name!r} is {len(prompt)} tokens long; accepted: {accepted}")
    if not submit.input_ids:
        _check_ids(name, prompt.tobytes(), model)  # a tokenizer may know tokens that the model has no embedding for
    params = submit.params
    stop_token_ids = set(params.stop_token_ids)
    if not params.ignore_eos:
        stop_token_ids.update(model.eos_token_ids)
    max_tokens = min(params.max_tokens, room)
    return Admit(
        id=id,
        input_ids=prompt.tobytes(),
        params=msgspec.structs.replace(
            params,
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
            top_k=min(params.top_k, model.vocab_size),
        ),
        stop_token_ids=sorted(stop_token_ids),
        priority=submit.priority,
        output_ids=submit.output_ids,
        bad_words=[ids for word in params.bad_words for ids in codec.spellings(word)],
    )


def _truncate(prompt: Ids, params: SamplingParams, model: ModelInfo) -> Ids:
    count = params.truncate_prompt_tokens
    if count is None:
        return prompt
    if count < 0:
        count = max(model.context_len - params.max_tokens, 1)
    return prompt[-count:]


def logprob_rows(
    scores: Sequence[TokenLogprobs], codec: TextCodec, texts: Sequence[str] = (), data: Sequence[bytes] = ()
) -> list[list[Logprob]]:
    """For each token itself, then the likeliest. If they were generated: ``texts`` are what the tokens released,
    ``data`` their `Request.own_bytes`."""
    rows = []
    for n, token in enumerate(scores):
        ids, values = array(token.token_ids, "<i4").tolist(), array(token.logprobs, "<f4").tolist()
        shown = (texts[n], unless_utf8(data[n], texts[n])) if texts else codec.token(ids[0])
        row = [Logprob(ids[0], values[0], token.rank, *shown)]
        rank = 1
        for i in range(1, len(ids)):
            if values[i] < values[i - 1] or i == 1:
                rank = i
            row.append(Logprob(ids[i], values[i], rank, *codec.token(ids[i])))
        rows.append(row)
    return rows


def replayed_receipt(request: Request, admit: Admit) -> Receipt:
    """Of a request that had ended before it was submitted again: the engine never saw it."""
    return Receipt(
        num_input_tokens=len(admit.input_ids) // 4,
        num_output_tokens=request.num_tokens,
        cached_tokens=0,
        queue_ms=0.0,
        prefill_ms=0.0,
        decode_ms=0.0,
        retractions=0,
        resumed=True,
    )


def _check_ids(name: str, data: bytes, model: ModelInfo) -> None:
    if len(data) % 4:
        raise InvalidArgument(f"{name!r} is {len(data)} bytes long; accepted: whole 32-bit integers")
    ids = array(data, "<i4")
    wrong = ids[(ids < 0) | (ids >= model.vocab_size)]
    if wrong.size:
        raise InvalidArgument(f"{name!r} holds {show(int(wrong[0]))}; accepted: 0 to {model.vocab_size - 1}")
