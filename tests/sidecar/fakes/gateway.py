"""Echoes prompts, a token a request every few milliseconds, without an engine."""

import sys
from itertools import islice

import msgspec
import scenario
import zmq

from radix_backend.protocol import (
    LENGTH,
    RUNNING,
    Abort,
    Admitted,
    ClientMessage,
    Detokenize,
    Hello,
    ModelInfo,
    Receipt,
    Refused,
    Rejected,
    RenderChat,
    Reply,
    Stats,
    Submit,
    Tokenize,
    Update,
    Welcome,
    array,
    column,
)
from radix_backend.sampling_params import MAX_N

config, directory, reporter = scenario.start("gateway")
router = zmq.Context().socket(zmq.ROUTER)
router.bind(sys.argv[3])
decode = msgspec.msgpack.Decoder(ClientMessage).decode
running = {}  # (client, id) → tokens still to come
reporter.ready()


def send(client, message):
    router.send_multipart([client, msgspec.msgpack.encode(message)])


def handle(client, message):
    if isinstance(message, Hello):
        refused = (directory / "gateway-refuses").exists()
        model = ModelInfo(config.model, 2048, 256, [0])
        send(client, Refused("the gateway is closed today") if refused else Welcome(model))
    elif isinstance(message, Submit):
        prompt = list(message.text.encode()) if message.text is not None else array(message.input_ids, "<i4").tolist()
        assert message.params.seed is not None
        assert message.params.n == 1
        with (directory / "seeds").open("a") as seeds:
            print(message.params.seed, file=seeds)
        if message.priority == 99 or (message.priority == 98 and message.id % MAX_N == 2):
            send(client, Rejected(message.id, "INVALID_ARG", f"priority {message.priority} is nobody's"))
        else:
            echo = prompt * (message.params.max_tokens // len(prompt) + 1)
            send(client, Admitted(message.id, len(prompt)))
            running[client, message.id] = echo[: message.params.max_tokens]
    elif isinstance(message, Abort):
        for request in message.ids:
            if running.pop((client, request), None) is not None:
                (directory / f"aborted-{request}").touch()
    elif isinstance(message, Tokenize):
        send(client, Reply(message.call, list(message.text.encode())))
    elif isinstance(message, Detokenize):
        send(client, Reply(message.call, bytes(message.ids).decode()))
    elif isinstance(message, RenderChat):
        if not message.messages:
            send(client, Reply(message.call, code="INVALID_ARG", message="no messages"))
        else:
            send(client, Reply(message.call, "".join(turn["content"] for turn in message.messages)))
    elif isinstance(message, Stats):
        send(client, Reply(message.call, {"num_requests_running": len(running)}))


def step():
    """One token for everybody: one Update a client, as a real gateway would send."""
    for client in {client for client, _ in running}:
        rows = [(request, left) for (owner, request), left in running.items() if owner == client]
        send(
            client,
            Update(
                ids=column([request for request, _ in rows], "<i8"),
                counts=column([1] * len(rows), "<i4"),
                finish=column([LENGTH if len(left) == 1 else RUNNING for _, left in rows], "u1"),
                tokens=column([left[0] for _, left in rows], "<i4"),
                texts=[chr(left[0]) for _, left in rows],
                receipts=[Receipt(3, 4, 0, 0.0, 0.0, 0.0, 0, False) for _, left in rows if len(left) == 1],
            ),
        )
        for request, left in rows:
            running[client, request] = list(islice(left, 1, None))
            if not running[client, request]:
                del running[client, request]


while True:
    reporter.progress()
    if router.poll(5 if running else 100):
        client, data = router.recv_multipart()
        handle(client, decode(data))
    else:
        step()
