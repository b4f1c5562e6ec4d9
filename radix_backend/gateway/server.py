"""The gateway's loop: doors on one side (ROUTER), the engine on the other (PAIR)."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from radix_backend.errors import InvalidArgument, RadixError, from_code
from radix_backend.gateway.chat import ChatTemplate
from radix_backend.gateway.doors import Door, Doors, Rows
from radix_backend.gateway.offload import Offload
from radix_backend.gateway.requests import Request, check, logprob_rows, replayed_receipt, to_admit
from radix_backend.gateway.text import TextCodec
from radix_backend.process import Reporter
from radix_backend.protocol import (
    ABORT,
    PROTOCOL_VERSION,
    RUNNING,
    STOP,
    Abort,
    Admitted,
    ClientMessage,
    Detokenize,
    EngineMessage,
    EngineProfile,
    EngineReply,
    EngineStats,
    Finish,
    Hello,
    Message,
    ModelInfo,
    Profile,
    PromptLogprobs,
    PromptScores,
    Rejected,
    RenderChat,
    Reply,
    Stats,
    Step,
    Submit,
    Tokenize,
    Welcome,
    array,
)
from radix_backend.validation import show

log = logging.getLogger(__name__)

PROBE_SECONDS = 0.25  # between two looks whether busy doors are still there
_IDLE_SECONDS = 1.0  # the longest sleep
_BACKLOG_SECONDS = 0.01  # between two attempts to send what a slow door did not take
_BURST = 64  # client messages handled before the engine's are looked at again
_LONG_TEXT = 2048  # characters (or tokens): from here on, tokenizing takes about as long as handling a step


class Gateway:
    """Serves doors until `stop`. One thread does everything but tokenizing long texts."""

    def __init__(
        self,
        identity: str,
        model: ModelInfo,
        codec: TextCodec,
        chat: ChatTemplate,
        doors_socket: zmq.Socket[bytes],
        engine_socket: zmq.Socket[bytes],
        reporter: Reporter,
    ) -> None:
        """``identity`` is the engine's (EngineConfig.identity). ``doors_socket`` (ROUTER) is not bound yet."""
        self._identity = identity
        self._model = model
        self._codec = codec
        self._chat = chat
        self._doors_socket = doors_socket
        self._engine_socket = engine_socket
        self._reporter = reporter
        self._doors = Doors(doors_socket, self._on_lost)
        self._offload = Offload()
        self._requests: dict[int, Request] = {}  # by the gateway's id
        self._calls: dict[int, tuple[Door, int]] = {}  # what the engine was asked → who asked, the client's call
        self._ids = itertools.count(1)
        self._from_door = msgspec.msgpack.Decoder(ClientMessage)
        self._from_engine = msgspec.msgpack.Decoder(EngineMessage)
        self._encoder = msgspec.msgpack.Encoder()
        self._stopping = False

    def stop(self) -> None:
        """Make `run` return at once (from a signal handler)."""
        self._stopping = True
        self._offload.wake()

    def run(self) -> None:
        poller = zmq.Poller()
        for source in (self._doors_socket, self._engine_socket, self._offload.wake_fd):
            poller.register(source, zmq.POLLIN)
        next_probe = time.monotonic()
        timeout = 0.0
        while not self._stopping:
            poller.poll(round(timeout * 1000))
            self._receive_steps()
            self._offload.finish()
            self._receive_from_doors()
            if time.monotonic() >= next_probe:
                self._doors.probe()
                next_probe = time.monotonic() + PROBE_SECONDS
            if not self._doors.drain():
                timeout = _BACKLOG_SECONDS
            else:
                timeout = PROBE_SECONDS if self._doors.busy else _IDLE_SECONDS
            self._reporter.progress()

    # ── doors ──────────────────────────────────────────────────────────────────────────────

    def _receive_from_doors(self) -> None:
        for _ in range(_BURST):
            try:
                frames = self._doors_socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._on_client(frames[0], b"".join(frames[1:]))

    def _on_client(self, identity: bytes, data: bytes) -> None:
        door = self._doors.get(identity)
        try:
            message = self._from_door.decode(data)
        except Exception as error:  # not only msgspec's own: bad UTF-8, too deep a nesting, our InvalidArgument
            self._on_unreadable(identity, door, data, error)
            return
        if isinstance(message, Hello):
            self._on_hello(identity, message)
        elif door is None:
            self._doors.refuse(identity, "the first message of a client is Hello")
        elif isinstance(message, Submit):
            self._on_submit(door, message)
        elif isinstance(message, Abort):
            self._abort([self._requests[door.requests[id]] for id in set(message.ids) if id in door.requests])
        elif isinstance(message, Stats):
            call = next(self._ids)
            self._calls[call] = (door, message.call)
            self._to_engine(EngineStats(call, message.audit))
        elif isinstance(message, Profile):
            call = next(self._ids)
            self._calls[call] = (door, message.call)
            self._to_engine(EngineProfile(call, message.start))
        else:
            self._on_call(door, message)

    def _on_unreadable(self, identity: bytes, door: Door | None, data: bytes, error: Exception) -> None:
        """Ill-typed fields are the fault of one request or call; anything else, of a client that must not go on."""
        try:
            tag, id, *_ = msgspec.msgpack.decode(data)
        except Exception:
            tag = id = None
        code = error.code if isinstance(error, RadixError) else InvalidArgument.code
        if door is None or not isinstance(id, int):
            self._doors.refuse(identity, f"unreadable message: {error}")
        elif tag == "Submit":
            self._doors.send(door, Rejected(id, code, str(error)))
        elif tag in ("RenderChat", "Tokenize", "Detokenize", "Stats", "Profile"):
            self._doors.send(door, Reply(id, code=code, message=str(error)))
        else:
            self._doors.refuse(identity, f"unreadable message: {error}")

    def _on_hello(self, identity: bytes, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            self._doors.refuse(
                identity, f"client speaks protocol {show(hello.version)}; accepted: {PROTOCOL_VERSION!r}"
            )
        elif hello.identity not in ("", self._identity):
            self._doors.refuse(
                identity,
                f"client wants engine {show(hello.identity)}; this is {self._identity!r} (model {self._model.name})",
            )
        else:
            self._doors.send(self._doors.open(identity), Welcome(self._model))

    # ── requests ──────────────────────────────────────────────────────────────────────────────

    def _on_submit(self, door: Door, submit: Submit) -> None:
        if submit.id in door.requests:
            self._abort([self._requests[door.requests[submit.id]]])
            self._reject(door, submit.id, InvalidArgument(f"'id' is {submit.id}; accepted: one that is not running"))
            return
        try:
            check(submit, self._model)
        except InvalidArgument as error:
            self._reject(door, submit.id, error)
            return
        request = Request(next(self._ids), door, submit, self._codec)
        self._requests[request.id] = request
        door.requests[submit.id] = request.id
        if submit.input_ids:
            self._admit(request, submit, array(submit.input_ids, "<i4"))
        else:
            self._tokenize(request, submit)

    def _tokenize(self, request: Request, submit: Submit) -> None:
        def job() -> Callable[[], None]:
            try:
                prompt = self._prompt(submit)
            except InvalidArgument as error:
                return partial(self._refuse, request, error)
            return partial(self._admit, request, submit, prompt)

        self._run(job, len(submit.text or "") + sum(len(str(message)) for message in submit.messages))

    def _prompt(self, submit: Submit) -> npt.NDArray[np.int32]:
        if submit.text is not None:
            return self._codec.encode(submit.text, submit.add_special_tokens)
        text = self._chat.render(submit.messages, True, submit.chat_template_kwargs)
        return self._codec.encode(text, add_special_tokens=False)

    def _admit(self, request: Request, submit: Submit, prompt: npt.NDArray[np.int32]) -> None:
        if request.id not in self._requests:
            return  # it was aborted while it was tokenized
        try:
            admit = to_admit(request.id, submit, prompt, self._model, self._codec)
        except InvalidArgument as error:
            self._refuse(request, error)
            return
        shown = admit.input_ids if submit.wants_input_ids else b""
        self._doors.send(request.door, Admitted(request.client_id, len(admit.input_ids) // 4, shown))
        row = request.replay(admit)
        receipt = None
        if row.finish == RUNNING:
            request.admitted = True
            self._to_engine(admit)
        else:
            receipt = replayed_receipt(request, admit)
            self._forget(request)
        if receipt or row.text:
            rows = Rows()
            rows.add(request.client_id, [], row.text, row.finish, receipt)
            self._doors.send(request.door, rows.update())

    def _on_step(self, step: Step) -> None:
        ids, counts, finishes = array(step.ids, "<i8"), array(step.counts, "<i4"), array(step.finish, "u1")
        tokens: list[int] = array(step.tokens, "<i4").tolist()
        receipts = iter(step.receipts)
        logprobs = step.logprobs
        end = 0
        updates: dict[Door, Rows] = {}
        stopped = []
        for id, count, finish in zip(ids.tolist(), counts.tolist(), finishes.tolist(), strict=True):
            start, end = end, end + count
            receipt = next(receipts) if finish != RUNNING else None
            request = self._requests.get(id)
            if request is None:
                continue  # it ended before the engine knew
            was_stopping = request.stopping
            row = request.advance(tokens[start:end], finish)
            if row is None:
                continue
            if request.stopping and not was_stopping:
                stopped.append(id)
            if receipt is not None:
                self._forget(request)
                if receipt.num_output_tokens != request.num_tokens:  # the engine went on until it heard of the stop
                    receipt = msgspec.structs.replace(receipt, num_output_tokens=request.num_tokens)
            rows = updates.get(request.door)
            if rows is None:
                rows = updates[request.door] = Rows()
            kept = start + len(row.texts)
            scores = [score for score in logprobs[start:kept] if score is not None]
            theirs = None
            if scores:
                theirs = logprob_rows(scores, self._codec, row.texts, request.own_bytes(tokens[start:kept], row))
            rows.add(request.client_id, tokens[start:kept], row.text, row.finish, receipt, theirs)
        if stopped:
            self._to_engine(Finish(stopped, STOP))
        for door, rows in updates.items():
            self._doors.send(door, rows.update())

    def _on_prompt_scores(self, scores: PromptScores) -> None:
        if request := self._requests.get(scores.id):
            tokens = logprob_rows(scores.tokens, self._codec)
            self._doors.send(request.door, PromptLogprobs(request.client_id, tokens))

    def _abort(self, requests: list[Request]) -> None:
        """End requests of which nobody wants to hear any more."""
        for request in requests:
            self._forget(request)
        if admitted := [request.id for request in requests if request.admitted]:
            self._to_engine(Finish(admitted, ABORT))

    def _on_lost(self, door: Door) -> None:
        self._abort([self._requests[id] for id in door.requests.values()])

    def _forget(self, request: Request) -> None:
        del self._requests[request.id]
        del request.door.requests[request.client_id]

    def _refuse(self, request: Request, error: RadixError) -> None:
        if request.id in self._requests:
            self._forget(request)
            self._reject(request.door, request.client_id, error)

    def _reject(self, door: Door, client_id: int, error: RadixError) -> None:
        self._doors.send(door, Rejected(client_id, error.code, str(error)))

    # ── calls ──────────────────────────────────────────────────────────────────────────────

    def _on_call(self, door: Door, message: RenderChat | Tokenize | Detokenize) -> None:
        def job() -> Callable[[], None]:
            try:
                reply = Reply(message.call, self._answer(message))
            except InvalidArgument as error:
                reply = Reply(message.call, code=error.code, message=str(error))
            return partial(self._doors.send, door, reply)

        size = 0
        if isinstance(message, Tokenize):
            size = len(message.text)
        elif isinstance(message, Detokenize):
            size = len(message.ids)
        self._run(job, size)

    def _answer(self, message: RenderChat | Tokenize | Detokenize) -> str | list[int] | list[str]:
        if isinstance(message, RenderChat):
            return self._chat.render(message.messages, message.add_generation_prompt, message.variables)
        if isinstance(message, Tokenize):
            ids: list[int] = self._codec.encode(message.text, message.add_special_tokens).tolist()
            return ids
        for token in message.ids:
            if not 0 <= token < self._model.vocab_size:
                raise InvalidArgument(f"'ids' holds {token}; accepted: 0 to {self._model.vocab_size - 1}")
        return self._codec.pieces(message.ids) if message.pieces else self._codec.decode(message.ids)

    def _run(self, job: Callable[[], Callable[[], None]], size: int) -> None:
        if size < _LONG_TEXT:
            job()()
        else:
            self._offload.start(job)

    # ── engine ──────────────────────────────────────────────────────────────────────────────

    def _receive_steps(self) -> None:
        while True:
            try:
                data = self._engine_socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            message = self._from_engine.decode(data)
            if isinstance(message, Step):
                self._on_step(message)
            elif isinstance(message, PromptScores):
                self._on_prompt_scores(message)
            elif isinstance(message, EngineReply):
                door, call = self._calls.pop(message.call)
                self._doors.send(door, Reply(call, message.value, message.code, message.message))
            elif message.id in self._requests:
                self._refuse(self._requests[message.id], from_code(message.code, message.message))

    def _to_engine(self, message: Message) -> None:
        self._engine_socket.send(self._encoder.encode(message))
