"""Makes the tables of ``docs/`` from the code: ``python -m radix_backend.triton.reference docs``.

A page is prose with places for tables, each begun by ``<!-- table: NAME -->`` and ended by ``<!-- end -->``. What
stands between the two is made from the definitions that the program itself uses.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec
from msgspec import NODEFAULT, inspect

from radix_backend.config import EngineConfig
from radix_backend.metrics.families import ENGINE, HISTOGRAM, REQUEST, Family
from radix_backend.metrics.publisher import SAMPLES
from radix_backend.sampling_params import SamplingParams
from radix_backend.triton.tensors import INPUTS, OUTPUTS, Tensor
from radix_backend.validation import literal_choices

_PLACE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str) -> str:
    """The page with its tables renewed. Raises KeyError for a table that is none of `TABLES`."""
    return _PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], page)


def tables_in(page: str) -> list[str]:
    """The names of the page's tables."""
    return [place[2] for place in _PLACE.finditer(page)]


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n" for cells in lines)


def tensors(group: Iterable[Tensor]) -> str:
    return table(
        ("tensor", "type", "shape", "meaning"),
        ((f"`{tensor.name}`", tensor.data_type, f"[{tensor.size}]", tensor.help) for tensor in group),
    )


def fields(cls: type[msgspec.Struct]) -> str:
    """Every field of a struct whose annotations carry descriptions."""
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    rows = []
    for field in info.fields:
        assert isinstance(field.type, inspect.Metadata)
        accepted = " or ".join(f"`{choice}`" for choice in literal_choices(cls, field.name)) or _accepted(field.type)
        default = field.default if field.default is not NODEFAULT else field.default_factory()
        help = str((field.type.extra_json_schema or {})["description"])
        rows.append((f"`{field.name}`", accepted, _spell(default), help))
    return table(("name", "accepted", "default", "meaning"), rows)


def _accepted(kind: inspect.Type) -> str:
    """What a value of this type may be, in words."""
    if isinstance(kind, inspect.Metadata):
        return _accepted(kind.type)
    if isinstance(kind, inspect.UnionType):
        return " or ".join(_accepted(member) for member in kind.types if not isinstance(member, inspect.NoneType))
    if isinstance(kind, inspect.IntType):
        return f"integer{_range(kind)}"
    if isinstance(kind, inspect.FloatType):
        return f"number{_range(kind)}"
    if isinstance(kind, inspect.ListType):
        most = "" if kind.max_length is None else f" of at most {kind.max_length}"
        return f"list{most}: {_accepted(kind.item_type)}"
    if isinstance(kind, inspect.VarTupleType):
        return f"list: {_accepted(kind.item_type)}"
    if isinstance(kind, inspect.DictType):
        return f"object: {_accepted(kind.key_type)} → {_accepted(kind.value_type)}"
    return {inspect.StrType: "text", inspect.BoolType: "`true` or `false`"}[type(kind)]


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    bounds = {"≥": kind.ge, ">": kind.gt, "≤": kind.le, "<": kind.lt}
    return " and".join(f" {sign} {_number(bound)}" for sign, bound in bounds.items() if bound is not None)


def _number(bound: float) -> str:
    if bound == -(2**63):
        return "-2^63"
    power = int(bound).bit_length()
    return f"2^{power} - 1" if power > 16 and bound == 2**power - 1 else f"{bound:g}"


def _spell(default: object) -> str:
    if default is None or default == "":
        return ""
    return f"`{msgspec.json.encode(default).decode()}`" if not isinstance(default, str) else f"`{default}`"


def metrics(families: Iterable[Family]) -> str:
    rows = []
    for family in families:
        name = f"`{family.name}`"
        if family.label:
            name += f"<br>`{family.label}`: " + ", ".join(f"`{value}`" for value in family.values)
        sampled = f", sampled beyond {SAMPLES:,} observations a second" if family.sampled else ""
        rows.append((name, family.kind + sampled, family.help))
    return table(("metric", "kind", "meaning"), rows)


def buckets(families: Iterable[Family]) -> str:
    names: dict[tuple[float, ...], list[str]] = {}
    for family in families:
        if family.kind == HISTOGRAM:
            names.setdefault(family.buckets, []).append(f"`{family.name}`")
    rows = (("<br>".join(sharing), ", ".join(f"{bound:g}" for bound in bounds)) for bounds, sharing in names.items())
    return table(("histogram", "upper bounds"), rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "inputs": lambda: tensors(INPUTS),
    "outputs": lambda: tensors(OUTPUTS),
    "sampling parameters": lambda: fields(SamplingParams),
    "settings": lambda: fields(EngineConfig),
    "metrics of the engine": lambda: metrics(ENGINE),
    "metrics of requests": lambda: metrics(REQUEST),
    "buckets": lambda: buckets(ENGINE + REQUEST),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Renew the tables of the documentation.")
    parser.add_argument("docs", type=Path, help="the directory of its pages")
    for path in sorted(parser.parse_args().docs.glob("*.md")):
        page = path.read_text()
        if fill(page) != page:
            path.write_text(fill(page))
            print(f"renewed {path}")


if __name__ == "__main__":
    main()
