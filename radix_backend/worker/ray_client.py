"""``python -m radix_backend.worker.ray_client FD``: speaks with Ray for the engine, to which FD is a `Connection`.

It reserves a place for each rank, has an actor attend to each but rank 0, and tells how they end. When the engine
closes the connection, or is gone, it leaves the cluster, and Ray ends all of that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import msgspec
import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from radix_backend.errors import RadixError, Unavailable
from radix_backend.process import die_with_parent
from radix_backend.version import __version__
from radix_backend.worker.agent import Place, RankAgent
from radix_backend.worker.ray_placement import Ended, Joined, Placed, Refused, Wish, decode_tasks, decode_wish, encode

_STAGE_SECONDS = 10.0  # for whole stages to find room, before ranks are placed one by one
_TICK = 0.2  # seconds between looks at the engine


def main() -> None:
    die_with_parent()
    connection = Connection(int(sys.argv[1]))
    wish = decode_wish(connection.recv_bytes())
    try:
        _connect(wish)
        connection.send_bytes(encode(Joined()))
        actors, places = _place(wish)
    except RadixError as error:
        connection.send_bytes(encode(Refused(error.code, str(error))))
        return
    connection.send_bytes(encode(Placed(places)))
    with contextlib.suppress(EOFError):
        _attend(connection, actors)
    ray.shutdown()  # the placement group is this job's, and ends with it


def _connect(wish: Wish) -> None:
    where = wish.address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        ray.init(
            address=where,
            namespace=f"radix-backend-{os.getpid()}",
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # of several kinds, whose names say nothing about what is wrong
        found = "this host's, if any" if where == "auto" else where
        raise Unavailable(f"the Ray cluster ({found}) cannot be joined: {_first_line(error)}") from None


def _place(wish: Wish) -> tuple[list[Any], list[Place]]:
    group, slots = _reserve(wish)
    each = 1 if wish.gpus else 0
    # An actor for rank 0 too: it does nothing, but it holds the GPU that the engine's process uses.
    actors = [
        ray.remote(RankAgent)
        .options(num_cpus=1, num_gpus=each, scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle))
        .remote()
        for bundle in slots
    ]
    try:
        answers = ray.get([actor.place.remote() for actor in actors], timeout=wish.patience)
    except ray.exceptions.GetTimeoutError:
        raise Unavailable(f"Ray did not start an actor for each rank within {wish.patience:g} s") from None
    except ray.exceptions.RayError as error:
        raise Unavailable(f"Ray cannot start an actor for each rank: {_last_line(error)}") from None
    places = [msgspec.msgpack.decode(place, type=Place) for _, place in answers]
    for (version, _), place in zip(answers, places, strict=True):
        if version != __version__:
            raise Unavailable(f"radix-backend is {__version__} here and {version} on {place.address}; accepted: one")
    return actors, places


def _reserve(wish: Wish) -> tuple[PlacementGroup, list[int]]:
    """A placement group, and by rank the bundle of it that has its place. Rank 0's is on this host.

    A bundle is never torn between hosts. So whole stages are asked for first: their ranks talk most.
    """
    here = ray.util.get_node_ip_address()
    for ranks_each, patience in {wish.tp_size: min(_STAGE_SECONDS, wish.patience), 1: wish.patience}.items():
        resources = {"CPU": float(ranks_each)} | ({"GPU": float(ranks_each)} if wish.gpus else {})
        bundles = [dict(resources) for _ in range(wish.num_ranks // ranks_each)]
        bundles[0][f"node:{here}"] = 0.001  # every host has 1 of itself
        if ranks_each > 1 and not _may_fit(bundles):
            continue
        group = placement_group(bundles, strategy="PACK")
        if group.wait(patience):
            nodes = placement_group_table(group)["bundles_to_node_id"]
            slots = [bundle for bundle in range(len(bundles)) for _ in range(ranks_each)]
            order = order_by_host([nodes[bundle] for bundle in slots], wish.tp_size)
            return group, [slots[slot] for slot in order]
        remove_placement_group(group)
    kinds = ("GPU", "CPU") if wish.gpus else ("CPU",)
    every, free = ray.cluster_resources(), ray.available_resources()
    hosts = sum(node["Alive"] for node in ray.nodes())
    has = " and ".join(f"{every.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in kinds)
    raise Unavailable(
        f"Ray found no room for {wish.num_ranks} ranks within {wish.patience:g} s: each takes "
        f"{' and '.join(f'1 {kind}' for kind in kinds)}, and rank 0 is on this host, {here}; the cluster has {has} on "
        f"{hosts} host{'s' * (hosts != 1)}"
    )


def _may_fit(bundles: Sequence[dict[str, float]]) -> bool:
    """Whether hosts are large enough, whatever else is on them."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def room(has: dict[str, float], bundle: dict[str, float]) -> int:
        return int(min(has.get(kind, 0) // amount for kind, amount in bundle.items()))

    first = any(room(has, bundles[0]) for has in nodes)
    return first and sum(room(has, bundles[-1]) for has in nodes) >= len(bundles)


def order_by_host(hosts: Sequence[str], tp_size: int) -> list[int]:
    """Which slot each rank gets, where ``hosts`` has the host of each slot: as many stages as can be are on one host.

    Rank 0 gets slot 0.
    """
    by_host: dict[str, list[int]] = {}
    for slot, host in enumerate(hosts):
        by_host.setdefault(host, []).append(slot)
    whole: list[int] = []
    rest: list[int] = []
    for slots in by_host.values():
        cut = len(slots) - len(slots) % tp_size
        whole += slots[:cut]
        rest += slots[cut:]
    return whole + rest if 0 in whole else rest + whole


def _attend(connection: Connection, actors: Sequence[Any]) -> None:
    """Until the engine closes the connection: raises EOFError then."""
    tasks = decode_tasks(connection.recv_bytes())
    refs = {actors[task.rank].attend.remote(encode(task)): task.rank for task in tasks}
    while True:
        done: list[Any] = []
        if refs:
            done, _ = ray.wait(list(refs), timeout=_TICK)
        for ref in done:
            try:
                how = ray.get(ref)
            except ray.exceptions.RayError as error:
                how = f"is lost: {_first_line(error)}"
            connection.send_bytes(encode(Ended(refs.pop(ref), how)))
        if wait([connection], 0 if refs else None):
            connection.recv_bytes()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _last_line(error: BaseException) -> str:
    return _first_line(Exception("\n".join(reversed(str(error).splitlines()))))


if __name__ == "__main__":
    main()
