"""Who keeps a rank's process: a plain child of this one, or a Ray actor beside the replica."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from serve_apps.engine.wire import RankSpec

FIRST_BUNDLE = 1
"""Bundle 0 of the replica's placement group holds the replica itself; rank n sits in 1 + n."""


class Host(Protocol):
    """One rank's process, running since the host exists."""

    async def ended(self) -> str:
        """Return how the process ended, once it has."""

    def kill(self) -> None:
        """End the process now, stopped or not. Idempotent."""


class ProcessHost:
    """A child process; it dies with this process, by the kernel's hand and by the socket's end."""

    def __init__(self, spec: RankSpec) -> None:
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serve_apps.engine.runner"],
            stdin=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asdict(spec)).encode())
        self._process.stdin.close()

    async def ended(self) -> str:
        """Wait for the child; a thread waits, so that no child watcher of the loop is needed."""
        code = await asyncio.to_thread(self._process.wait)
        return f"was ended by signal {-code}" if code < 0 else f"exited with status {code}"

    def kill(self) -> None:
        """SIGKILL, which ends a stopped process as well."""
        if self._process.poll() is None:
            self._process.kill()


class RankActor:
    """What the Ray actor is: a process that runs one rank."""

    def run(self, spec: dict[str, Any]) -> None:
        """Run the rank to its end; the reference to this call never resolves before that."""
        from cluster import logs
        from serve_apps.engine.runner import run_rank

        logs.speak()
        run_rank(RankSpec(**spec))


class ActorHost:
    """A Ray actor in its bundle of the replica's own placement group (same node: STRICT_PACK).

    Outside a placement group it takes one CPU wherever this node has one.
    """

    def __init__(self, spec: RankSpec) -> None:
        import ray
        from ray.util.scheduling_strategies import (
            NodeAffinitySchedulingStrategy,
            PlacementGroupSchedulingStrategy,
        )

        group = ray.util.get_current_placement_group()
        strategy: Any
        index = FIRST_BUNDLE + spec.rank
        if group is not None and len(group.bundle_specs) > index:
            bundle = group.bundle_specs[index]
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        else:
            bundle = {"CPU": 1}
            node = ray.get_runtime_context().get_node_id()
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        self._ray = ray
        # max_restarts=0: a rank without its weights and requests is no use; the replica is rebuilt
        self._actor = (
            ray.remote(RankActor)
            .options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                max_restarts=0,
                scheduling_strategy=strategy,
            )
            .remote()
        )
        self._run = self._actor.run.remote(asdict(spec))

    async def ended(self) -> str:
        """Wait for the call that lasts as long as the rank."""
        try:
            await self._run
        except self._ray.exceptions.RayError as error:
            return f"died ({str(error).strip().splitlines()[0]})"
        return "ended"

    def kill(self) -> None:
        """Kill the actor's process."""
        self._ray.kill(self._actor, no_restart=True)
