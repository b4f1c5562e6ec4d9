"""Commands that are told where an engine serves, and no more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from radix_backend.cli import make_parser
from radix_backend.cli.sidecar import sidecar_config
from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument
from tests.sidecar.world import World

COMMANDS = (["openai"], ["chat"], ["top"], ["profile", "start"])


def config_of(*arguments: str) -> EngineConfig:
    return sidecar_config(make_parser().parse_args(arguments))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_without_a_setting_of_the_engine_a_command_takes_the_engine_s(world: World, command: list[str]) -> None:
    engine = world.config(max_bs=3)
    world.client(config=engine)
    endpoint = os.fspath(world.run_dir.of(engine).path)
    config = config_of(*command, f"--engine-endpoint={endpoint}", "--linger=7", "--log-level=ERROR")
    assert config.identity() == engine.identity()
    assert (config.engine_endpoint, config.linger, config.log_level) == (endpoint, 7, "error")
    assert world.client(config=config).tokenize("a") == [97]


def test_settings_that_are_given_hold_all_the_same(world: World, tmp_path: Path) -> None:
    world.client()
    endpoint = f"--engine-endpoint={world.run_dir.path}"
    assert config_of("openai", endpoint, "--page-size=8") == EngineConfig(
        page_size=8, engine_endpoint=str(world.run_dir.path)
    )
    (tmp_path / "radix").mkdir()
    (tmp_path / "radix" / "config.pbtxt").write_text('parameters { key: "max_bs" value { string_value: "9" } }')
    (tmp_path / "radix" / "1").mkdir()
    assert config_of("openai", endpoint, f"--model-repository={tmp_path}").max_bs == 9


def test_where_nobody_serves_yet_the_defaults_hold(world: World) -> None:
    endpoint = world.root / "nobody"
    assert config_of("openai", f"--engine-endpoint={endpoint}") == EngineConfig(engine_endpoint=str(endpoint))


def test_settings_of_a_directory_that_is_open_to_others_are_not_read(world: World) -> None:
    endpoint = world.root / "open"
    endpoint.mkdir()
    endpoint.chmod(0o755)
    with pytest.raises(InvalidArgument, match="is open to others"):
        config_of("openai", f"--engine-endpoint={endpoint}")
