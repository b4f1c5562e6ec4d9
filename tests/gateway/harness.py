"""A real gateway process, with the test in the places of the engine and of the doors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from radix_backend.config import EngineConfig
from radix_backend.protocol import (
    PROTOCOL_VERSION,
    RUNNING,
    Admit,
    Admitted,
    EngineCommand,
    Finish,
    GatewayMessage,
    Hello,
    Logprob,
    Message,
    Receipt,
    Report,
    Step,
    Submit,
    TokenLogprobs,
    Update,
    Welcome,
    array,
    column,
)
from radix_backend.sampling_params import SamplingParams

TIMEOUT_MS = 20_000  # for what must happen
QUIET_MS = 300  # for what must not


class Row(msgspec.Struct):
    """One request's part of an `Update`."""

    id: int
    tokens: list[int]
    text: str
    finish: int = RUNNING
    receipt: Receipt | None = None
    logprobs: list[list[Logprob]] = []


class Engine:
    """The engine's end of the pair."""

    def __init__(self, context: zmq.Context[Any], address: str) -> None:
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(address)

    def receive(self, kind: type[Message] = Admit) -> Any:
        message = self._next()
        assert isinstance(message, kind), message
        return message

    def skip_to(self, kind: type[Message]) -> None:
        while not isinstance(self._next(), kind):
            pass

    def is_told_to_finish(self, reason: int, *ids: int) -> bool:
        finish = self.receive(Finish)
        return finish.reason == reason and sorted(finish.ids) == sorted(ids)

    def hears_nothing(self) -> bool:
        return not self._socket.poll(QUIET_MS)

    def send(self, message: Message) -> None:
        self._socket.send(msgspec.msgpack.encode(message))

    def _next(self) -> Message:
        assert self._socket.poll(TIMEOUT_MS), "the gateway sent nothing"
        message: Message = msgspec.msgpack.decode(self._socket.recv(), type=EngineCommand)
        return message

    def step(self, *rows: tuple[int, Iterable[int], int], logprobs: Sequence[TokenLogprobs | None] = ()) -> None:
        """``rows``: id, tokens, finish. Receipts are made up: num_output_tokens 1000, for the gateway to correct."""
        columns = [(id, list(tokens), finish) for id, tokens, finish in rows]
        self.send(
            Step(
                ids=column([id for id, _, _ in columns], "<i8"),
                counts=column([len(tokens) for _, tokens, _ in columns], "<i4"),
                finish=column([finish for _, _, finish in columns], "u1"),
                tokens=column([token for _, tokens, _ in columns for token in tokens], "<i4"),
                receipts=[
                    Receipt(10 + id, 1000, 4, 1.0, 2.0, 3.0, 0, False) for id, _, finish in columns if finish != RUNNING
                ],
                logprobs=list(logprobs),
            )
        )


class Client:
    """A door: a DEALER that said Hello."""

    def __init__(
        self, context: zmq.Context[Any], address: str, hello: Message | None = None, rcvhwm: int = 1000
    ) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.rcvhwm = rcvhwm
        self._socket.linger = 0
        self._socket.connect(address)
        self._rows: list[Row] = []
        self.prompt_lengths: dict[int, int] = {}  # of the requests that were admitted
        self.send(hello or Hello(PROTOCOL_VERSION, ""))
        self.greeting = self.receive()

    def send(self, message: Message) -> None:
        self.send_bytes(msgspec.msgpack.encode(message))

    def send_bytes(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def submit(self, id: int, text: str | None = "the", **fields: Any) -> None:
        """Written field by field, so that it may be wrong."""
        params = {"seed": 1, "max_tokens": 100} | fields.pop("params", {})
        usual = msgspec.msgpack.decode(msgspec.msgpack.encode(Submit(id, SamplingParams())))[1:]
        given = {"id": id, "params": params, "text": text} | fields
        names = (field.name for field in msgspec.structs.fields(Submit))
        message = [given.get(name, value) for name, value in zip(names, usual, strict=True)]
        self._socket.send(msgspec.msgpack.encode(["Submit", *message]))

    def receive(self, probes: bool = False) -> Any:
        """The next message but for `Admitted`; ``probes`` (empty updates) are passed over unless asked for."""
        while True:
            assert self._socket.poll(TIMEOUT_MS), "the gateway sent nothing"
            message = msgspec.msgpack.decode(self._socket.recv(), type=GatewayMessage)
            if isinstance(message, Admitted):
                self.prompt_lengths[message.id] = message.num_input_tokens
            elif probes or not isinstance(message, Update) or message.ids:
                return message

    def row(self) -> Row:
        """The next row of an update."""
        if not self._rows:
            update = self.receive()
            assert isinstance(update, Update), update
            tokens = iter(array(update.tokens, "<i4").tolist())
            receipts = iter(update.receipts)
            columns = (array(update.ids, "<i8"), array(update.counts, "<i4"), array(update.finish, "u1"))
            logprobs = update.logprobs or [[]] * len(update.texts)
            for id, count, finish, text, theirs in zip(
                *(c.tolist() for c in columns), update.texts, logprobs, strict=True
            ):
                receipt = next(receipts) if finish != RUNNING else None
                self._rows.append(Row(id, [next(tokens) for _ in range(count)], text, finish, receipt, theirs))
            assert next(tokens, None) is None
            assert next(receipts, None) is None
        return self._rows.pop(0)

    def rows(self, id: int) -> list[Row]:
        """All rows up to the one that finishes ``id``."""
        rows = [self.row()]
        while rows[-1].id != id or rows[-1].finish == RUNNING:
            rows.append(self.row())
        return rows

    def has_mail(self) -> bool:
        return bool(self._socket.poll(0))

    def hears_nothing(self) -> bool:
        while self._socket.poll(QUIET_MS):
            message = msgspec.msgpack.decode(self._socket.recv(), type=GatewayMessage)
            if not isinstance(message, Admitted) and (not isinstance(message, Update) or message.ids):
                return False
        return True

    def close(self) -> None:
        self._socket.close()


class Sidecar:
    """A gateway process that serves ``model_dir``."""

    def __init__(self, directory: Path, model_dir: Path, **settings: Any) -> None:
        directory.mkdir(exist_ok=True)
        self.config = EngineConfig(model=str(model_dir), **settings)
        (directory / "config.json").write_bytes(msgspec.json.encode(self.config))
        self.address = f"ipc://{directory}/doors"
        self.context: zmq.Context[Any] = zmq.Context()
        self.engine = Engine(self.context, f"ipc://{directory}/engine")
        reports, write_end = os.pipe()
        command = [sys.executable, "-m", "radix_backend.gateway", str(directory / "config.json"), str(model_dir)]
        self.process = subprocess.Popen(
            [*command, self.address, f"ipc://{directory}/engine"],
            cwd="/",
            env={**os.environ, "RADIX_REPORT_FD": str(write_end)},
            pass_fds=[write_end],
        )
        os.close(write_end)
        self._reports = os.fdopen(reports, "rb")

    def report(self, phase: str) -> Report:
        """The first report of this phase."""
        for line in self._reports:
            report = msgspec.json.decode(line, type=Report)
            if report.phase == phase:
                return report
        raise AssertionError(f"the gateway ended without saying {phase!r}")

    def client(self, hello: Message | None = None, rcvhwm: int = 1000) -> Client:
        client = Client(self.context, self.address, hello, rcvhwm)
        assert hello or isinstance(client.greeting, Welcome)
        return client

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self._reports.close()
            self.context.destroy(linger=0)
