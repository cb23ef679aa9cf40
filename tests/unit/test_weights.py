"""The shelf's bookkeeping and format, without Ray: a dict stands in for the object store."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.errors import ClusterError, ConfigError, Corrupt, NotEnough, UnknownModel
from cluster.library.manifest import Facts
from cluster.library.store import Library
from cluster.weights import blocks, client, exchange
from cluster.weights.agent import SPILL_S, Agent, Taken
from cluster.weights.blocks import read
from cluster.weights.directory import Directory
from cluster.weights.exchange import LEND_S, LENDS, Loan
from cluster.weights.inventory import LEASE_S, PARCEL_S
from cluster.weights.layout import (
    Array,
    Bundle,
    Piece,
    Tensor,
    check,
    cut,
    form_key,
    hash_of,
    joined,
    share,
)
from tests.unit.serving_fixtures import write_model


class Store:
    """Counts what lies in it."""

    def put(self, arrays: Sequence[Array]) -> Any:
        return [array.copy() for array in arrays]

    def get(self, references: Sequence[Any]) -> list[list[Array]]:
        return list(references)

    full = False

    def spilled(self, references: Sequence[Any]) -> list[bool]:
        return [self.full and n == 0 for n, _ in enumerate(references)]


class Network:
    """All nodes of a cluster, by name."""

    def __init__(self) -> None:
        self.agents: dict[str, Agent] = {}
        self.nodes: dict[str, set[str]] = {}
        self.bundles: dict[str, Bundle] = {}
        self.asked: Counter[str] = Counter()
        """Pieces that each node has given to others."""

    def join(self, name: str, budget: int, clock: Any, library: Any = None) -> Agent:
        self.agents[name] = Agent(Store(), budget, View(self, name), library, clock)
        return self.agents[name]


class View:
    """The others, as one node sees them."""

    def __init__(self, network: Network, name: str) -> None:
        self.network, self.name = network, name
        self.ill: set[str] = set()

    def find(self, ref: str) -> Bundle | None:
        return self.network.bundles.get(ref)

    def offered(self, ref: str) -> Bundle | None:
        others = [agent for name, agent in self.network.agents.items() if name != self.name]
        return self.find(ref) if any(agent.offer(ref) for agent in others) else None

    def borrow(self, ref: str, pieces: Sequence[str], most: int, who: str) -> Loan | None:
        nodes, busy = sorted(self.network.nodes.get(ref, set()) - {self.name} - self.ill), False
        random.shuffle(nodes)
        for node in nodes:
            has, some = self.network.agents[node].lend(pieces, most, who)
            self.network.asked[node] += len(some)
            if some:
                return Loan(node, some)
            busy = busy or has
        if not busy:
            raise ClusterError("nobody has them")
        return None

    def give_back(self, loan: Loan, who: str, failed: bool) -> None:
        self.network.agents[loan.node].returned(who)
        if failed:
            self.ill.add(loan.node)

    def have(self, bundle: Bundle) -> None:
        self.network.bundles[bundle.ref] = bundle
        self.network.nodes.setdefault(bundle.ref, set()).add(self.name)

    def lost(self, ref: str) -> None:
        self.network.nodes.get(ref, set()).discard(self.name)
        if not self.network.nodes.get(ref):
            self.network.bundles.pop(ref, None)


class Clock:
    """Seconds that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Aliases:
    """A library in which some versions are meant by an alias."""

    def __init__(self, **numbers: int) -> None:
        self.numbers = numbers

    def aliases(self, name: str) -> dict[str, int]:
        return {"champion": self.numbers[name]} if name in self.numbers else {}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def array(seed: int, size: int = 100) -> Array:
    return np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)


def bundle_of(ref: str, *arrays: Array) -> Bundle:
    tensors = {
        f"t{n}": Tensor("uint8", a.shape, (Piece(hash_of(a), a.nbytes),))
        for n, a in enumerate(arrays)
    }
    return Bundle(ref, {"config.json": b"{}"}, tensors)


def put(agent: Agent, ref: str, *arrays: Array) -> Bundle:
    bundle = bundle_of(ref, *arrays)
    by_hash = {hash_of(a): a for a in arrays}
    agent.put(ref, {piece: by_hash[piece] for piece in agent.begin(ref, bundle.pieces)})
    agent.finish(ref, bundle)
    return bundle


