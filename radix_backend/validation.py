"""Turns untyped mappings (JSON, Triton parameters, flags) into typed structs, with errors a user can act on."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from radix_backend.errors import InvalidArgument

T = TypeVar("T", bound=msgspec.Struct)

_AT = re.compile(r" - at (?:`key` in )?`\$\.?([^`\[]*)[^`]*`$")
_SHOWN = 80  # characters of a wrong value that an error repeats


def show(value: object) -> str:
    """A value for an error message, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


class Checked(msgspec.StructMeta):
    """Of structs that a person constructs: ``C(a=1)`` is ``C.parse({"a": 1})``.

    Decoding does not pass here: it checks by itself.
    """

    def __call__(cls: Any, **values: Any) -> Any:  # noqa: N805 (of a metaclass)
        return cls.parse(values)


def literal_choices(cls: type[msgspec.Struct], name: str) -> tuple[str, ...]:
    """The values that a ``Literal`` field accepts; empty for other fields."""
    kind = typing.get_type_hints(cls).get(name)
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def convert(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """Build ``cls`` from ``values``; strings are coerced to the field's type ("0.7" → 0.7, "true" → True).

    ``what`` names the kind of thing in errors ("setting", "sampling parameter").
    Raises InvalidArgument naming the field, the value given and what is accepted.
    """
    fields = cls.__struct_fields__
    for name in values:
        if name not in fields:
            raise InvalidArgument(f"unknown {what} {show(name)}; accepted: {', '.join(sorted(fields))}")
    try:
        return msgspec.convert(dict(values), cls, strict=False)
    except msgspec.ValidationError as error:
        message = str(error)
        match = _AT.search(message)
        if match is None:
            raise InvalidArgument(message) from None
        name = match[1]
        accepted = message[: match.start()].replace("Expected ", "").split(", got")[0].replace("`", "")
        if choices := literal_choices(cls, name):
            accepted = " or ".join(choices)
        raise InvalidArgument(f"{what} {name!r} is {show(values.get(name))}; accepted: {accepted}") from None
