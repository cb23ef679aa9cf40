"""A version that was never on a node's disk, ready on that node: beside the same from its files.

Three nodes of Ray's own kind on this machine. What is timed is what a starting rank does once its
process is there: fetch or read, pack, compute the first tokens. The link between the nodes is this
machine's loopback; `benchmarks.transfers` has links of a known rate.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.live.publisher import version, weights
from benchmarks.live.rig import NAME
from benchmarks.live.updates import Samples, say

LOAD_S = 300.0
NODES = 3
STORE_BYTES = 1500 << 20


def measure_nodes(args: argparse.Namespace) -> Samples:
    """Time both, on the two nodes that have nothing, in turns; seconds."""
    import ray

    from cluster.weights import client
    from cluster.weights.files import small_files

    told: Samples = {"load_files_s": [], "load_other_node_s": [], "fetch_other_node_s": []}
    files = small_files(args.model)
    with three_nodes() as others:
        ranks = [rank_on(node) for node in others]
        for rank in ranks:  # imports, and whatever is made once
            ray.get(rank.files.remote(str(args.model)), timeout=LOAD_S)
        for number in range(1, 1 + max(3, args.rounds)):
            tensors = weights(args.model, number).items()
            client.publish(version(number), files, tensors, f"{NAME}@1")
            for rank in ranks:
                whole = ray.get(rank.files.remote(str(args.model)), timeout=LOAD_S)
                fetched, ready = ray.get(rank.shelf.remote(version(number)), timeout=LOAD_S)
                told["load_files_s"].append(whole)
                told["fetch_other_node_s"].append(fetched)
                told["load_other_node_s"].append(ready)
                say(f"from files {whole:.2f} s; from another node {ready:.2f} s")
            client.withdraw(version(number))
    return told


@contextmanager
def three_nodes() -> Iterator[list[str]]:
    """Start them; this process is on the first, the ids of the others are yielded."""
    with TemporaryDirectory(prefix="rh-") as home:
        os.environ["ROUNDHOUSE_HOME"] = home  # no library: what they get comes by the shelf
        import ray
        from ray.cluster_utils import Cluster

        from cluster.session import NAMESPACE

        size = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
        made = Cluster(initialize_head=True, head_node_args=size)
        try:
            for _ in range(NODES - 1):
                made.add_node(**size)
            made.wait_for_nodes()
            ray.init(made.address, namespace=NAMESPACE, logging_level="warning")
            mine = ray.get_runtime_context().get_node_id()
            yield [told["NodeID"] for told in ray.nodes() if told["NodeID"] != mine]
        finally:
            ray.shutdown()
            made.shutdown()
            del os.environ["ROUNDHOUSE_HOME"]


def rank_on(node: str) -> Any:
    """Return an actor on a node that loads models as a rank does."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Rank:  # in here, so that it travels to the node as it is
        def files(self, directory: str) -> float:
            """Load from files; seconds."""
            import time
            from pathlib import Path

            began = time.monotonic()
            self._load(Path(directory), None)
            return time.monotonic() - began

        def shelf(self, ref: str) -> tuple[float, float]:
            """Load from whatever node has it; seconds until it is here, and until it is ready."""
            import time

            from cluster.weights.client import bring, leave

            began = time.monotonic()
            folder = bring(ref, "rank")
            fetched = time.monotonic()
            self._load(folder, ref)
            leave("rank", ref)
            return fetched - began, time.monotonic() - began

        def _load(self, directory: Any, ref: str | None) -> None:
            import torch

            from cluster.weights.client import fetch
            from serve_apps.engine.model import read_model
            from serve_apps.engine.reading import tensors_of

            torch.set_num_threads(1)
            state = tensors_of(fetch(ref, "rank")) if ref else None
            model = read_model(str(directory), torch.device("cpu"), torch.float32, state=state)
            model.prepare(proven=True)

    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0)(Rank).options(scheduling_strategy=strategy).remote()