def lying(taken: Taken) -> bool:
    """Say whether what was taken is what lies there."""
    bundle, places = taken
    arrays = read(Store(), [places[piece] for piece in bundle.pieces])
    return [hash_of(a) for a in arrays] == list(bundle.pieces)


def test_small_pieces_lie_together_and_go_together(clock: Clock) -> None:
    agent = Network().join("a", 64 << 20, clock)
    large = array(0, blocks.ALONE_BYTES)
    small = [array(n, 1000) for n in range(1, 101)]
    put(agent, "m@1", *small[:50], large, *small[50:])
    put(agent, "m@2", small[0], array(200))
    references = {id(place.reference) for place in agent._places.values()}
    assert len(references) == 3
    assert lying(agent.take("m@1", "r"))
    assert lying(agent.take("m@2", "r"))
    agent.drop("m@1")
    assert lying(agent.take("m@2", "r")), "a piece that another version has stays readable"
    assert agent.status()["bytes"] == 1100
    agent.drop("m@2")
    assert not agent._places


def test_a_block_is_no_larger_than_it_should_be() -> None:
    arrays = {str(n): array(n, blocks.ALONE_BYTES - 1) for n in range(20)}
    made = list(blocks.blocks(arrays))
    assert [len(block) for block in made] == [9, 9, 2]
    assert {name: value.nbytes for block in made for name, value in block.items()} == {
        name: value.nbytes for name, value in arrays.items()
    }


def test_a_cut_tensor_joins_to_itself_and_each_rank_finds_its_share() -> None:
    whole = np.arange(48, dtype=np.float32).reshape(6, 8)
    for dim, parts in ((0, 1), (0, 3), (1, 4)):
        made = list(cut(whole, dim, parts))
        pieces = {hash_of(part): part.reshape(-1) for part in made}
        told = tuple(Piece(hash_of(part), part.nbytes) for part in made)
        tensor = Tensor("float32", whole.shape, told, dim)
        assert np.array_equal(joined(tensor, pieces), whole)
        halves = [share(tensor, pieces, rank, 2, 1) for rank in range(2)]
        assert np.array_equal(np.concatenate(halves, axis=1), whole)
    with pytest.raises(ConfigError, match=r"\(6, 8\) cannot be cut into 4"):
        list(cut(whole, 0, 4))


def test_a_rank_whose_share_lies_there_touches_no_other_piece() -> None:
    whole = np.arange(48, dtype=np.float32).reshape(6, 8)
    made = list(cut(whole, 0, 6))
    told = tuple(Piece(hash_of(part), part.nbytes) for part in made)
    tensor = Tensor("float32", whole.shape, told, 0)
    mine = {hash_of(part): part for part in made[4:]}
    assert np.array_equal(share(tensor, mine, 2, 3, 0), whole[4:])


def test_RC02_one_flipped_bit_is_found_before_anything_computes_with_it() -> None:
    good = array(1)
    piece = Piece(hash_of(good), good.nbytes)
    check(piece, good)
    bad = good.copy()
    bad[57] ^= 1
    with pytest.raises(Corrupt, match=r"differs from its hash"):
        check(piece, bad)
    with pytest.raises(Corrupt, match=r"100 bytes"):
        check(piece, good[:50])


def test_what_two_versions_share_lies_there_once(clock: Clock) -> None:
    agent = Network().join("a", 1000, clock)
    put(agent, "m@1", array(1), array(2))
    second = bundle_of("m@2", array(1), array(3))
    assert agent.begin("p", second.pieces) == [hash_of(array(3))]
    agent.put("p", {hash_of(array(3)): array(3)})
    agent.finish("p", second)
    assert agent.status()["bytes"] == 300
    agent.drop("m@1")
    assert agent.status()["bytes"] == 200
    assert lying(agent.take("m@2", "r"))


def test_the_longest_unused_goes_and_what_is_used_or_meant_stays(clock: Clock) -> None:
    agent = Network().join("a", 400, clock, Aliases(kept=1))
    put(agent, "kept@1", array(1))
    for at, ref in enumerate(("m@1", "m@2", "m@3"), 2):
        clock.now += 1
        put(agent, ref, array(at))
    agent.take("m@1", "replica")
    clock.now += 1
    put(agent, "m@4", array(9))
    assert set(agent.status()["versions"]) == {"kept@1", "m@1", "m@3", "m@4"}
    agent.take("m@3", "replica")
    agent.take("m@4", "replica")
    with pytest.raises(NotEnough, match=r"in use: m@1, m@3, m@4, kept@1 \(an alias means it\)"):
        put(agent, "m@5", array(11))
    assert set(agent.status()["versions"]) == {"kept@1", "m@1", "m@3", "m@4"}, "nothing changed"
    clock.now += LEASE_S + 1
    put(agent, "m@5", array(11))
    assert "m@5" in agent.status()["versions"]


