"""Placement arithmetic: what fits, what does not, and what the user is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import NotEnough
from cluster.resources import GIB, Demand, Node, plan

LAPTOP = Node("laptop", cpus=8, cpus_free=8, memory_bytes=16 * GIB, memory_free_bytes=12 * GIB)


def test_what_fits_is_placed() -> None:
    made = plan([Demand("train rank", 1, count=2), Demand("replica", 0.25)], [LAPTOP])
    assert made.fits
    assert made.placed == (
        ("train rank", "laptop"),
        ("train rank", "laptop"),
        ("replica", "laptop"),
    )
    assert str(made.require()) == "fits: 2 x train rank on laptop, 1 x replica on laptop"


def test_a_busy_cluster_is_told_apart_from_a_small_one() -> None:
    busy = Node("laptop", cpus=8, cpus_free=1)
    lacking = plan([Demand("train rank", 1, count=2)], [busy]).lacking
    assert lacking is not None
    assert "wanted: 2 x train rank (1 CPU)" in lacking
    assert "laptop has 1 CPU free of 8 CPU" in lacking
    assert "roundhouse status" in lacking
    small = plan([Demand("train rank", 1, gpus=1)], [LAPTOP])
    assert "a larger machine" in str(small)
    with pytest.raises(NotEnough, match="1 CPU \\+ 1 GPU"):
        small.require()


def test_a_bundle_never_spans_nodes() -> None:
    halves = [Node("a", 4, 4), Node("b", 4, 4)]
    assert not plan([Demand("big", 6)], halves).fits
    assert plan([Demand("big", 3, count=2)], halves).fits


def test_large_bundles_go_first_so_small_ones_do_not_block_them() -> None:
    nodes = [Node("a", 4, 4), Node("b", 2, 2)]
    made = plan([Demand("small", 2), Demand("large", 4)], nodes)
    assert made.placed == (("large", "a"), ("small", "b"))


def test_memory_counts_and_no_node_is_no_place() -> None:
    assert not plan([Demand("rank", 1, memory_bytes=13 * GIB)], [LAPTOP]).fits
    assert "there is no node" in str(plan([Demand("rank", 1)], []))


@given(
    st.lists(st.tuples(st.sampled_from([0.25, 0.5, 1.0, 3.0]), st.integers(1, 4)), max_size=6),
    st.lists(st.integers(1, 8), min_size=1, max_size=4),
)
def test_no_node_is_ever_overdrawn(asked: list[tuple[float, int]], sizes: list[int]) -> None:
    demands = [Demand(f"d{i}", cpus, count=n) for i, (cpus, n) in enumerate(asked)]
    nodes = [Node(f"n{i}", size, size) for i, size in enumerate(sizes)]
    made = plan(demands, nodes)
    cost = {demand.what: demand.cpus for demand in demands}
    for node in nodes:
        assert sum(cost[what] for what, name in made.placed if name == node.name) <= node.cpus
    assert made.fits == (len(made.placed) == sum(d.count for d in demands))
