from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from radix_backend.cli.tritonserver import find_server


def test_model_is_ready_while_nothing_ails_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.fspath(find_server().python_backend))
    from radix_backend.triton.model import TritonPythonModel

    model = TritonPythonModel()
    reasons = ("the engine is starting: loading weights 40 %", "the engine has made no progress for 12 s")
    for ailment, ready in (("", True), *((reason, False) for reason in reasons)):
        model._client = SimpleNamespace(ailment=ailment)
        assert model.is_ready() is ready
