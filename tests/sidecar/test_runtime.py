"""sidecar/runtime.py: the directory is ours alone, and its locks cannot be fooled."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from radix_backend.errors import InvalidArgument
from radix_backend.sidecar.runtime import RunDir
from tests.sidecar.world import World


@pytest.fixture
def run_dir(world: World) -> RunDir:
    return world.run_dir


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_directories_are_private_whatever_the_umask(run_dir: RunDir) -> None:
    previous = os.umask(0)
    try:
        with run_dir.locked():
            pass
    finally:
        os.umask(previous)
    assert mode(run_dir.path) == mode(run_dir.path.parent) == 0o700


def test_a_symbolic_link_in_place_of_the_directory_is_refused(run_dir: RunDir, tmp_path: Path) -> None:
    run_dir.path.parent.mkdir(mode=0o700)
    run_dir.path.symlink_to(tmp_path)
    with pytest.raises(InvalidArgument, match="is a symbolic link"), run_dir.locked():
        pass


def test_a_symbolic_link_in_place_of_the_root_is_refused(run_dir: RunDir, tmp_path: Path) -> None:
    run_dir.path.parent.symlink_to(tmp_path)
    with pytest.raises(InvalidArgument, match="is a symbolic link"), run_dir.locked():
        pass


def test_a_directory_open_to_others_is_refused(run_dir: RunDir) -> None:
    run_dir.path.parent.mkdir(mode=0o700)
    run_dir.path.mkdir()
    run_dir.path.chmod(0o755)
    with pytest.raises(InvalidArgument, match="is open to others"), run_dir.locked():
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_somebody_elses_directory_is_refused(run_dir: RunDir) -> None:
    run_dir.path.parent.mkdir(mode=0o700)
    run_dir.path.mkdir(mode=0o700)
    os.chown(run_dir.path, 12345, 12345)
    with pytest.raises(InvalidArgument, match="belongs to user 12345"), run_dir.locked():
        pass


def test_a_path_too_long_for_a_socket_is_refused_naming_the_variable(world: World, monkeypatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp/" + "x" * 80)
    with pytest.raises(InvalidArgument, match=r"at most 107.*XDG_RUNTIME_DIR"):
        RunDir.of(world.config())


def test_a_missing_base_is_refused_naming_the_variable(world: World, monkeypatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nonexistent")
    with pytest.raises(InvalidArgument, match=r"No such file.*XDG_RUNTIME_DIR"), RunDir.of(world.config()).locked():
        pass


def test_only_one_claim_at_a_time_and_leftovers_of_the_dead_are_cleared(run_dir: RunDir) -> None:
    with run_dir.locked():
        first = run_dir.claim()
        assert first is not None
        assert run_dir.claim() is None
        first.sign()
        assert run_dir.owner_pid() == os.getpid()
        (run_dir.path / "gateway-7.sock").touch()
        first.close()  # as a SIGKILL does: the lock is free, the files remain
        assert run_dir.lease_socket.exists()
        second = run_dir.claim()
        assert second is not None
        assert not (run_dir.path / "gateway-7.sock").exists()
    run_dir.remove(second)
    assert not run_dir.path.exists()


def test_a_successors_directory_is_not_removed(run_dir: RunDir) -> None:
    with run_dir.locked():
        first = run_dir.claim()
    assert first is not None
    run_dir.path.rename(run_dir.path.with_name("taken-away"))
    with run_dir.locked():
        second = run_dir.claim()
    assert second is not None
    run_dir.remove(first)
    assert run_dir.lease_socket.exists()
    run_dir.remove(second)


def test_foreign_files_in_the_directory_survive_its_removal(run_dir: RunDir) -> None:
    with run_dir.locked():
        claim = run_dir.claim()
    (run_dir.path / "notes.txt").touch()
    assert claim is not None
    run_dir.remove(claim)
    assert [path.name for path in run_dir.path.iterdir()] == ["notes.txt"]


def test_locking_survives_removal_by_a_leaving_owner_at_any_moment(run_dir: RunDir) -> None:
    """Many starters and leavers: the lock always excludes, and every claim is the only one."""
    inside = 0
    overlaps = []

    def come_and_go() -> None:
        nonlocal inside
        for _ in range(30):
            with run_dir.locked():
                inside += 1
                overlaps.append(inside)
                claim = run_dir.claim()
                inside -= 1
            if claim is not None:
                run_dir.remove(claim)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(overlaps) == 120
    assert set(overlaps) == {1}
    assert not run_dir.path.exists()
