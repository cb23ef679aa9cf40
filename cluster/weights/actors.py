"""The rim of the shelf: one detached agent a node, one detached directory, found by name."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Sequence
from typing import Any

from cluster.errors import ClusterError, RoundhouseError
from cluster.session import NAMESPACE
from cluster.weights.agent import Agent
from cluster.weights.directory import WATCH_S, Directory
from cluster.weights.layout import Array, Bundle

FORMAT = 1
"""Part of the actors' names: code that keeps another format has its own."""
DIRECTORY = f"weights-{FORMAT}"
SHARE = 0.6
"""Of a node's object store that versions may take; the rest is everybody else's."""
CALL_S = 60.0
"""Bound of any call that moves no weights."""
MOVE_S = 600.0
"""Bound of one that does."""

log = logging.getLogger(__name__)


class NodeAgent(Agent):
    """What Ray runs on a node: an agent over its object store."""

    def __init__(self, node: str) -> None:
        others = Others(node)
        super().__init__(ObjectStore(), int(SHARE * store_bytes(node)), others)
        others.begin_anew()


class ClusterDirectory(Directory):
    """What Ray runs once: a directory that asks the agents for what it does not know yet."""

    def __init__(self) -> None:
        super().__init__()
        for node, agent in agents().items():
            with contextlib.suppress(RoundhouseError):  # it says so itself when it is back
                for bundle in asked(agent.bundles.remote(), CALL_S):
                    self._bundles[bundle.ref] = bundle
                    self._nodes.setdefault(bundle.ref, set()).add(node)


class ObjectStore:
    """Ray's: this process owns what it puts."""

    def put(self, array: Array) -> Any:
        """See :class:`cluster.weights.agent.Store`."""
        import ray

        return ray.put(array)

    def get(self, references: Sequence[Any]) -> list[Array]:
        """See :class:`cluster.weights.agent.Store`."""
        import ray

        try:
            arrays: list[Array] = ray.get(list(references), timeout=MOVE_S)
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"shards could not be read ({type(error).__name__}): the node that has them is "
                "gone, or too slow; publish the version again"
            ) from None
        return arrays


class Others:
    """The other nodes, as an agent sees them."""

    def __init__(self, node: str) -> None:
        self._node = node

    def begin_anew(self) -> None:
        """Say that this node has nothing: its agent has just begun."""
        open_directory().gone.remote(self._node)

    def find(self, ref: str) -> Bundle | None:
        """See :class:`cluster.weights.agent.Elsewhere`."""
        found = asked(open_directory().find.remote(ref), CALL_S)
        return None if found is None else found[0]

    def references(self, ref: str, pieces: Sequence[str]) -> dict[str, Any]:
        """See :class:`cluster.weights.agent.Elsewhere`."""
        found, wanted = dict[str, Any](), list(pieces)
        told = asked(open_directory().find.remote(ref), CALL_S)
        known, nodes = agents(), [] if told is None else told[1]
        random.shuffle(nodes)  # or all would ask the same one
        for node in nodes:
            if node == self._node or node not in known or not wanted:
                continue
            with contextlib.suppress(RoundhouseError):  # another node may have them as well
                some = asked(known[node].some.remote(wanted), CALL_S)
                found |= {piece: inside[0] for piece, inside in some.items()}
                wanted = [piece for piece in wanted if piece not in found]
        return found

    def have(self, bundle: Bundle) -> None:
        """See :class:`cluster.weights.agent.Elsewhere`."""
        asked(open_directory().have.remote([self._node], bundle), CALL_S)

    def lost(self, ref: str) -> None:
        """See :class:`cluster.weights.agent.Elsewhere`."""
        open_directory().lost.remote(self._node, ref)


def open_directory() -> Any:
    """Return the directory's handle, making the actor where there is none."""
    import ray

    return (
        ray.remote(ClusterDirectory)
        .options(
            name=DIRECTORY,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,  # its calls may be repeated
            max_concurrency=1000,
        )
        .remote()
    )


def open_agent(node: str | None = None) -> Any:
    """Return the handle of a node's agent (by default of this node), making it where it is none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = node or this_node()
    return (
        ray.remote(NodeAgent)
        .options(
            name=f"{DIRECTORY}-{node}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=8,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(node)
    )


def agents() -> dict[str, Any]:
    """Return the agents of nodes that are there, by their node."""
    import ray
    from ray.util import list_named_actors

    there, found = {told["NodeID"] for told in ray.nodes() if told["Alive"]}, {}
    for told in list_named_actors(all_namespaces=True):
        name, node = told["name"], told["name"].removeprefix(f"{DIRECTORY}-")
        if told["namespace"] == NAMESPACE and name != node and node in there:
            with contextlib.suppress(ValueError):  # it has just gone
                found[node] = ray.get_actor(name, NAMESPACE)
    return found


def this_node() -> str:
    """Return Ray's id of the node that this process is on."""
    import ray

    node: str = ray.get_runtime_context().get_node_id()
    return node


def store_bytes(node: str) -> int:
    """Return the size of a node's object store."""
    import ray

    until = time.monotonic() + WATCH_S
    while True:
        for told in ray.nodes():
            if told["NodeID"] == node and "object_store_memory" in told["Resources"]:
                return int(told["Resources"]["object_store_memory"])
        if time.monotonic() > until:
            raise ClusterError(f"node {node[:12]} tells no size of its object store")
        time.sleep(0.2)


def asked(reference: Any, timeout_s: float) -> Any:
    """Return what an actor answers; our own errors as they are, all others as ClusterError."""
    import ray

    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RoundhouseError):
            raise error.cause from None
        raise ClusterError(f"the weight shelf failed: {error.cause!r}") from error
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise ClusterError(
            f"the weight shelf did not answer within {timeout_s:g} s ({type(error).__name__}); "
            "`roundhouse status` says which nodes are there; then repeat"
        ) from None
