"""process.py: what a supervised process does to itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil

from radix_backend.process import EXIT_FATAL, PARENT_PID, REPORT_FD
from radix_backend.protocol import Report
from tests.sidecar.world import eventually


def run(code: str, supervised: bool = True) -> tuple[list[Report], str, int]:
    """What a process that runs ``code`` reports, its stderr and exit status."""
    read, write = os.pipe()
    environment = {REPORT_FD: str(write), PARENT_PID: str(os.getpid())} if supervised else {}
    process = subprocess.Popen(
        [sys.executable, "-c", f"from radix_backend.process import *\n{code}"],
        stderr=subprocess.PIPE,
        env=os.environ | environment,
        pass_fds=(write,),
        text=True,
    )
    os.close(write)
    _, stderr = process.communicate()
    with os.fdopen(read) as reports:
        return [msgspec.json.decode(line, type=Report) for line in reports], stderr, process.returncode


def test_reports_tell_phases_and_grow_with_progress() -> None:
    reports, _, status = run("r = Reporter(); r.phase('loading weights', 0.5); r.phase('capturing'); r.ready()")
    assert [(report.phase, report.fraction) for report in reports] == [
        ("loading weights", 0.5),
        ("capturing", None),
        ("ready", None),
    ]
    progress = [report.progress for report in reports]
    assert progress == sorted(set(progress))
    assert status == 0


def test_heartbeats_and_fractions_are_rationed_but_the_end_of_a_phase_is_told() -> None:
    reports, _, _ = run(
        "r = Reporter(); r.ready()\n"
        "for _ in range(10_000): r.progress()\n"
        "for i in range(1001): r.phase('loading weights', i / 1000)"
    )
    assert reports[0].phase == "ready"
    assert len(reports) < 100
    assert reports[-1].fraction == 1


def test_a_hand_started_process_reports_nothing_and_runs() -> None:
    reports, _, status = run("die_with_parent(); r = Reporter(); r.phase('x'); r.ready(); r.progress()", False)
    assert reports == []
    assert status == 0


def test_a_user_error_is_reported_and_ends_with_the_fatal_status() -> None:
    reports, stderr, status = run(
        "from radix_backend.errors import NotFound\n"
        "setup_logging('info')\n"
        "with fatal_on_user_error(Reporter()): raise NotFound('model x does not exist')"
    )
    assert [(report.phase, report.message) for report in reports] == [("failed", "model x does not exist")]
    assert stderr == "ERROR model x does not exist\n"
    assert status == EXIT_FATAL


def test_every_line_of_a_logged_traceback_has_its_level() -> None:
    _, stderr, _ = run(
        "import logging\nsetup_logging('info')\nlogging.debug('hidden')\n"
        "try: 1 / 0\nexcept ZeroDivisionError: logging.warning('careful', exc_info=True)"
    )
    lines = stderr.splitlines()
    assert lines[0] == "WARNING careful"
    assert lines[-1] == "WARNING ZeroDivisionError: division by zero"
    assert all(line.startswith("WARNING ") for line in lines)


def test_what_a_process_starts_inherits_neither_pipe_nor_parent() -> None:
    reports, stderr, status = run(
        "import subprocess, sys\n"
        "die_with_parent(); r = Reporter(); r.ready()\n"
        "subprocess.run([sys.executable, '-c', 'from radix_backend.process import *\\n'\n"
        "    'die_with_parent(); r = Reporter(); r.failed(str()) '], close_fds=False, check=True)"
    )
    assert [report.phase for report in reports] == ["ready"], stderr
    assert status == 0


def test_a_process_dies_with_its_parent_also_when_the_parent_died_first(tmp_path: Path) -> None:
    for delay in ("", "time.sleep(0.5);"):
        child = f"import time; {delay} from radix_backend.process import *; die_with_parent(); time.sleep(3600)"
        parent = (
            "import os, subprocess, sys, time\n"
            f"environment = os.environ | {{'{PARENT_PID}': str(os.getpid())}}\n"
            f"child = subprocess.Popen([sys.executable, '-c', {child!r}, {str(tmp_path)!r}], env=environment)\n"
            "print(child.pid, flush=True); time.sleep(3600)"
        )
        process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert psutil.pid_exists(pid)
        process.kill()
        process.communicate()
        eventually(lambda pid=pid: not psutil.pid_exists(pid))
