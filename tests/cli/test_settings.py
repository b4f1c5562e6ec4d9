from __future__ import annotations

import argparse
import shlex
from typing import Any

import msgspec
import pytest

from radix_backend.cli.settings import add_settings, given_settings, spell_settings
from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument

VALUES: dict[str, Any] = {
    "model": "some/model",
    "dtype": "float32",
    "device": "cpu",
    "attention_backend": "torch_native",
    "load_format": "dummy",
    "enforce_eager": True,
    "max_bs": 3,
    "max_batched_tokens": 99,
    "profile": True,
    "profile_dir": "/tmp/profiles",
    "context_len": 777,
    "page_size": 1,
    "gpu_memory_utilization": 0.25,
    "kv_cache_memory": 2**31,
    "max_queue_size": 5,
    "tp_size": 2,
    "pp_size": 1,
    "executor": "local",
    "device_ids": (3, 1),
    "nccl_port": 29500,
    "all_reduce": "nccl",
    "disable_async_scheduling": True,
    "namespace": "a b",
    "log_level": "debug",
    "engine_python": "/usr/bin/python3",
    "engine_endpoint": "/run/radix",
    "linger": 0.5,
}


ELSEWHERE: dict[str, Any] = {"executor": "ray", "ray_address": "10.0.0.5:6379", "tp_size": 2, "log_level": "debug"}


def given(*arguments: str) -> dict[str, str]:
    parser = argparse.ArgumentParser()
    add_settings(parser)
    return given_settings(parser.parse_args(arguments))


@pytest.mark.parametrize("values", [VALUES, ELSEWHERE])
def test_every_setting_is_a_flag(values: dict[str, Any]) -> None:
    assert VALUES.keys() | ELSEWHERE.keys() == set(EngineConfig.__struct_fields__)
    spelled = values | ({"device_ids": "3,1"} if "device_ids" in values else {})
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in spelled.items()]
    assert EngineConfig.parse(given(*flags)) == EngineConfig(**values)


def test_settings_that_are_not_given_are_left_to_the_repository() -> None:
    assert given() == {}
    assert given("--max-bs", "4") == {"max_bs": "4"}


@pytest.mark.parametrize(("argument", "value"), [("", True), ("=true", True), ("=false", False)])
def test_switch_may_stand_alone(argument: str, value: bool) -> None:
    config = EngineConfig.parse(given(f"--disable-async-scheduling{argument}"))
    assert config.disable_async_scheduling is value


def test_what_a_switch_cannot_be_is_told_in_words() -> None:
    """A URL after a switch that stands alone, say."""
    with pytest.raises(InvalidArgument, match="'enforce_eager' is 'http://x'; accepted: true or false"):
        EngineConfig.parse(given("--enforce-eager", "http://x"))


@pytest.mark.parametrize("level", ["INFO", "Info", "info"])
def test_a_log_level_may_be_spelled_as_python_does(level: str) -> None:
    assert EngineConfig.parse(given("--log-level", level)).log_level == "info"
    assert EngineConfig(log_level=level).log_level == "info"


def test_the_flags_of_an_engine_give_another_command_its_identity() -> None:
    config = EngineConfig(**VALUES)
    flags = shlex.split(config.engine_flags())
    assert EngineConfig.parse(given(*flags)).identity() == config.identity()
    assert not {"--linger", "--log-level", "--engine-python", "--engine-endpoint"} & set(flags)
    assert EngineConfig(linger=1).engine_flags() == ""


@pytest.mark.parametrize("values", [VALUES, ELSEWHERE])
def test_spelled_settings_parse_to_the_same(values: dict[str, Any]) -> None:
    config = EngineConfig(**values)
    assert EngineConfig.parse(spell_settings(config, list(values))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tp_size": 1}, "setting 'executor' is 'ray'; accepted with one rank"),
        ({"device_ids": "0,1"}, "setting 'device_ids' is '0,1'; accepted with executor 'ray': nothing"),
        (
            {"executor": "local", "ray_address": "head:6379"},
            "'ray_address' is 'head:6379'; accepted with executor 'ray'",
        ),
        ({"ray_address": "ray://head:10001"}, "setting 'ray_address' is 'ray://head:10001'; accepted: HOST:PORT"),
    ],
)
def test_what_ray_decides_or_cannot_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        EngineConfig.parse({"executor": "ray", "tp_size": 2, **settings})


def test_defaults_that_are_written_out_make_no_other_engine() -> None:
    written = msgspec.json.decode(b'{"model": "embedded", "dtype": "auto", "page_size": 16, "namespace": ""}')
    assert EngineConfig.parse(written).identity() == EngineConfig().identity()
    assert EngineConfig.parse(written | {"page_size": 8}).identity() != EngineConfig().identity()
