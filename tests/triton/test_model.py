from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from radix_backend.cli.tritonserver import find_server
from radix_backend.protocol import Status


def test_model_is_ready_when_the_engine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.fspath(find_server().python_backend))
    from radix_backend.triton.model import TritonPythonModel

    model = TritonPythonModel()
    for state, ready in (("starting", False), ("ready", True), ("restarting", False), ("failed", False)):
        model._client = SimpleNamespace(status=Status(state, 1))
        assert model.is_ready() is ready
