"""Turns untyped mappings (JSON, Triton parameters, flags) into typed structs, with errors a user can act on."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from radix_backend.errors import InvalidArgument

T = TypeVar("T", bound=msgspec.Struct)

_AT = re.compile(r" - at (?:`key` in )?`\$\.?(([^`.\[]*)[^`]*)`$")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")
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


def convert(cls: type[T], values: Mapping[str, Any], what: str, strict: bool = False) -> T:
    """Build ``cls`` from ``values``; unless ``strict``, strings are coerced to the field's type ("0.7" → 0.7).

    ``what`` names the kind of thing in errors ("setting", "sampling parameter").
    Raises InvalidArgument naming the field, the value given and what is accepted.
    """
    fields = cls.__struct_fields__
    for name in values:
        if name not in fields:
            raise InvalidArgument(f"unknown {what} {show(name)}; accepted: {', '.join(sorted(fields))}")
    try:
        return msgspec.convert(dict(values), cls, strict=strict, str_keys=True)
    except msgspec.ValidationError as error:
        message = str(error)
        missing, match = _MISSING.match(message), _AT.search(message)
        if match is None:
            raise InvalidArgument(f"{what} {missing[1]!r} is missing" if missing else message) from None
        place, name = match.groups()
        complaint = message[: match.start()].replace("`", "")
        given = f"{what} {name!r} is {show(values.get(name))}"
        where = f" (at {place})" if place != name else ""
        if missing:
            raise InvalidArgument(f"{what} {name!r} lacks {missing[1]!r}{where}") from None
        choices = literal_choices(cls, name)
        if not choices and not complaint.startswith("Expected "):
            raise InvalidArgument(f"{given}: {complaint[0].lower()}{complaint[1:]}{where}") from None
        accepted = complaint.removeprefix("Expected ").split(", got")[0]
        if choices:
            accepted = " or ".join(choices)
        raise InvalidArgument(f"{given}; accepted: {accepted}{where}") from None
