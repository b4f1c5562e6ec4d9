"""The small process that owns a sidecar: starts its processes, restarts them together, leaves after its last client.

``python -m radix_backend.supervisor RUN_DIR OWNER_FD LISTENER_FD`` is how a client starts it (sidecar/lease.py), with
the claim to the directory already held; `run_foreground` is how a person does.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path

import msgspec

from radix_backend.config import EngineConfig, radix_home
from radix_backend.errors import InvalidArgument, Unavailable
from radix_backend.protocol import PROTOCOL_VERSION, Lease, Log, Pulse, Status
from radix_backend.sidecar.child import Child
from radix_backend.sidecar.leases import Leases
from radix_backend.sidecar.runtime import Claim, RunDir

HANG_SECONDS = 60.0  # without progress, of a process that serves
STACKS_SECONDS = 1.0  # for a stuck process to dump its stacks before it is killed
STOP_SECONDS = 2.0  # for processes to end by themselves after SIGTERM
FIRST_LEASE_SECONDS = 10.0  # for the client that started us to connect
BACKOFF_SECONDS = (0.5, 30.0)  # before the first restart; each failure doubles it up to the second
HEALTHY_SECONDS = 60.0  # of service after which a failure counts as the first again
_DETAIL_LIMIT = 4000  # characters of a status

_PULSE_SECONDS = 1.0  # between two signs of life for the clients
_TICK = 0.25  # seconds between looks at clocks
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOG_BYTES = 8 << 20  # of one log file; one older is kept


@dataclass(frozen=True)
class Programs:
    """What the interpreter runs as each process of the sidecar, before that process's own arguments."""

    loading: Sequence[str] = ("-m", "radix_backend.loading")
    gateway: Sequence[str] = ("-m", "radix_backend.gateway")
    engine: Sequence[str] = ("-m", "radix_backend.engine")


