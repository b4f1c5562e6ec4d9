"""The conversation of `radix-backend chat`: what is typed, what is answered, and commands about both."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from radix_backend.cli.chat_doors import Door, Figures, Messages
from radix_backend.config import radix_home
from radix_backend.errors import InvalidArgument, RadixError
from radix_backend.sampling_params import SamplingParams
from radix_backend.validation import show

_DEFAULTS = ("max_tokens=1024", "temperature=0.7")
_KEYS = "Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D ends the conversation."


class Saved(msgspec.Struct, forbid_unknown_fields=True):
    """A conversation in a file."""

    system: str
    params: dict[str, Any]
    messages: Messages


class ChatSession:
    """Reads lines from a person, or from a pipe, until they end."""

    def __init__(self, door: Door, system: str, settings: Sequence[str]) -> None:
        """``settings`` are sampling parameters, "name=value". Raises InvalidArgument."""
        self._door = door
        self._system = system
        self._params: dict[str, Any] = {}
        self._messages: Messages = []  # without the system's
        self._console = Console(stderr=True, highlight=False)
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("this list", self._help),
            "/reset": ("forget what was said", self._reset),
            "/retry": ("answer the last question again", self._retry),
            "/system": ("TEXT: instructions that precede the conversation; without a text, none", self._set_system),
            "/set": ("NAME=VALUE: change a sampling parameter; alone, show them", self._set),
            "/save": ("FILE: write the conversation there, as JSON", self._save),
            "/load": ("FILE: go on with a conversation that was saved", self._load),
            "/quit": ("end the conversation", self._quit),
        }
        for setting in (*_DEFAULTS, *settings):
            self._change(setting)

    def run(self) -> None:
        """Raises RadixError for what fails in a pipe; a person is told and may go on."""
        interactive = sys.stdin.isatty()
        if interactive:
            self._note(f"{self._door.name} (/help lists commands)")
        for line in _typed(list(self._commands)) if interactive else map(str.strip, sys.stdin):
            try:
                self._take(line)
            except _Quit:
                return
            except RadixError as error:
                if not interactive:
                    raise
                self._console.print(str(error), style="red", markup=False, soft_wrap=True)

    def _take(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command in self._commands:
            _help, run = self._commands[command]
            run(argument.strip())
        elif line.startswith("/"):
            raise InvalidArgument(f"unknown command {show(command)}; accepted: {', '.join(self._commands)}")
        elif line:
            self._answer(line)

    def _answer(self, question: str) -> None:
        """Ask, show the answer as it comes, and remember both. A question that fails is not remembered."""
        asked = [*self._messages, {"role": "user", "content": question}]
        system = [{"role": "system", "content": self._system}] if self._system else []
        answer = ""
        started = time.monotonic()
        first = 0.0
        num_pieces = 0
        figures: Figures | None = None
        with closing(self._door.ask(system + asked, self._params)) as pieces:
            try:
                for piece in pieces:
                    if isinstance(piece, Figures):
                        figures = piece
                    elif piece:
                        first = first or time.monotonic() - started
                        num_pieces += 1
                        answer += piece
                        print(piece, end="", flush=True)
            except KeyboardInterrupt:
                answer += "\n"
            finally:
                if answer:
                    print(flush=True)
        self._messages = [*asked, {"role": "assistant", "content": answer.rstrip("\n")}]
        seconds = time.monotonic() - started - first if num_pieces > 1 else None
        self._note("stopped" if figures is None else _spell(figures, first, seconds))

    # ── commands ──────────────────────────────────────────────────────────────────────

    def _help(self, _: str) -> None:
        for name, (text, _run) in self._commands.items():
            self._note(f"{name:8} {text}")
        self._note(_KEYS)

    def _reset(self, _: str) -> None:
        self._messages = []
        self._note("the conversation begins anew")

    def _retry(self, _: str) -> None:
        if not self._messages:
            raise InvalidArgument("'/retry' finds no question; accepted: after one was asked")
        *self._messages, question, _answer = self._messages
        self._answer(question["content"])

    def _set_system(self, text: str) -> None:
        self._system = text
        self._note(f"instructions: {text}" if text else "no instructions")

    def _set(self, setting: str) -> None:
        if setting:
            self._change(setting)
        self._note(" ".join(f"{name}={json.dumps(value)}" for name, value in self._params.items()))

    def _change(self, setting: str) -> None:
        name, separator, value = setting.partition("=")
        if not separator:
            raise InvalidArgument(f"{show(setting)} is no sampling parameter; accepted: NAME=VALUE")
        params = SamplingParams.parse(self._params | {name: value})
        self._params = self._params | {name: getattr(params, name)}

    def _save(self, file: str) -> None:
        content = msgspec.json.encode(Saved(self._system, self._params, self._messages))
        try:
            Path(file).expanduser().write_bytes(msgspec.json.format(content, indent=1) + b"\n")
        except OSError as error:
            raise InvalidArgument(f"{show(file)} cannot be written: {error.strerror}") from None
        self._note(f"{len(self._messages)} messages saved")

    def _load(self, file: str) -> None:
        try:
            saved = msgspec.json.decode(Path(file).expanduser().read_bytes(), type=Saved)
        except OSError as error:
            raise InvalidArgument(f"{show(file)} cannot be read: {error.strerror}") from None
        except msgspec.DecodeError as error:
            raise InvalidArgument(f"{show(file)} is no saved conversation: {error}") from None
        self._system, self._params, self._messages = saved.system, saved.params, saved.messages
        self._note(f"{len(self._messages)} messages loaded")

    def _quit(self, _: str) -> None:
        raise _Quit

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, soft_wrap=True)


class _Quit(Exception):
    pass


def _spell(figures: Figures, first: float, seconds: float | None) -> str:
    """``first`` is when the text began, ``seconds`` how long it went on: None where it came in one piece."""
    rate = f", {(figures.num_output_tokens - 1) / seconds:.0f} tok/s" if seconds else ""
    cached = "" if figures.cached_tokens is None else f" ({figures.cached_tokens} cached)"
    tokens = f"{figures.num_input_tokens} tokens{cached} + {figures.num_output_tokens}"
    return f"{tokens}, first after {1000 * first:.0f} ms{rate}, {figures.finish_reason}"


def _typed(commands: list[str]) -> Iterator[str]:
    """What a person types, with history, completion of commands, and Ctrl-C to begin a line anew."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        "> ", history=_history(), completer=WordCompleter(commands, sentence=True), key_bindings=keys
    )
    while True:
        try:
            line = session.prompt()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        yield line.strip()


def _history() -> History:
    path = radix_home() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:  # no home of one's own: remembered until the end
        return InMemoryHistory()
    return FileHistory(path)
