"""``python -m radix_backend.engine.offline CONFIG_JSON MODEL_DIR``: the engine without doors, for measuring.

Reads one JSON `Load` a line from stdin, runs it and writes one JSON `Outcome` a line to stdout.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from radix_backend.config import EngineConfig
from radix_backend.engine.kv_cache import KVCache
from radix_backend.engine.request import Request
from radix_backend.engine.scheduler import Scheduler
from radix_backend.load import Load, Outcome, Player
from radix_backend.process import Reporter, freeze_objects, setup_logging
from radix_backend.protocol import RUNNING
from radix_backend.sampling_params import SamplingParams
from radix_backend.worker import create_worker, settle_device
from radix_backend.worker.interface import Ints, Worker


class OfflineEngine:
    """Scheduler and worker in this process, with async scheduling."""

    def __init__(self, config: EngineConfig, worker: Worker) -> None:
        self._worker = worker
        self._depth = config.steps_in_flight
        self.scheduler = Scheduler(
            KVCache(worker.num_pages, config.page_size),
            max_bs=config.max_bs,
            max_batched_tokens=config.max_batched_tokens,
            max_queue_size=config.max_queue_size,
            pp_size=config.pp_size,
        )

    def run(self, load: Load) -> Outcome:
        player = Player(load)
        in_flight = num_steps = 0
        waited = 0.0  # for steps
        while player.playing or in_flight:
            for number, prompt, num_outputs in player.due():
                self._add(number, prompt, num_outputs, load.temperature)
            plan = self.scheduler.schedule()
            if plan is not None:
                self._worker.launch(plan)
                in_flight += 1
            if in_flight == self._depth or (plan is None and in_flight):
                before = player.now()
                result = self._worker.settle()
                waited += player.now() - before
                in_flight -= 1
                num_steps += 1
                self.scheduler.settle(result)
                self._hand_out(player)
        host_seconds = player.now() - player.waited - waited
        return Outcome(player.traces, facts={"steps": num_steps, "host_seconds": round(host_seconds, 4)})

    def _add(self, number: int, prompt: Ints, num_outputs: int, temperature: float) -> None:
        self.scheduler.add(
            Request(
                id=number,
                prompt=prompt,
                params=SamplingParams(max_tokens=num_outputs, temperature=temperature, seed=number),
                stop_token_ids=frozenset(),
                max_tokens=num_outputs,
            )
        )

    def _hand_out(self, player: Player) -> None:
        outputs, self.scheduler.outputs = self.scheduler.outputs, []
        now = player.now()
        for output in outputs:
            if output.token is not None:
                player.take(output.id, (output.token,), now)
            if output.finish != RUNNING:
                player.end(output.id, output.receipt.cached_tokens if output.receipt else None, now)


def main() -> None:
    config = EngineConfig.parse(msgspec.json.decode(sys.argv[1]))
    setup_logging(config.log_level)
    config = settle_device(config)
    worker = create_worker(config, Path(sys.argv[2]), Reporter())
    engine = OfflineEngine(config, worker)
    freeze_objects()
    for line in sys.stdin:
        outcome = engine.run(msgspec.json.decode(line, type=Load))
        sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")
        sys.stdout.flush()
    worker.close()


if __name__ == "__main__":
    main()
