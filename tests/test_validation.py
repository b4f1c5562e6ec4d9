"""A struct that a person builds is checked like one that is parsed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from radix_backend import EngineConfig, SamplingParams
from radix_backend.errors import InvalidArgument
from radix_backend.validation import convert


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EngineConfig(max_bs=0), "setting 'max_bs' is 0; accepted: int >= 1"),
        (lambda: EngineConfig(dtype="int4"), "setting 'dtype' is 'int4'; accepted: auto or bfloat16"),
        (lambda: EngineConfig(modell="x"), "unknown setting 'modell'; accepted: "),
        (lambda: SamplingParams(temperature=-1), "sampling parameter 'temperature' is -1; accepted: float >= 0.0"),
        (lambda: SamplingParams(temperature=float("nan")), "sampling parameter 'temperature' is nan; accepted: float"),
        (lambda: SamplingParams(top_q=1), "unknown sampling parameter 'top_q'; accepted: "),
    ],
)
def test_the_constructor_names_what_is_wrong(build: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        build()


class Point(msgspec.Struct):
    x: int


class Route(msgspec.Struct):
    points: list[Point]
    start: Point | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "field 'points' is missing"),
        ({"points": [{"x": 1}, {}]}, "field 'points' lacks 'x' (at points[1])"),
        ({"points": [], "start": {}}, "field 'start' lacks 'x'"),
        ({"points": [{"x": "`x` - at `$.y`"}]}, "accepted: int (at points[0].x)"),
    ],
)
def test_a_missing_field_is_named_with_the_one_that_lacks_it(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        convert(Route, values, "field", strict=True)
    assert str(raised.value).endswith(message)


def test_the_constructor_gives_what_parse_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Qwen3-0.6B").mkdir()
    monkeypatch.chdir(tmp_path)
    config = EngineConfig(model="Qwen3-0.6B", kv_cache_memory="2GiB")
    assert config == EngineConfig.parse({"model": str(tmp_path / "Qwen3-0.6B"), "kv_cache_memory": 2**31})
    assert EngineConfig() == EngineConfig.parse({})


def test_what_was_built_survives_the_way_to_the_engine() -> None:
    params = SamplingParams(max_tokens=3, stop="x", logit_bias={7: 1.5})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert msgspec.json.decode(msgspec.json.encode(EngineConfig()), type=EngineConfig) == EngineConfig()


def test_max_new_tokens_is_max_tokens() -> None:
    params = SamplingParams(max_new_tokens=50)
    assert params == SamplingParams(max_tokens=50) == SamplingParams(max_tokens=50, max_new_tokens=50)
    assert params.max_new_tokens == 50


@pytest.mark.parametrize("max_tokens", [16, 5])
def test_max_tokens_and_max_new_tokens_must_not_differ(max_tokens: int) -> None:
    message = f"sampling parameter 'max_tokens' is {max_tokens} and 50 ('max_new_tokens' is the same); accepted: one"
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        SamplingParams(max_tokens=max_tokens, max_new_tokens=50)
