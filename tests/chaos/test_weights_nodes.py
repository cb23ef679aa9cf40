"""Weights on their way between nodes, while a node's agent or the directory is killed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cluster.session import NAMESPACE

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
PIECES, ROWS = 96, 1 << 20
"""Of two bytes each: some 200 MB, so that there is a middle in which to kill."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """Three nodes of Ray's own kind on this machine; this process is on the first."""
    import ray
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 900 << 20}
    made = Cluster(initialize_head=True, head_node_args=size)
    try:
        for _ in range(2):
            made.add_node(**size)
        made.wait_for_nodes()
        ray.init(made.address, namespace=NAMESPACE, logging_level="warning")
        mine = ray.get_runtime_context().get_node_id()
        yield [mine, *(n["NodeID"] for n in ray.nodes() if n["NodeID"] != mine)]
    finally:
        ray.shutdown()
        made.shutdown()


def publish(ref: str) -> Any:
    import torch

    from cluster.weights import client

    drawn = torch.randint(0, 1 << 15, (PIECES, ROWS), dtype=torch.int16)
    return client.publish(
        ref, {"config.json": os.urandom(16)}, ((f"t{n}", drawn[n]) for n in range(PIECES))
    )


def bring(ref: str, node: str) -> Any:
    """Begin to bring a version to a node, whole and checked; resolves to its bytes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def there(ref: str) -> int:
        from cluster.weights import client

        return sum(array.nbytes for array in client.fetch(ref, "test").pieces.values())

    where = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0)(there).options(scheduling_strategy=where).remote(ref)


def status(node: str) -> dict[str, Any]:
    from cluster.weights.actors import CALL_S, agents, asked

    told: dict[str, Any] = asked(agents()[node].status.remote(), CALL_S)
    return told


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def kill(actor: Any) -> None:
    import ray

    ray.kill(actor, no_restart=False)


def test_a_lender_that_is_killed_in_the_middle_is_done_without_and_begins_anew(
    nodes: list[str],
) -> None:
    import ray

    from cluster.weights.actors import agents

    bundle = publish("m@run.a.1")
    _, second, third = nodes
    assert ray.get(bring(bundle.ref, second), timeout=120) == bundle.nbytes
    before = status(second)["given"]
    coming = bring(bundle.ref, third)
    wait_until(lambda: status(second)["given"] > before)
    kill(agents()[second])
    assert ray.get(coming, timeout=240) == bundle.nbytes
    assert ray.get(bring(bundle.ref, second), timeout=240) == bundle.nbytes, "and may again"


def test_the_directory_killed_in_the_middle_knows_all_again(nodes: list[str]) -> None:
    import ray

    from cluster.weights import client
    from cluster.weights.actors import CALL_S, asked, open_directory

    bundle = publish("m@run.a.2")
    coming = [bring(bundle.ref, node) for node in nodes[1:]]
    wait_until(lambda: status(nodes[0])["given"] > 0)
    kill(open_directory())
    assert ray.get(coming, timeout=240) == [bundle.nbytes] * 2
    wait_until(lambda: len(asked(open_directory().refs.remote(), CALL_S).get(bundle.ref, ())) == 3)
    assert asked(open_directory().watch.remote(), CALL_S)["m"] == bundle.ref
    client.withdraw(bundle.ref)
    assert asked(open_directory().find.remote(bundle.ref), CALL_S) is None
