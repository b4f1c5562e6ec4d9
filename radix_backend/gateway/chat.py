"""Chat templates: from a conversation to the text of a prompt, as transformers' `apply_chat_template` renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from radix_backend.errors import InvalidArgument
from radix_backend.gateway.model import read_json
from radix_backend.validation import show

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OURS = ("messages", "add_generation_prompt")


class ChatTemplate:
    """The templates of a model directory: one, or several by name ("default", "tool_use")."""

    def __init__(self, model_dir: Path) -> None:
        """Raises InvalidArgument when a file is not what it should be; no template at all is no error yet."""
        config = read_json(model_dir / "tokenizer_config.json") or {}
        self._special_tokens = _special_tokens(read_json(model_dir / "special_tokens_map.json") or {})
        self._special_tokens.update(_special_tokens(config))
        self._sources = _sources(model_dir, config.get("chat_template"))
        self._compiled: dict[str, jinja2.Template] = {}
        self._environment = _environment()

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, special tokens included: encode it without adding any.

        ``variables`` reach the template by name (``tools``, ``enable_thinking``, …). Raises InvalidArgument when the
        model has no template, or when the template refuses or cannot digest the conversation.
        """
        if not messages:
            raise InvalidArgument("'messages' is empty; accepted: at least one message")
        for message in messages:
            if not isinstance(message.get("role"), str):
                accepted = "objects with a string 'role' and a 'content'"
                raise InvalidArgument(f"'messages' holds {show(message)}; accepted: {accepted}")
        variables = {"tools": None, "documents": None, **(variables or {})}
        for name in _OURS:
            if name in variables:
                raise InvalidArgument(f"chat template variable {name!r} is already taken; accepted: any other name")
        template = self._template("tool_use" if variables["tools"] is not None else "default")
        values = self._special_tokens | variables
        try:
            return template.render(values, messages=messages, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # whatever the template's code raises is about this conversation
            raise InvalidArgument(f"the model's chat template does not accept 'messages': {error}") from None

    def _template(self, name: str) -> jinja2.Template:
        if not self._sources:
            raise InvalidArgument("the model has no chat template; accepted: plain prompts ('text_input', 'input_ids')")
        if name not in self._sources:
            name = "default"
        if name not in self._sources:
            raise InvalidArgument(f"the model has no default chat template, only: {', '.join(sorted(self._sources))}")
        if name not in self._compiled:
            try:
                self._compiled[name] = self._environment.from_string(self._sources[name])
            except jinja2.TemplateError as error:
                raise InvalidArgument(f"the model's chat template {name!r} is broken: {error}") from None
        return self._compiled[name]


def _sources(model_dir: Path, configured: object) -> dict[str, str]:
    """Templates by name. Files beat tokenizer_config.json, as in transformers."""
    sources: dict[str, str] = {}
    if isinstance(configured, str):
        sources["default"] = configured
    elif isinstance(configured, list):
        sources.update((entry["name"], entry["template"]) for entry in configured)
    files = {path.stem: path for path in (model_dir / "additional_chat_templates").glob("*.jinja")}
    if (default := model_dir / "chat_template.jinja").is_file():
        files["default"] = default
    if files:
        sources = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    return sources


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        if value is not None:
            found[name] = value["content"] if isinstance(value, dict) else value
    return found


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant said, for training; for serving it is its body."""

    tags = {"generation"}  # noqa: RUF012 (declared by jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own filter this escapes no HTML and keeps the order of keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(template: str) -> str:
    return datetime.now().strftime(template)