def test_a_lease_that_is_renewed_holds_and_says_what_is_gone(clock: Clock) -> None:
    agent = Network().join("a", 200, clock)
    put(agent, "m@1", array(1))
    agent.take("m@1", "replica")
    for _ in range(3):
        clock.now += LEASE_S - 1
        assert agent.renew("replica", ["m@1"]) == []
    with pytest.raises(NotEnough):
        put(agent, "m@2", array(2, 150))
    agent.leave("replica", "m@1")
    put(agent, "m@2", array(2, 150))
    assert agent.renew("replica", ["m@1"]) == ["m@1"]


def test_RC03_what_a_dead_writer_left_goes_and_a_second_try_succeeds(clock: Clock) -> None:
    agent = Network().join("a", 250, clock)
    bundle = bundle_of("m@1", array(1), array(2))
    agent.begin("dead", bundle.pieces)
    agent.put("dead", {hash_of(array(1)): array(1)})
    with pytest.raises(UnknownModel):
        agent.take("m@run.x.1", "replica")
    with pytest.raises(NotEnough):
        agent.begin("other", {"x" * 64: 200})
    clock.now += PARCEL_S + 1
    agent.begin("other", {"x" * 64: 200})
    assert agent.status()["bytes"] == 0
    agent.abandon("other")
    put(agent, "m@1", array(1), array(2))
    assert agent.take("m@1", "replica")[0] == bundle


def test_a_node_gets_what_it_lacks_from_others_checked(clock: Clock) -> None:
    network = Network()
    a, b = network.join("a", 1000, clock), network.join("b", 1000, clock)
    one, two = array(1), array(2)
    bundle = bundle_of("m@run.x.1", one, two)
    # two ranks of a trainer on two nodes, each with its part
    for agent, part in ((a, one), (b, two)):
        agent.begin("p", {hash_of(part): part.nbytes})
        agent.put("p", {hash_of(part): part})
    for name, agent in network.agents.items():
        agent.finish("p", bundle, tell=False)
        network.nodes.setdefault(bundle.ref, set()).add(name)
    network.bundles[bundle.ref] = bundle
    c = network.join("c", 1000, clock)
    for agent in (a, b, c):
        assert lying(agent.take(bundle.ref, "replica"))
    assert c.status()["bytes"] == 200


def test_a_lender_whose_memory_fails_is_done_without(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "LOST_S", 0.2)
    network = Network()
    agents = [network.join(name, 1000, clock) for name in "abc"]
    bad = put(agents[0], "m@run.x.2", array(5))
    reference, at = agents[0]._places[hash_of(array(5))]
    reference[at][3] ^= 1
    with pytest.raises(Corrupt, match="differs from its hash"):
        agents[2].take(bad.ref, "replica")
    assert "m@run.x.2" not in agents[2].status()["versions"]
    put(agents[1], "m@run.x.2", array(5))
    network.join("d", 1000, clock).take(bad.ref, "replica")
    assert network.asked["b"] == 1


def test_a_node_lends_to_few_at_once_and_forgets_who_fell_silent(clock: Clock) -> None:
    agent = Network().join("a", 1000, clock)
    bundle = put(agent, "m@run.x.1", array(1), array(2), array(3))
    pieces = list(bundle.pieces)
    has, lent = agent.lend(pieces[1:], 150, "b")
    assert (has, list(lent)) == (True, pieces[1:2]), "in their order, about so many bytes"
    for n in range(1, LENDS):
        assert agent.lend(pieces, 1000, f"c{n}")[1]
    assert agent.lend(pieces, 1000, "d") == (True, {}), "busy"
    assert agent.lend(["x" * 64], 1000, "d") == (False, {})
    assert agent.lend(pieces, 1000, "b")[1], "who borrows already may on"
    agent.returned("b")
    assert agent.lend(pieces, 1000, "d")[1]
    clock.now += LEND_S + 1
    assert all(agent.lend(pieces, 1000, f"e{n}")[1] for n in range(LENDS))
    assert agent.status()["given"] == 100 + 300 * (2 * LENDS + 1)


