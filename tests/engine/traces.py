"""Reads profiles."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

PHASES = {"schedule", "launch", "forward", "sample", "settle"}


def trace_events(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return events
