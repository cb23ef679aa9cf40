"""Replicas that share their weights: what they take, and how soon another one is ready.

A replica is killed beside one that goes on. Its successor starts from the library's files, or maps
what the other one has on the shelf. The files are in the page cache: a disk would only be slower.
"""

from __future__ import annotations

import argparse
import contextlib
import time

import psutil

from benchmarks.live.rig import Rig, mappings
from benchmarks.live.updates import Samples, say
from cluster.local import home_id
from cluster.processes import of_home

READY_S = 300.0
POLL_S = 0.05
STREAMS = 4
FRONT = "ServeReplica:model-"
"""In the name of each process that is a model's replica."""
WAYS = {"files": "packed", "shelf": "shared"}
"""Where a replica's weights come from, by the setting that says so."""


def measure_memory(rig: Rig, args: argparse.Namespace) -> dict[str, Samples]:
    """Measure each way with 1, 2 and 4 replicas; with 2 of them one is replaced, each round."""
    found: dict[str, Samples] = {}
    for way, weights in WAYS.items():
        told: Samples = {}
        for count in (1, 2, 4):
            with rig.deployed(replicas=count, streams=STREAMS, weights=weights):
                store, ranks = pss_mib(rig)
                told[f"pss_store_mib_{count}"] = [store]
                told[f"pss_ranks_mib_{count}"] = [ranks]
                say(f"{way}, {count} replicas: {store:.0f} MiB shared, ranks {ranks:.0f} MiB")
                if count == 2:
                    told["ready_s"] = [replaced(rig) for _ in range(max(3, args.rounds))]
                    say(f"{way}: a replica is ready after {told['ready_s']} s")
        found[f"memory-{way}"] = told
    return found


def pss_mib(rig: Rig) -> tuple[float, float]:
    """Return MiB of the object store, each page once, and of the ranks in all.

    The kernel divides each page by the number of processes that have it.
    """
    store = ranks = 0
    for process in of_home(home_id(rig.home)):
        is_rank = "RankActor" in process.name
        for name, pss in mappings(process.pid, "Pss"):
            in_store = "plasma" in name
            store += pss if in_store else 0
            ranks += pss if is_rank else 0
    return store / 2**20, ranks / 2**20


def replaced(rig: Rig) -> float:
    """Kill one replica; return the seconds from its successor's start until that is ready."""
    *_, newest = (one for one in of_home(home_id(rig.home)) if FRONT in one.name)
    with contextlib.suppress(psutil.Error):
        psutil.Process(newest.pid).kill()
    began: float | None = None
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        states = rig.shelf(replicas=True)["replicas"]
        if began is None and states.get("STARTING"):
            began = time.monotonic()
        if began is not None and states == {"RUNNING": 2}:
            return time.monotonic() - began
        time.sleep(POLL_S)
    raise RuntimeError(f"a killed replica had no ready successor within {READY_S:g} s")