def test_T35_a_version_of_the_library_comes_from_its_files_if_these_are_whole(
    clock: Clock, tmp_path: Path
) -> None:
    library = Library(tmp_path / "library")
    version = library.publish("tiny", write_model(tmp_path / "model"), Facts())
    agent = Network().join("a", 1 << 20, clock, library)
    bundle, places = agent.take("tiny@1", "replica")
    assert set(bundle.files) == set(version.manifest.files) - {"model.safetensors"}
    assert lying((bundle, places))
    agent.drop("tiny@1")
    file = version.path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(bytes(data))
    with pytest.raises(Corrupt, match=r"model\.safetensors: differs from its hash"):
        agent.take("tiny@1", "replica")
    assert agent.status()["bytes"] == 0


def test_a_node_without_a_library_gets_what_another_has_in_its_own(
    clock: Clock, tmp_path: Path
) -> None:
    library = Library(tmp_path / "library")
    library.publish("tiny", write_model(tmp_path / "model"), Facts())
    network, nothing = Network(), Library(tmp_path / "nothing")
    network.join("a", 1 << 20, clock, library)
    there = network.join("b", 1 << 20, clock, nothing)
    bundle, places = there.take("tiny@1", "replica")
    assert set(places) == set(bundle.pieces)
    assert "tokenizer.json" in bundle.files
    assert sum(network.asked.values()) == len(places)
    with pytest.raises(UnknownModel):
        there.take("tiny@2", "replica")
    assert not (tmp_path / "nothing").exists()


def test_many_nodes_take_from_each_other_and_not_all_from_the_first(clock: Clock) -> None:
    network = Network()
    arrays = [array(n, 4 << 20) for n in range(20)]  # several groups
    put(network.join("a", 1 << 30, clock), "m@run.x.1", *arrays)
    for name in "bcdef":
        network.join(name, 1 << 30, clock).take("m@run.x.1", "replica")
    assert sum(network.asked.values()) == 5 * len(arrays)
    assert network.asked["a"] < 4 * len(arrays)
    assert len(network.asked) > 2


def spoilt(agent: Agent, ref: str) -> tuple[Bundle, str]:
    """Put a version of two pieces, one of which is not what its hash says; return both."""
    lie = bundle_of(ref, array(2), array(4))
    piece, other = lie.pieces
    agent.begin("parcel", lie.pieces)
    agent.put("parcel", {piece: array(3), other: array(4)})
    agent.finish("parcel", lie)
    return lie, piece


def test_RC02_a_damaged_piece_is_forgotten_with_its_version_and_may_come_again(
    clock: Clock,
) -> None:
    network = Network()
    agent = network.join("a", 10_000, clock)
    good = put(agent, "m@run.x.1", array(1))
    _, piece = spoilt(agent, "m@run.x.2")
    assert agent.damaged(piece)
    assert not agent.damaged(piece), "a second reader finds nothing left to forget"
    assert not agent.damaged(next(iter(good.pieces))), "what is good stays, whatever is said of it"
    assert set(agent.status()["versions"]) == set(network.bundles) == {"m@run.x.1"}
    with pytest.raises(Corrupt, match="differs from its hash, .* publish it again"):
        agent.take("m@run.x.2", "late")
    put(agent, "m@run.x.2", array(2), array(4))
    assert lying(agent.take("m@run.x.2", "reader"))


def test_RC02_who_asks_before_the_directory_has_heard_of_damage_is_told_of_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "LOST_S", 0.2)
    network = Network()
    agent = network.join("a", 10_000, clock)
    _, piece = spoilt(agent, "m@run.x.2")
    with monkeypatch.context() as late:
        late.setattr(View, "lost", lambda view, ref: None)
        assert agent.damaged(piece)
    assert "m@run.x.2" in network.bundles
    with pytest.raises(Corrupt, match="a shard of m@run.x.2 on this node differs from its hash"):
        agent.take("m@run.x.2", "late")
    assert not network.bundles


def test_RC02_what_is_damaged_here_comes_from_a_node_that_has_it_whole(clock: Clock) -> None:
    network = Network()
    here, there = network.join("a", 10_000, clock), network.join("b", 10_000, clock)
    lie, piece = spoilt(here, "m@run.x.2")
    put(there, "m@run.x.2", array(2), array(4))
    assert here.damaged(piece)
    assert network.nodes["m@run.x.2"] == {"b"}
    assert lying(here.take("m@run.x.2", "reader"))
    assert network.nodes["m@run.x.2"] == {"a", "b"}
    assert network.bundles["m@run.x.2"].digest == lie.digest


