"""The metrics reference is made from the code."""

from __future__ import annotations

from pathlib import Path

from radix_backend.triton.metrics_reference import render

FILE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_the_metrics_reference_is_up_to_date() -> None:
    assert FILE.read_text() == render(), (
        "docs/metrics.md is stale: python -m radix_backend.triton.metrics_reference docs/metrics.md"
    )
