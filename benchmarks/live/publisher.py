"""A process on the cluster that puts versions on the shelf: noise on the model's weights.

One JSON question a line: ``{"make": 3}`` computes the weights of ``live@run.bench.3``,
``{"put": 3}`` puts them there, ``{"withdraw": 3}`` takes them away, ``{"replicas": true}`` tells
how many of them are in which state, and ``{"status": true}`` the bytes on the shelf and in use by
the object store.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.live.rig import NAME, NOISE
from serve_apps.config import model_app


def version(number: int) -> str:
    """Return the reference of a version."""
    return f"{NAME}@run.bench.{number}"


def weights(model: Path, number: int) -> dict[str, torch.Tensor]:
    """Return the weights of a version: the same for everybody who asks; 0 is the model itself."""
    made = torch.Generator().manual_seed(number)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            noise = torch.randn(tensor.shape, generator=made) * NOISE
            moved = number > 0 and tensor.dim() > 1
            tensors[name] = (tensor.float() + noise).to(tensor.dtype) if moved else tensor
    return tensors


def main() -> int:
    """Answer until the input ends."""
    from cluster.session import connect, current

    model = Path(sys.argv[1])
    connect(current())  # before Ray is imported
    import ray
    from ray import serve

    from cluster.weights import client
    from cluster.weights.actors import CALL_S, agents, asked
    from cluster.weights.files import small_files

    files, made = small_files(model), dict[int, dict[str, torch.Tensor]]()
    torch.set_num_threads(1)  # two of them would wait for each other beside busy ranks
    give_way()
    _say({"ready": True})
    for line in sys.stdin:
        question: dict[str, Any] = json.loads(line)
        if "make" in question:
            made[question["make"]] = weights(model, question["make"])
            _say({"made": question["make"]})
        elif "put" in question:
            # as many different weights as were made; their versions have numbers of their own
            tensors = made[sorted(made)[(question["put"] - 1) % len(made)]]
            began = time.monotonic()
            bundle = client.publish(version(question["put"]), files, tensors.items(), f"{NAME}@1")
            seconds = time.monotonic() - began
            _say({"seconds": seconds, "at": time.monotonic(), "bytes": bundle.nbytes})
        elif "withdraw" in question:
            client.withdraw(version(question["withdraw"]))
            _say({"at": time.monotonic()})
        elif "replicas" in question:
            apps = serve.status().applications
            [told] = apps[model_app(NAME)].deployments.values()
            _say({"replicas": {str(state): n for state, n in told.replica_states.items()}})
        else:
            shelves = [asked(agent.status.remote(), CALL_S) for agent in agents().values()]
            total, free = ray.cluster_resources(), ray.available_resources()
            used = total["object_store_memory"] - free.get("object_store_memory", 0.0)
            _say({"shelf": sum(one["bytes"] for one in shelves), "store": used})
    return 0


def give_way() -> None:
    """Be as low as a trainer's ranks are on a node.

    Linux may share cores out by session first (``autogroup``): within one alone nice has a meaning.
    """
    os.nice(19)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("19")


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    sys.exit(main())
