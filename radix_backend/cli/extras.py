"""Packages that only some commands need."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from radix_backend.errors import NotFound


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Inside, a package that cannot be imported raises NotFound that tells how to install this extra of ours."""
    try:
        yield
    except ModuleNotFoundError as error:
        hint = f"{sys.executable} -m pip install 'radix-backend[{name}]'"
        raise NotFound(f"the package {error.name!r} is missing; run script/server, or: {hint}") from None