def test_a_node_that_cannot_fetch_the_rest_goes_on_offering_its_part(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "LOST_S", 0.2)
    network = Network()
    here = network.join("a", 10_000, clock)
    both = bundle_of("m@run.x.1", array(1), array(2))
    mine = next(iter(both.pieces))
    here.begin("parcel", {mine: both.pieces[mine]})
    here.put("parcel", {mine: array(1)})
    here.finish("parcel", both)
    with pytest.raises((Corrupt, ClusterError)):
        here.take("m@run.x.1", "reader")
    assert network.nodes["m@run.x.1"] == {"a"}, "the other half is on a node that does not answer"
    put(network.join("b", 10_000, clock), "m@run.x.1", array(1), array(2))
    assert lying(here.take("m@run.x.1", "reader"))


def test_who_uses_a_version_is_counted_until_it_leaves_or_falls_silent(clock: Clock) -> None:
    agent = Network().join("a", 10_000, clock)
    put(agent, "m@1", array(1))
    assert agent.users("m@1") == agent.users("m@2") == 0
    agent.take("m@1", "first"), agent.take("m@1", "second")
    assert agent.users("m@1") == 2
    agent.leave("first", "m@1")
    assert agent.users("m@1") == 1
    clock.now += LEASE_S + 1
    assert agent.users("m@1") == 0


@pytest.mark.parametrize(
    ("users", "taken", "questions"),
    [
        ([0, 0, 1, 2, 1, 0], True, 6),  # two replicas take it, one after the other
        ([0] * 9, False, 4),  # nobody begins
        ([1] * 99, False, 10),  # one does not end
    ],
)
def test_a_run_that_is_over_waits_for_those_who_take_its_weights(
    users: list[int], taken: bool, questions: int, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    left = iter(users)
    agent = SimpleNamespace(users=SimpleNamespace(remote=lambda ref: next(left)))
    monkeypatch.setattr(client, "agents", lambda: {"node": agent})
    monkeypatch.setattr(client, "asked", lambda told, bound: told)
    waits = lambda seconds: setattr(clock, "now", clock.now + 1)  # noqa: E731
    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=clock, sleep=waits))
    assert client.until_taken("m@run.a.1", begin_s=2.5, most_s=10) is taken
    assert len(users) - len(list(left)) == questions


