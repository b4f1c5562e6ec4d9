"""Directories built once and found whole or not at all, whatever is killed or runs at the same time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from radix_backend.errors import Unavailable

log = logging.getLogger(__name__)


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """``target``, made by ``build(directory)`` unless it exists already.

    The directory is built beside it under another name, synced and renamed: what bears the name ``target`` is whole.
    One process builds, others wait for it. Raises Unavailable when the disk is full or cannot be written.
    """
    if target.is_dir():
        return target
    partial = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{target.name}.lock")):
            if target.is_dir():
                return target
            shutil.rmtree(partial, ignore_errors=True)  # of a builder that was killed: the lock is ours
            partial.mkdir()
            try:
                build(partial)
                _sync_tree(partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            _sync(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(target.parent).free // 2**20
            raise Unavailable(
                f"no space left for {target} ({free} MiB free); make room or set RADIX_HOME to another disk"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise Unavailable(
                f"cannot write {target}: {error.strerror}; set RADIX_HOME to a writable directory"
            ) from error
        raise
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The lock file stays: removing it would let two processes lock two files of the same name.
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is building %s: waiting for it", path.with_suffix("").name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync_tree(directory: Path) -> None:
    for path in directory.iterdir():
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
