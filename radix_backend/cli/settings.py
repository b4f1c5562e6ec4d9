"""Every field of EngineConfig as a flag: the one definition gives names, help and defaults."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec

from radix_backend.config import DEVICE_DEFAULTS, EngineConfig, flag_of, spell

_METAVARS = {
    msgspec.inspect.IntType: "INT",
    msgspec.inspect.FloatType: "FLOAT",
    msgspec.inspect.StrType: "TEXT",
    msgspec.inspect.BoolType: "true|false",
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A ``--kebab-case`` flag for each setting. Values stay text: `EngineConfig.parse` checks them."""
    group = parser.add_argument_group("settings of the engine")
    info = msgspec.inspect.type_info(EngineConfig)
    assert isinstance(info, msgspec.inspect.StructType)
    for field in info.fields:
        assert isinstance(field.type, msgspec.inspect.Metadata)
        metavar, switch = _metavar(field.type.type)
        text = str((field.type.extra_json_schema or {})["description"]).replace("%", "%%")
        if field.default not in (None, "") and field.name not in DEVICE_DEFAULTS["cpu"]:
            text += f" (default: {spell(field.default)})"
        # A switch may stand alone, and may be set to false where the model repository says true.
        optional: dict[str, Any] = {"nargs": "?", "const": "true"} if switch else {}
        group.add_argument(flag_of(field.name), dest=_dest(field.name), metavar=metavar, help=text, **optional)


def given_settings(arguments: argparse.Namespace) -> dict[str, str]:
    """The settings that were given as flags, as text."""
    values = {name: getattr(arguments, _dest(name)) for name in EngineConfig.__struct_fields__}
    return {name: value for name, value in values.items() if value is not None}


def spell_settings(config: EngineConfig, names: list[str]) -> dict[str, str]:
    """Checked settings as text again, for a process that parses them."""
    return {name: spell(getattr(config, name)) for name in names}


def _dest(name: str) -> str:
    return f"setting_{name}"


def _metavar(kind: msgspec.inspect.Type) -> tuple[str, bool]:
    """How help shows the value, and whether it is a switch."""
    if isinstance(kind, msgspec.inspect.UnionType):  # an optional value
        kind = next(member for member in kind.types if not isinstance(member, msgspec.inspect.NoneType))
    if isinstance(kind, msgspec.inspect.LiteralType):
        return "|".join(str(value) for value in kind.values), False
    if isinstance(kind, msgspec.inspect.VarTupleType):
        item, _ = _metavar(kind.item_type)
        return f"{item},{item},…", False
    return _METAVARS[type(kind)], isinstance(kind, msgspec.inspect.BoolType)
