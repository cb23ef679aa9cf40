"""Puts versions on the shelf from an actor of the cluster: noise on the model's weights.

One JSON question a line: ``{"make": 3}`` computes the weights of ``live@run.bench.3``,
``{"put": 3}`` puts them there, ``{"withdraw": 3}`` takes them away, ``{"replicas": true}`` tells
how many of them are in which state, and ``{"status": true}`` the bytes on the shelf and in use by
the object store.
"""

from __future__ import annotations

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

PUT_S = 120.0


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


class Trainer:
    """An actor that puts weights on the shelf; shares cores as a trainer's ranks do."""

    def __init__(self, model: Path) -> None:
        from cluster.weights.files import small_files

        os.nice(19)
        torch.set_num_threads(1)  # two of them would wait for each other beside busy ranks
        self._model, self._files = model, small_files(model)
        self._made: dict[int, dict[str, torch.Tensor]] = {}

    def make(self, number: int) -> int:
        """Compute the weights of a version."""
        self._made[number] = weights(self._model, number)
        return number

    def put(self, number: int) -> dict[str, Any]:
        """Put a version on the shelf; return how long that took, until when, and its bytes."""
        from cluster.weights import client

        # as many different weights as were made; their versions have numbers of their own
        tensors = self._made[sorted(self._made)[(number - 1) % len(self._made)]]
        began = time.monotonic()
        bundle = client.publish(version(number), self._files, tensors.items(), f"{NAME}@1")
        now = time.monotonic()
        return {"seconds": now - began, "at": now, "bytes": bundle.nbytes}


def main() -> int:
    """Answer until the input ends."""
    from cluster.session import connect, current

    connect(current())  # before Ray is imported
    import ray
    from ray import serve

    from cluster.weights import client
    from cluster.weights.actors import CALL_S, agents, asked

    trainer: Any = ray.remote(num_cpus=0)(Trainer).remote(Path(sys.argv[1]))
    _say({"ready": True})
    for line in sys.stdin:
        question: dict[str, Any] = json.loads(line)
        if "make" in question:
            _say({"made": asked(trainer.make.remote(question["make"]), PUT_S)})
        elif "put" in question:
            _say(asked(trainer.put.remote(question["put"]), PUT_S))
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


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    sys.exit(main())