def test_what_is_spilled_is_told(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    agent = Network().join("a", 10_000, clock)
    put(agent, "m@1", array(1))
    assert agent.status()["spilled"] == 0
    Store.full = True
    try:
        clock.now += SPILL_S + 1
        agent.renew("replica", ["m@1"])
        assert "spilled to disk" in caplog.text
        assert agent.status()["spilled"] == array(1).nbytes
    finally:
        Store.full = False


def form(ref: str, seed: int) -> Bundle:
    return bundle_of(form_key(ref, "packed"), array(seed))


def put_form(agent: Agent, bundle: Bundle, made: Array, holder: str) -> Any:
    agent.begin(f"parcel of {holder}", bundle.pieces)
    agent.put(f"parcel of {holder}", {hash_of(made): made})
    return agent.finish_form(f"parcel of {holder}", bundle, holder)


def test_RC10_one_rank_prepares_a_version_and_the_others_wait_for_it(clock: Clock) -> None:
    agent = Network().join("a", 10_000, clock)
    made = form("m@1", 1)
    assert agent.take_form(made.ref, "first") is True
    assert agent.take_form(made.ref, "second") is False
    taken = put_form(agent, made, array(1), "first")
    assert agent.take_form(made.ref, "second") == taken
    assert agent.status()["versions"][made.ref]["users"] == 2


def test_RC10_who_cannot_prepare_it_or_falls_silent_lets_another_one(clock: Clock) -> None:
    agent = Network().join("a", 10_000, clock)
    key = form("m@1", 1).ref
    assert agent.take_form(key, "first") is True
    agent.leave_form(key, "second")  # not its own to leave
    assert agent.take_form(key, "second") is False
    agent.leave_form(key, "first")
    assert agent.take_form(key, "second") is True
    clock.now += PARCEL_S + 1
    assert agent.take_form(key, "third") is True


def test_RC10_a_form_goes_with_its_last_user_even_if_that_one_died(clock: Clock) -> None:
    network = Network()
    agent = network.join("a", 10_000, clock)
    put(agent, "m@1", array(1))
    for holder in ("first", "second"):
        put_form(agent, form("m@1", 2), array(2), holder)
    key = form("m@1", 2).ref
    agent.leave("first", key)
    assert agent.status()["pieces"] == 2
    agent.leave("second", key)
    assert agent.status()["pieces"] == 1, "the version itself stays"
    put_form(agent, form("m@1", 2), array(2), "killed")
    clock.now += LEASE_S + 1
    agent.renew("another", [])
    assert key not in agent.status()["versions"]
    assert agent.status()["bytes"] == array(1).nbytes


def test_RC10_a_form_stays_on_its_node(clock: Clock) -> None:
    network = Network()
    agent = network.join("a", 10_000, clock)
    made = form("m@1", 1)
    put_form(agent, made, array(1), "first")
    assert agent.bundles() == []
    assert not network.bundles
    assert network.join("b", 10_000, clock).take_form(made.ref, "other") is True


class Called:
    """An agent as `client` reaches it, without the actor between them."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: partial(getattr(self._agent, name), *args))


@pytest.fixture
def node(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Agent:
    agent = Network().join("a", 10_000, clock)
    monkeypatch.setattr(client, "open_agent", lambda: Called(agent))
    monkeypatch.setattr(client, "asked", lambda call, timeout_s: call())
    monkeypatch.setattr(client, "ObjectStore", Store)
    return agent


def spoil(agent: Agent, bundle: Bundle) -> None:
    """Flip a bit of what lies there."""
    _, places = agent.take_form(bundle.ref, "spoiler")
    read(Store(), list(places.values()))[0].view(np.uint8)[3] ^= 1


def test_RC02_a_form_that_is_damaged_is_prepared_anew_and_not_for_ever(node: Agent) -> None:
    made = form("m@1", 1)
    put_form(node, made, array(1), "first")
    spoil(node, made)
    assert client.find_form(made.ref, "second") is None, "it is the second one's to prepare"
    put_form(node, made, array(1), "second")
    found = client.find_form(made.ref, "third")
    assert found is not None
    assert [*found.pieces] == [*made.pieces]


def test_RC02_memory_that_damages_every_form_is_told(
    node: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = form("m@1", 1)
    put_form(node, made, array(1), "first")
    damaged, drops = node.damaged, []

    def again(piece: str) -> bool:
        drops.append(damaged(piece))
        put_form(node, made, array(1), "another rank")
        spoil(node, made)
        return drops[-1]

    monkeypatch.setattr(node, "damaged", again)
    spoil(node, made)
    with pytest.raises(Corrupt, match="differs from its hash"):
        client.find_form(made.ref, "second")
    assert drops == [True, True]


@pytest.mark.anyio
async def test_the_directory_knows_the_newest_of_each_run_and_forgets_nodes() -> None:
    directory = Directory()
    first = Bundle("m@run.a.1", {}, {}, None, 1.0)
    second = Bundle("m@run.a.2", {}, {}, None, 2.0)
    await directory.have(["x"], Bundle("m@3", {}, {}, None, 9.0))
    assert await directory.watch({"m": "none"}) == {}, "a version of the library is not live"
    await directory.have(["x", "y"], second)
    await directory.have(["x"], first)
    assert await directory.watch() == {"m": "m@run.a.2"}
    await directory.have(["a"], second)
    assert await directory.nodes("m@run.a.2") == ["x", "y", "a"], "the maker first"
    await directory.gone("a")
    await directory.gone("x")
    assert await directory.refs() == {"m@run.a.2": ["y"]}
    await directory.lost("y", "m@run.a.2")
    assert await directory.find("m@run.a.2") is None


def test_a_folder_of_small_files_is_written_once(tmp_path: Path, monkeypatch: Any) -> None:
    from cluster.weights.client import materialised

    monkeypatch.setenv("ROUNDHOUSE_HOME", str(tmp_path))
    folder = materialised({"config.json": b"{}", "tokenizer.json": b"[]"})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]
    assert materialised({"tokenizer.json": b"[]", "config.json": b"{}"}) == folder
    assert materialised({"config.json": b"{1}"}) != folder
    assert sorted(path.name[0] for path in folder.parent.iterdir()).count(".") == 0
