"""Generates load from a process of its own: streams, and notes when what came.

``python -m radix_backend.bench.generator triton|openai URL MODEL`` reads one JSON `Load` a line. It connects, says
"ready", is told when to start (seconds of the monotonic clock, which all processes share), and answers an `Outcome`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

import msgspec

from radix_backend.bench.door import Connection, Door
from radix_backend.load import Load, Outcome, Session, Trace
from radix_backend.process import freeze_objects


def connect_to(kind: str, url: str, model: str) -> Door:
    """The door of a running server; ``kind`` is "triton" (HOST:PORT of gRPC) or "openai" (base URL)."""
    if kind == "triton":
        from radix_backend.bench.triton_door import TritonDoor

        return TritonDoor(url, model)
    from radix_backend.bench.openai_door import OpenAIDoor

    return OpenAIDoor(url, model)


async def drive(door: Door, load: Load) -> Outcome:
    """Run a load; errors of single turns are in their traces."""
    connections = [await door.connect() for _ in load.sessions]
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    start = float(await loop.run_in_executor(None, sys.stdin.buffer.readline))
    freeze_objects()
    await asyncio.sleep(start - time.monotonic())
    cpu = time.process_time()
    traces = await asyncio.gather(
        *(
            _converse(connection, session, load.temperature, start)
            for connection, session in zip(connections, load.sessions, strict=True)
        )
    )
    cpu = time.process_time() - cpu
    for connection in connections:
        await connection.close()
    return Outcome([trace for each in traces for trace in each], {"clients": round(cpu, 3)})


async def _converse(connection: Connection, session: Session, temperature: float, start: float) -> list[Trace]:
    await asyncio.sleep(start + session.arrival - time.monotonic())
    traces: list[Trace] = []
    said: list[int] = []
    sent = session.arrival
    for turn in session.turns:
        said += turn.tokens
        trace = Trace(sent, [], 0, len(said))
        traces.append(trace)
        try:
            said += await connection.ask(said, turn.num_outputs, temperature, len(session.turns) > 1, trace)
        except Exception as error:  # whatever a library raises, it is this turn's result
            trace.error = f"{type(error).__name__}: {error}"
            break
        finally:
            trace.times = [moment - start for moment in trace.times]
        sent = time.monotonic() - start
    return traces


async def main() -> None:
    kind, url, model = sys.argv[1:]
    loop = asyncio.get_running_loop()
    async with connect_to(kind, url, model) as door:
        while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
            outcome = await drive(door, msgspec.json.decode(line, type=Load))
            sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    asyncio.run(main())
