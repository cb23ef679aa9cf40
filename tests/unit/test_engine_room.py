"""Memory that packed weights lie in, one version after the other."""

from __future__ import annotations

import gc

import torch

from serve_apps.engine.native import room as rooms
from serve_apps.engine.native.layout import PANEL, Kept, matrix, panels
from serve_apps.engine.native.room import ALIGN, CHUNK_BYTES, KEEP_S, Room, Rooms


class User:
    """Has tensors in a room."""

    def __init__(self, room: Room) -> None:
        self.tensors = [room.empty((3, 5), torch.float32), room.empty((7,), torch.bfloat16)]


class Clock:
    """Seconds that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_tensors_lie_side_by_side_and_do_not_touch() -> None:
    room = Room()
    made = [room.empty((n, 3), torch.float32) for n in (1, 50, 0, 7)]
    made.append(room.empty((CHUNK_BYTES + 1,), torch.uint8))
    for n, tensor in enumerate(made):
        assert tensor.data_ptr() % ALIGN == 0 or not tensor.numel()
        tensor.fill_(n)
    assert all((tensor == n).all() for n, tensor in enumerate(made))
    assert room.nbytes >= 2 * CHUNK_BYTES + 1


def test_the_next_version_lies_where_one_lay_that_is_gone() -> None:
    kept = Rooms()
    first = kept.room()
    user = User(first)
    where = [tensor.data_ptr() for tensor in user.tensors]
    kept.lend(first, user)
    beside = kept.room()
    other = User(beside)
    kept.lend(beside, other)
    assert not set(where) & {tensor.data_ptr() for tensor in other.tensors}
    assert kept.spare_bytes == 0
    del user
    gc.collect()
    assert kept.spare_bytes == first.nbytes
    again = User(kept.room())
    assert [tensor.data_ptr() for tensor in again.tensors] == where
    assert kept.spare_bytes == 0


def test_a_spare_that_nobody_wants_goes_back() -> None:
    clock = Clock()
    kept = Rooms(clock)
    room = kept.room()
    user = User(room)
    kept.lend(room, user)
    del user
    gc.collect()
    clock.now += KEEP_S
    kept.tidy()
    assert kept.spare_bytes
    clock.now += 1
    kept.tidy()
    assert not kept.spare_bytes


def test_packed_weights_are_the_same_wherever_they_lie() -> None:
    made = torch.Generator().manual_seed(3)
    parts = [torch.randn(32, 24, generator=made), torch.randn(16, 24, generator=made)]
    odd = torch.randn(21, 24, generator=made)
    room = Room()
    dirty = room.empty((4096,), torch.uint8)
    dirty.fill_(255)
    room.rewind()
    for weights, partner in ((parts, None), ([odd], None), ([parts[0]], parts[0].neg())):
        for quantization in ("none", "int8"):
            plain, inside = Kept(), Kept(empty=room.empty)
            for kept in (plain, inside):
                matrix(kept, weights, None, quantization, partner)
            for one, other in zip(plain.tensors, inside.tensors, strict=True):
                assert torch.equal(one, other)
    whole = torch.cat(parts)
    packed = panels(whole)
    assert torch.equal(packed.transpose(1, 2).reshape(-1, 24), whole)
    packed = panels(odd)
    assert torch.equal(packed.transpose(1, 2).reshape(-1, 24)[:21], odd)
    assert packed.shape == (2, 24, PANEL)
    assert not packed.transpose(1, 2).reshape(-1, 24)[21:].any()
    assert rooms.CHUNK_BYTES % ALIGN == 0