class Supervisor:
    """One state machine: starting → ready → restarting → ready …, or failed; then stopping.

    Gateway and engine are one failure unit: when one ends, the other is killed, and the next generation of both
    starts, on new addresses, once nothing of the last one is left.
    """

    def __init__(
        self,
        run_dir: RunDir,
        claim: Claim,
        config: EngineConfig,
        programs: Programs = Programs(),
        stays: bool = False,
    ) -> None:
        """Takes over ``claim``. ``stays``: lives until a signal, whether clients come or not."""
        self._run_dir = run_dir
        self._claim = claim
        self._config = config
        self._programs = programs
        self._stays = stays
        self._selector = selectors.DefaultSelector()
        self._leases = Leases(claim.listener, self._selector, self._refusal, self._joined, self._left)
        self._children: list[Child] = []
        self._status = self._last = Status("starting", 1)
        self._generation = 1
        self._model_dir = ""  # known once `loading` has run
        now = time.monotonic()
        self._start_at: float | None = now  # when to start processes; those that still run then are on their way out
        self._leave_at: float | None = None if stays else now + FIRST_LEASE_SECONDS
        self._kill_at: float | None = None  # when to stop waiting for processes to end by themselves
        self._ready_at: float | None = None
        self._failures = 0  # in a row
        self._next_pulse = now
        claim.sign()

    def run(self) -> Status:
        """Serve until the last client is gone or a signal comes; leaves no process and no file behind.

        Returns the last status before it stopped: "failed" if there is a reason to tell.
        """
        with self._stop_signals():
            while self._status.state != "stopping" or self._children:
                for key, _ in self._selector.select(_TICK):
                    key.data()
                self._look_at_children()
                self._look_at_clocks()
        self._leases.close()
        self._selector.close()
        self._run_dir.remove(self._claim)
        return self._last

    # ── processes ──────────────────────────────────────────────────────────────────────

    def _start(self) -> None:
        """What comes next: the one-off loading, or a generation of engine and gateway."""
        self._start_at = None
        config = os.fspath(self._run_dir.config)
        if not self._model_dir:
            self._children = [Child("loading", [*self._programs.loading, config])]
        else:
            client_address = self._run_dir.gateway_address(self._generation)
            engine_address = self._run_dir.engine_address(self._generation)
            serve = [config, self._model_dir]
            self._children = [
                Child("engine", [*self._programs.engine, *serve, engine_address]),
                Child("gateway", [*self._programs.gateway, *serve, client_address, engine_address]),
            ]
        for child in self._children:
            for fd in child.pipes:
                self._selector.register(fd, selectors.EVENT_READ, functools.partial(self._read, child, fd))

    def _read(self, child: Child, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._record(child.read(fd))
        if fd not in child.pipes:
            self._selector.unregister(fd)

    def _look_at_children(self) -> None:
        for child in list(self._children):
            wanted = self._start_at is None and self._status.state not in ("failed", "stopping")
            if child.ended():
                self._forget(child)
                if wanted:
                    self._ended(child)
            elif wanted and child.failed:
                self._fail(child.last_words)
        if self._start_at is not None or self._status.state not in ("starting", "restarting") or not self._children:
            return
        waiting = [child.activity for child in self._children if not child.ready]
        if waiting:
            self._change(self._status.state, waiting[0])
        else:
            self._ready_at = time.monotonic()
            self._change("ready")

    def _forget(self, child: Child) -> None:
        for fd in child.pipes:
            self._selector.unregister(fd)
        self._record(child.drain())
        child.close()
        self._children.remove(child)

    def _ended(self, child: Child) -> None:
        if child.name == "loading" and child.succeeded and child.last_line:
            self._model_dir = child.last_line
            self._start()
        elif child.failed:
            self._fail(child.last_words or child.ending)
        else:
            self._restart(child.ending)

    def _restart(self, reason: str) -> None:
        now = time.monotonic()
        if self._ready_at is not None and now - self._ready_at >= HEALTHY_SECONDS:
            self._failures = 0
        first, longest = BACKOFF_SECONDS
        delay = min(first * 2 ** min(self._failures, 16), longest)
        self._failures += 1
        self._ready_at = None
        self._generation += 1
        self._start_at = now + delay
        self._change("restarting", f"{reason} (starting again in {delay:g} s)")
        self._signal(signal.SIGKILL)

    def _fail(self, reason: str) -> None:
        self._change("failed", reason)
        self._signal(signal.SIGKILL)
        if self._stays:  # nobody's arrival makes it try again: the person who started it will
            self._stop()

    def _stop(self) -> None:
        if self._status.state != "stopping":
            self._last = self._status
            self._start_at = None
            self._kill_at = time.monotonic() + STOP_SECONDS
            self._change("stopping")
            self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        for child in self._children:
            child.signal(number)

    # ── clocks ──────────────────────────────────────────────────────────────────────

    def _look_at_clocks(self) -> None:
        now = time.monotonic()
        self._leases.resend()
        for pid in self._leases.kill_orphans():
            self._say("warning", f"killed client {pid}, which outlived its parent")
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._signal(signal.SIGKILL)
        if self._start_at is not None and now >= self._start_at and not self._children:
            self._start()
        if self._status.state == "ready":
            if now >= self._next_pulse:
                self._next_pulse = now + _PULSE_SECONDS
                self._leases.pulse(Pulse(max(now - child.progress_at for child in self._children)))
            self._look_for_hang(now)
        if self._leave_at is not None and now >= self._leave_at:
            self._leave_at = None
            self._stop()

    def _look_for_hang(self, now: float) -> None:
        for child in self._children:
            if now - child.progress_at < HANG_SECONDS:
                continue
            if child.stacks_asked_at is None:
                child.ask_stacks()
            elif now - child.stacks_asked_at >= STACKS_SECONDS:
                self._restart(f"{child.name} made no progress for {HANG_SECONDS:g} s")
                return

    # ── clients ──────────────────────────────────────────────────────────────────────

    def _refusal(self, lease: Lease | None) -> str:
        version = "unknown" if lease is None else lease.version
        where = f"serves {self._run_dir.path}"
        stop = f"stop it first (pid {os.getpid()})"
        if lease is None or lease.version != PROTOCOL_VERSION:
            return f"a sidecar of version {PROTOCOL_VERSION} {where}; this client is version {version}: {stop}"
        if lease.identity != self._config.identity():
            flags = self._config.engine_flags() or "none, but for defaults"
            return f"a sidecar with other settings than this client's {where}: give the same ({flags}), or {stop}"
        return ""

    def _joined(self) -> Status:
        self._leave_at = None
        if self._status.state == "failed":  # whoever comes may have mended the reason
            self._model_dir = ""
            self._generation += 1
            self._failures = 0
            self._start_at = time.monotonic()
            self._change("starting")
        return self._status

    def _left(self, linger: float) -> None:
        # The last client's own `linger`: whoever started the sidecar may have wished for another, and be long gone.
        if not self._stays and len(self._leases) == 0:
            self._leave_at = time.monotonic() + linger

    def _change(self, state: str, detail: str = "") -> None:
        """Tell the clients, and the log too if it is more than a step of the same work."""
        status, previous = Status(state, self._generation, detail[:_DETAIL_LIMIT], self._model_dir), self._status
        if status == previous:
            return
        self._status = status
        self._leases.tell(status)
        if (state, self._generation) != (previous.state, previous.generation):
            self._say("error" if state == "failed" else "info", f"{state}: {detail}" if detail else state)

    def _say(self, level: str, text: str) -> None:
        self._record([Log(level, "supervisor", line) for line in text.splitlines()])

    def _record(self, logs: list[Log]) -> None:
        for log in logs:
            logging.getLogger(log.source).log(logging.getLevelName(log.level.upper()), "%s", log.line)
            self._leases.log(log)

    @contextlib.contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """Inside, the end of a process wakes the loop and `_STOP_SIGNALS` stop it."""
        woken, waker = socket.socketpair()
        woken.setblocking(False)
        waker.setblocking(False)

        def take() -> None:
            if not set(woken.recv(4096)).isdisjoint(_STOP_SIGNALS):
                self._stop()

        self._selector.register(woken, selectors.EVENT_READ, take)
        previous_waker = signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        numbers = (*_STOP_SIGNALS, signal.SIGCHLD)
        previous = {number: signal.signal(number, lambda *_: None) for number in numbers}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # whoever started us may have blocked them
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_waker)
            self._selector.unregister(woken)
            woken.close()
            waker.close()


