from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from radix_backend.errors import InvalidArgument
from radix_backend.triton.settings import load_config
from radix_backend.triton.tensors import INPUTS, OUTPUTS, declare


def config_with(**parameters: str) -> dict[str, Any]:
    return {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}


def test_parameters_beat_the_file_and_are_coerced(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"max_bs": 4, "page_size": 32, "linger": 1}')
    config = load_config(tmp_path, config_with(max_bs="8", disable_async_scheduling="true", kv_cache_memory="1GiB"))
    assert (config.max_bs, config.page_size, config.linger) == (8, 32, 1.0)
    assert config.disable_async_scheduling
    assert config.kv_cache_memory == 2**30


def test_settings_have_defaults_without_a_file(tmp_path: Path) -> None:
    assert load_config(tmp_path, {}).model == "embedded"


def test_parameters_of_the_python_backend_are_not_ours(tmp_path: Path) -> None:
    load_config(tmp_path, config_with(EXECUTION_ENV_PATH="/envs/env.tar.gz"))


def test_weights_may_lie_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "model.json").write_text('{"model": "weights"}')
    assert load_config(tmp_path, {}).model == str(tmp_path / "weights")


def test_file_that_is_no_object_is_refused(tmp_path: Path) -> None:
    for text in ('{"max_bs": 4', "null"):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(InvalidArgument, match=r"model\.json"):
            load_config(tmp_path, {})


class ModelConfig:
    """As Triton's: what the file declares, and what was added."""

    def __init__(self, **declared: Any) -> None:
        self.declared: dict[str, Any] = {"input": [], "output": []} | declared
        self.inputs: list[dict[str, Any]] = []
        self.outputs: list[dict[str, Any]] = []

    def as_dict(self) -> dict[str, Any]:
        return self.declared

    def add_input(self, tensor: dict[str, Any]) -> None:
        self.inputs.append(tensor)

    def add_output(self, tensor: dict[str, Any]) -> None:
        self.outputs.append(tensor)

    def set_max_batch_size(self, size: int) -> None:
        assert size == 0

    def set_model_transaction_policy(self, policy: dict[str, bool]) -> None:
        assert policy == {"decoupled": True}


def test_what_the_file_declares_is_not_declared_again() -> None:
    config = ModelConfig(input=[{"name": "input_ids", "data_type": "TYPE_INT64", "dims": [-1]}])
    declare(config)
    assert {tensor["name"] for tensor in config.inputs} == {tensor.name for tensor in INPUTS} - {"input_ids"}
    assert [tensor["name"] for tensor in config.outputs] == [tensor.name for tensor in OUTPUTS]
    assert all(tensor["optional"] for tensor in config.inputs)
