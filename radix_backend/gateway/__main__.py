"""``python -m radix_backend.gateway CONFIG_JSON MODEL_DIR CLIENT_ADDRESS ENGINE_ADDRESS``: the gateway process."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import msgspec
import zmq

from radix_backend.config import EngineConfig
from radix_backend.gateway.chat import ChatTemplate
from radix_backend.gateway.model import read_model_info
from radix_backend.gateway.server import Gateway
from radix_backend.gateway.text import TextCodec
from radix_backend.process import Reporter, die_with_parent, fatal_on_user_error, setup_logging


def main() -> None:
    config_path, model_dir, client_address, engine_address = sys.argv[1:]
    die_with_parent()
    config = msgspec.json.decode(Path(config_path).read_bytes(), type=EngineConfig)
    setup_logging(config.log_level)
    reporter = Reporter()
    with fatal_on_user_error(reporter):
        reporter.phase("loading tokenizer")
        directory = Path(model_dir)
        model = read_model_info(directory, config)
        codec = TextCodec(directory)
        chat = ChatTemplate(directory)
    context = zmq.Context()
    doors_socket, engine_socket = context.socket(zmq.ROUTER), context.socket(zmq.PAIR)
    gateway = Gateway(config.identity(), model, codec, chat, doors_socket, engine_socket, reporter)
    engine_socket.set_hwm(0)  # never blocks: the engine reads at every step, and what is sent was admitted
    engine_socket.connect(engine_address)
    doors_socket.bind(client_address)
    signal.signal(signal.SIGTERM, lambda *_: gateway.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the supervisor decides
    reporter.ready()
    gateway.run()
    context.destroy(linger=0)
    Path(client_address.removeprefix("ipc://")).unlink(missing_ok=True)  # ZeroMQ leaves it


if __name__ == "__main__":
    main()