def run_foreground(config: EngineConfig, endpoint_dir: Path | None = None, programs: Programs = Programs()) -> None:
    """Serve in ``endpoint_dir`` (default: where clients with ``config`` look) until SIGTERM or Ctrl-C.

    Logs to stderr. Raises Unavailable if a sidecar serves there already, InvalidArgument if the directory is unusable
    or the engine cannot start.
    """
    run_dir = RunDir(endpoint_dir.absolute()) if endpoint_dir is not None else RunDir.of(config)
    with run_dir.locked():
        claim = run_dir.claim()
        if claim is None:
            raise Unavailable(f"a sidecar (pid {run_dir.owner_pid()}) already serves {run_dir.path}")
        run_dir.config.write_bytes(msgspec.json.encode(config))
    _log_to(logging.StreamHandler(), "%(levelname)s %(name)s: %(message)s")
    last = Supervisor(run_dir, claim, config, programs, stays=True).run()
    if last.state == "failed":
        raise InvalidArgument(last.detail)


def main(arguments: Sequence[str], programs: Programs = Programs()) -> None:
    """Serve with the claim that a client made and this process inherited: run directory and two descriptors."""
    run_dir = RunDir(Path(arguments[0]))
    claim = Claim(int(arguments[1]), socket.socket(fileno=int(arguments[2])))
    config = msgspec.json.decode(run_dir.config.read_bytes(), type=EngineConfig)
    path = radix_home() / "logs" / f"{run_dir.path.name}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler: logging.Handler = RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1, encoding="utf-8")
    except OSError as error:  # a server without a writable home: its clients still get the log
        print(f"no log file: {error}", file=sys.stderr)
        handler = logging.NullHandler()
    _log_to(handler, "%(asctime)s %(levelname)s %(name)s: %(message)s")
    Supervisor(run_dir, claim, config, programs).run()


def _log_to(handler: logging.Handler, layout: str) -> None:
    logging.basicConfig(level=logging.DEBUG, format=layout, handlers=[handler], force=True)


if __name__ == "__main__":
    main(sys.argv[1:])
