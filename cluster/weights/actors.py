"""The rim of the shelf: one detached agent a node, one detached directory, found by name."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster import logs
from cluster.errors import ClusterError, RoundhouseError
from cluster.session import DETACHED, NAMESPACE
from cluster.weights.agent import Agent
from cluster.weights.directory import WATCH_S, Directory
from cluster.weights.exchange import LENDS, Loan
from cluster.weights.layout import Array, Bundle

FORMAT = 3
"""Part of the actors' names: code that keeps another format has its own."""
DIRECTORY = f"weights-{FORMAT}"
SHARE = 0.6
"""Of a node's object store that versions may take; the rest is everybody else's."""
CALL_S = 60.0
"""Bound of any call that moves no weights."""
MOVE_S = 600.0
"""Bound of one that does."""
LEND_CALL_S = 10.0
"""Bound of asking another node for pieces: one that is slower is done without."""
KNOWN_S = 1.0
"""So long an agent takes the nodes that have a version for known."""
ILL_S = 30.0
"""So long it does not ask a node that failed."""
ASKED = 8
"""Nodes that it asks for pieces before it waits."""

log = logging.getLogger(__name__)


class NodeAgent(Agent):
    """What Ray runs on a node: an agent over its object store."""

    def __init__(self, node: str) -> None:
        logs.speak()
        self._others = Others(node)
        super().__init__(ObjectStore(), int(SHARE * store_bytes(node)), self._others)

    def begin(self, parcel: str, pieces: Mapping[str, int]) -> list[str]:
        """See :class:`cluster.weights.agent.Agent`."""
        self._others.settle()
        return super().begin(parcel, pieces)


class ClusterDirectory(Directory):
    """What Ray runs once: a directory that asks the agents for what it does not know yet."""

    def __init__(self) -> None:
        super().__init__()
        # futures: Ray complains of a plain get in an actor with methods that wait
        told = {node: agent.bundles.remote().future() for node, agent in agents().items()}
        until = time.monotonic() + CALL_S
        for node, bundles in told.items():
            with contextlib.suppress(Exception):  # it says so itself when it is back
                for bundle in bundles.result(max(0.1, until - time.monotonic())):
                    self._bundles[bundle.ref] = bundle
                    self._nodes.setdefault(bundle.ref, {})[node] = None


class ObjectStore:
    """Ray's: this process owns what it puts."""

    def put(self, arrays: Sequence[Array]) -> Any:
        """See :class:`cluster.weights.blocks.Store`."""
        import ray

        return ray.put(list(arrays))

    def get(self, references: Sequence[Any]) -> list[list[Array]]:
        """See :class:`cluster.weights.blocks.Store`."""
        import ray

        try:
            objects: list[list[Array]] = ray.get(list(references), timeout=MOVE_S)
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"shards could not be read ({type(error).__name__}): the node that has them is "
                "gone, or too slow; publish the version again"
            ) from None
        return objects

    def spilled(self, references: Sequence[Any]) -> list[bool]:
        """See :class:`cluster.weights.blocks.Store`. This process owns them, and so knows."""
        from ray.experimental import get_local_object_locations

        told = get_local_object_locations(list(references))
        return [bool(told.get(one, {}).get("did_spill")) for one in references]


class Others:
    """The other nodes, as an agent sees them."""

    def __init__(self, node: str) -> None:
        """Say that this node has nothing: its agent has just begun."""
        self._node = node
        # not waited for here: a directory that has just begun as well asks this agent first
        self._said = open_directory().gone.remote(node)
        self._known: dict[str, tuple[float, list[str]]] = {}  # by version: until when, which nodes
        self._agents: dict[str, Any] = {}
        self._ill: dict[str, float] = {}  # gave what was bad: until when it is not asked
        self._slow: dict[str, float] = {}  # did not answer: until when others are asked first

    def settle(self) -> None:
        """Wait until that is known: said later, it would take back what has come since."""
        try:
            asked(self._said, CALL_S)
        except ClusterError:  # the directory began anew meanwhile
            self._said = open_directory().gone.remote(self._node)
            asked(self._said, CALL_S)

    def find(self, ref: str) -> Bundle | None:
        """See :class:`cluster.weights.agent.Elsewhere`."""
        found = asked(open_directory().find.remote(ref), CALL_S)
        return None if found is None else found[0]

    def offered(self, ref: str) -> Bundle | None:
        """See :class:`cluster.weights.agent.Elsewhere`."""
        import ray

        for told in ray.nodes():
            node = told["NodeID"]
            if not told["Alive"] or node == self._node:
                continue
            with contextlib.suppress(RoundhouseError):  # another node may have it as well
                if asked(open_agent(node).offer.remote(ref), MOVE_S):
                    return self.find(ref)
        return None

    def borrow(self, ref: str, pieces: Sequence[str], most: int, who: str) -> Loan | None:
        """See :class:`cluster.weights.exchange.Lenders`."""
        now, any_busy = time.monotonic(), False
        until, nodes = self._known.get(ref, (0.0, []))
        if now > until:
            nodes = asked(open_directory().nodes.remote(ref), CALL_S)
            fresh = {one: told for one, told in self._known.items() if told[0] > now}
            self._known, self._agents = {**fresh, ref: (now + KNOWN_S, nodes)}, agents()
        known = self._agents
        ill = {node for node, until in dict(self._ill).items() if until > now}
        slow = {node for node, until in dict(self._slow).items() if until > now}
        others = [one for one in nodes if one != self._node and one in known and one not in ill]
        few = some_of([one for one in others if one not in slow] or others)
        silent = set[str]()
        # first whose link nobody uses: two that take from one node get half of it each
        for node, lends in [(node, lends) for lends in range(1, LENDS + 1) for node in few]:
            if node in silent:
                continue
            try:
                told = known[node].lend.remote(pieces, most, who, lends)
                has, found = asked(told, LEND_CALL_S)
            except ClusterError:
                self._slow[node] = now + ILL_S
                silent.add(node)
                any_busy = True  # it may have them
                continue
            if found:
                return Loan(node, found)
            any_busy = any_busy or has
        if not any_busy and len(others) <= ASKED:
            raise ClusterError("nobody has them now")
        return None

    def give_back(self, loan: Loan, who: str, failed: bool) -> None:
        """See :class:`cluster.weights.exchange.Lenders`."""
        if failed:
            self._ill[loan.node] = time.monotonic() + ILL_S
        if agent := self._agents.get(loan.node):
            agent.returned.remote(who)

    def have(self, bundle: Bundle) -> None:
        """See :class:`cluster.weights.agent.Elsewhere`."""
        asked(open_directory().have.remote([self._node], bundle), CALL_S)

    def lost(self, ref: str) -> None:
        """See :class:`cluster.weights.agent.Elsewhere`."""
        open_directory().lost.remote(self._node, ref)


def some_of(nodes: Sequence[str]) -> list[str]:
    """Return a few of the nodes in a random order, the first, which has most, among them."""
    few = [*nodes[:1], *random.sample(nodes[1:], min(len(nodes) - 1, ASKED - 1))] if nodes else []
    random.shuffle(few)
    return few


def open_directory() -> Any:
    """Return the directory's handle, making the actor where there is none."""
    import ray

    return (
        ray.remote(ClusterDirectory)
        .options(
            name=DIRECTORY,
            **DETACHED,
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
            **DETACHED,
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
