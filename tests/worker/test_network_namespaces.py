"""Ranks on two hosts as the kernel can have them on one: network namespaces with a cable between."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from radix_backend.process import Reporter
from radix_backend.worker import create_worker
from tests.models.tiny import save_tiny
from tests.triton.server import eventually, gone
from tests.worker.two_hosts import generate, small

ADDRESSES = ("10.213.77.1", "10.213.77.2")  # known inside the namespaces alone
NOTICED = 30.0  # seconds: a bound on hanging, not an expectation


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces, with one of ADDRESSES each."""
    names = f"radix-{os.getpid()}-a", f"radix-{os.getpid()}-b"
    cables = f"rdx{os.getpid()}a"[:15], f"rdx{os.getpid()}b"[:15]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", names[0], "link", "add", cables[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', '') or error}")
    finally:
        for name in names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)


def test_ranks_on_two_hosts_stream_as_one_process_until_the_cable_is_pulled(
    hosts: tuple[str, str], tmp_path: Path
) -> None:
    model = save_tiny(tmp_path, seed=11)
    alone = create_worker(small(model), model, Reporter())
    expected = generate(alone)
    alone.close()
    here, there = (["ip", "netns", "exec", host] for host in hosts)
    program = [sys.executable, "-m", "tests.worker.two_hosts", "ENGINE", os.fspath(model), *ADDRESSES]
    log = tmp_path / "stderr"
    # Not what workers of this process have set.
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    with (
        open(log, "w") as stderr,
        subprocess.Popen(
            [*here, *program, *there], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        ) as engine,
    ):
        try:
            assert engine.stdout is not None
            line = engine.stdout.readline()
            assert line, log.read_text()
            assert json.loads(line) == expected
            others = psutil.Process(engine.pid).children(recursive=True)
            assert len(others) == 2  # an agent and its rank
            (cable,) = cables_in(hosts[1])
            ip("-n", hosts[1], "link", "set", cable, "down")
            assert engine.wait(NOTICED) == 1
            eventually(lambda: gone(others), NOTICED)  # they cannot reach the engine either
        finally:
            engine.kill()
    assert f"rank 1 on {ADDRESSES[1]} is lost: its host does not answer" in log.read_text()


def cables_in(host: str) -> list[str]:
    """Of the cables that end in a namespace."""
    links = subprocess.run(["ip", "-n", host, "-o", "link"], check=True, capture_output=True, text=True).stdout
    return re.findall(r"\d+: (rdx\w+)@", links)
