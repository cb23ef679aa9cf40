"""Weights to many nodes: how long until each of them has a model, by who sends what to whom.

A simulation in slots. In one slot a node may send one tensor and take one, which is what a
full-duplex link can; the storage may send as many as its bandwidth is times a link's. Tensors are
equal in size, as many as a model has matrices. ``storage``: every node reads everything there.
``owner``: every node takes everything from the one that made it. ``in order`` and ``random``: a
node takes any tensor it lacks from any node that has all of it, as Ray's object transfer does (a
copy that is complete is a source), each node in the same order or in one of its own. ``swarm``: the
same out of storage, each tensor read there once or twice. ``bound``: no way is faster.

    python -m benchmarks.distribution --json benchmarks/results/distribution.json
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.env import env_block

LINK = 100e9 / 8
"""Bytes a second of a node's link, each way: 100 Gbit/s."""
STORAGES = (LINK, 10 * LINK)
"""Bytes a second that all nodes together get from the storage."""
NODES = (8, 64, 512)


@dataclass(frozen=True)
class Model:
    """Weights in bfloat16."""

    name: str
    size: float
    """Bytes."""
    tensors: int
    """Large ones: seven of each layer."""


MODELS = (Model("8B", 16e9, 224), Model("70B", 140e9, 560), Model("400B", 800e9, 882))


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate every model on every number of nodes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rows = [row for model in MODELS for nodes in NODES for row in seconds(model, nodes, args.seed)]
    for row in rows:
        times = "  ".join(f"{name} {row[name]:8.1f} s" for name in row if name in WAYS)
        told = (
            f"{row['model']:>5} to {row['nodes']:>3} nodes, storage {row['storage_links']:g} links"
        )
        print(f"{told}:  {times}")
    if args.json:
        result = {
            "schema_version": 1,
            "program": "distribution",
            "command": "python -m benchmarks.distribution",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "env": env_block(),
            "link_bytes_per_s": LINK,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


WAYS = ("storage", "owner", "in order", "random", "swarm", "bound")


def seconds(model: Model, nodes: int, seed: int) -> list[dict[str, Any]]:
    """Return the time of each way, for each storage."""
    slot = model.size / model.tensors / LINK
    same = slots(nodes, model.tensors, seed, ordered=True)
    own = slots(nodes, model.tensors, seed, ordered=False)
    rows = []
    for storage in STORAGES:
        times = storage / LINK
        swarm = slots(nodes, model.tensors, seed, ordered=False, storage=round(times))
        rows.append(
            {
                "model": model.name,
                "nodes": nodes,
                "storage_links": times,
                **{
                    "storage": max(model.size / LINK, nodes * model.size / storage),
                    "owner": (nodes - 1) * model.size / LINK,
                    "in order": same * slot,
                    "random": own * slot,
                    "swarm": swarm * slot,
                    "bound": (model.tensors + math.ceil(math.log2(nodes)) - 1) * slot,
                },
            }
        )
    return rows


def slots(nodes: int, tensors: int, seed: int, ordered: bool, storage: int = 0) -> int:
    """Return the slots until all nodes have all tensors.

    Without ``storage`` node 0 has them from the beginning; else nobody, and the storage sends so
    many in a slot.
    """
    drawn = random.Random(f"{seed}/{nodes}/{tensors}/{ordered}/{storage}")
    everything = range(tensors)
    has = [set[int]() for _ in range(nodes)]
    holders: list[list[int]] = [[] for _ in everything]
    if not storage:
        has[0] = set(everything)
        holders = [[0] for _ in everything]
    wish = [list(everything) for _ in range(nodes)]
    if not ordered:
        for order in wish:
            drawn.shuffle(order)
    for order in wish:
        order.reverse()  # the next one is the last
    waiting = [node for node in range(nodes) if len(has[node]) < tensors]
    taken = 0
    while waiting:
        taken += 1
        drawn.shuffle(waiting)
        busy, read, arrived = set[int](), 0, list[tuple[int, int]]()
        for node in waiting:
            order = wish[node]
            for at in range(len(order) - 1, max(-1, len(order) - 1 - LOOK), -1):
                sources = [one for one in _some(drawn, holders[order[at]]) if one not in busy]
                if sources:
                    busy.add(sources[0])
                elif read < storage:
                    read += 1
                else:
                    continue
                arrived.append((node, order.pop(at)))
                break
        for node, tensor in arrived:  # a copy is a source once it is complete
            has[node].add(tensor)
            holders[tensor].append(node)
        waiting = [node for node in waiting if len(has[node]) < tensors]
    return taken


LOOK = 16
"""Tensors that a node asks about in a slot before it gives up for this one."""
ASKED = 8
"""Sources of a tensor that it asks."""


def _some(drawn: random.Random, holders: Sequence[int]) -> Sequence[int]:
    return holders if len(holders) <= ASKED else drawn.sample(holders, ASKED)


if __name__ == "__main__":
    sys.exit(main())
