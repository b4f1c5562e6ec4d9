"""``radix-backend chat``: a conversation in the terminal, with any running server or an engine of its own."""

from __future__ import annotations

import argparse
from typing import Any

from radix_backend.cli.extras import extra
from radix_backend.cli.sidecar import add_sidecar_settings, sidecar_config

_EPILOG = """\
examples:
  radix-backend chat                              the engine of `radix-backend serve`, or one started for the purpose
  radix-backend chat --model ./Qwen3-0.6B         with another model
  radix-backend chat 127.0.0.1:8001               a Triton server: its gRPC port,
  radix-backend chat http://127.0.0.1:8000        or its HTTP port
  radix-backend chat http://127.0.0.1:9000/v1     any server with OpenAI's API; OPENAI_API_KEY holds the key
  echo "What is radix sort?" | radix-backend chat --system "Answer in one sentence."

/help, in the conversation, lists its commands. Ctrl-C stops an answer, Ctrl-D ends the conversation.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Hold a conversation. Answers go to standard output, everything else to standard error.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", nargs="?", default="", help="of a running server, see below (default: the engine alone)")
    parser.add_argument(
        "--served-model", default="", metavar="NAME", help="of a server at URL (default: radix, or its first)"
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="instructions that precede the conversation")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a sampling parameter, such as temperature=0 (default: max_tokens=1024 temperature=0.7)",
    )
    add_sidecar_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with extra("cli"):
        from radix_backend.cli.chat_session import ChatSession
    from radix_backend.cli.chat_doors import EngineDoor, find_door
    from radix_backend.llm import LLM

    if arguments.url:
        ChatSession(find_door(arguments.url, arguments.served_model), arguments.system, arguments.set).run()
    else:
        with LLM(sidecar_config(arguments)) as llm:
            ChatSession(EngineDoor(llm), arguments.system, arguments.set).run()
    return 0
