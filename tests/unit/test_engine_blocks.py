"""The block pool's promises: every block in one place, and no content under a wrong name."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_apps.engine.blocks import BlockPool, chain, root


def test_keys_tell_apart_all_that_must_not_mix_sc08() -> None:
    ids = list(range(16))
    roots = [
        root("m@1", "", ""),
        root("m@2", "", ""),
        root("m@1", "a@1", ""),
        root("m@1", "", "a@1"),
        root("m@1", "", "tenant"),
        root("m@1', '", "", ""),
    ]
    assert len({*roots, *(chain(r, ids) for r in roots)}) == 12
    assert chain(roots[0], ids) == chain(root("m@1", "", ""), list(ids))
    assert chain(chain(roots[0], ids), ids) != chain(roots[0], ids), "place counts"
    assert chain(roots[0], ids[:8] + ids[8:][::-1]) != chain(roots[0], ids)


def test_a_block_comes_back_by_its_key_until_it_is_needed() -> None:
    pool = BlockPool(3)
    blocks = [pool.take() for _ in range(3)]
    for block in blocks[:2]:
        pool.publish(block, b"%d" % block, "m@1")
        pool.give_back(block)
    pool.check([blocks[2:]])
    assert (pool.available, pool.held, pool.cached) == (2, 1, 2)
    assert pool.find(b"%d" % blocks[0]) == blocks[0]
    pool.share(blocks[0])
    assert pool.take() == blocks[1], "the cached one that nobody holds"
    assert pool.find(b"%d" % blocks[1]) is None
    assert pool.available == 0
    pool.check([[blocks[0]], [blocks[1]], [blocks[2]]])


def test_the_longest_unused_content_is_given_up_first() -> None:
    pool = BlockPool(3)
    blocks = [pool.take() for _ in range(3)]
    for block in blocks:
        pool.publish(block, b"%d" % block, "m@1")
        pool.give_back(block)
    pool.share(blocks[0])
    pool.give_back(blocks[0])
    assert [pool.take() for _ in range(3)] == [blocks[1], blocks[2], blocks[0]]


def test_forgetting_a_version_spares_the_others_sc08() -> None:
    pool = BlockPool(4)
    blocks = [pool.take() for _ in range(4)]
    for n, block in enumerate(blocks):
        pool.publish(block, b"%d" % n, f"m@{n % 2}")
    pool.give_back(blocks[0])
    pool.give_back(blocks[1])
    pool.forget("m@0")
    assert [pool.find(b"%d" % n) for n in range(4)] == [None, blocks[1], None, blocks[3]]
    pool.check([blocks[2:]])
    pool.give_back(blocks[2])
    assert pool.cached == 1, "what was forgotten while it was held is free afterwards"
    pool.check([blocks[3:]])


def test_a_block_is_given_back_once() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.give_back(block)
    with pytest.raises(AssertionError, match="held by nobody"):
        pool.give_back(block)


@settings(max_examples=100, deadline=None)
@given(total=st.integers(1, 12), seed=st.integers(0, 2**32), moves=st.integers(1, 120))
def test_any_traffic_keeps_the_accounts_sc06(total: int, seed: int, moves: int) -> None:
    chance, pool = random.Random(seed), BlockPool(total)
    tables: list[list[int]] = []
    for _ in range(moves):
        match chance.choice(["take", "take", "share", "drop", "publish", "forget"]):
            case "take" if pool.available:
                block = pool.take()
                assert all(block not in t for t in tables)
                tables.append([block])
            case "share" if block := pool.find(b"%d" % chance.randrange(20)):
                pool.share(block)
                tables.append([block])
            case "drop" if tables:
                for block in tables.pop(chance.randrange(len(tables))):
                    pool.give_back(block)
            case "publish" if tables:
                key = chance.randrange(20)
                block = chance.choice(tables)[0]
                if pool.find(b"%d" % key) is None and block not in pool._index.values():
                    pool.publish(block, b"%d" % key, f"m@{key % 2}")
                    assert pool.find(b"%d" % key) == block
            case "forget":
                pool.forget("m@1")
        pool.check(tables)
    for table in tables:
        pool.give_back(table[0])
    pool.check([])
    assert pool.available == total
