"""What the ranks of the tests of live weights run; a folder stands in for the shelf."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from cluster.errors import NotEnough
from cluster.library.manifest import Facts
from cluster.library.store import Library
from cluster.weights.layout import (
    Array,
    Bundle,
    Piece,
    Tensor,
    array_of,
    hash_of,
    joined,
    tensor_of,
)
from tests.parity.training_work import Session
from train_jobs.adapters import merged
from train_jobs.data.dataset import Dataset
from train_jobs.export import gathered, live_tensors
from train_jobs.export_adapter import CONFIG, WEIGHTS, write_adapter
from train_jobs.group import Place
from train_jobs.live import LiveWeights


class Folder:
    """Pieces as files; it refuses the piece after ``room``."""

    def __init__(self, path: Path, rank: int, room: int = 10**9) -> None:
        self.path, self.node, self.room = path, f"node-{rank}", room
        self.most = 0
        """Elements of the largest tensor that this rank was given."""
        self.names: list[str] = []

    def ship(self, parcel: str, tensors: Iterator[tuple[str, torch.Tensor]]) -> dict[str, Tensor]:
        told = {}
        for name, tensor in tensors:
            if len(told) == self.room:
                raise NotEnough(f"{self.node} is full")
            array = array_of(tensor)
            piece = Piece(hash_of(array), array.nbytes)
            (self.path / piece.sha256).write_bytes(pickle.dumps(array))
            dtype = str(tensor.dtype).removeprefix("torch.")
            told[name] = Tensor(dtype, tuple(tensor.shape), (piece,))
            self.names.append(name)
        return told

    def seal(self, shipped: Sequence[tuple[str, str]], bundle: Bundle) -> None:
        (self.path / "bundle").write_bytes(pickle.dumps((shipped, bundle)))

    def until_taken(self, ref: str, begin_s: float, most_s: float) -> bool:
        return False

    def abandon(self, parcel: str) -> None:
        (self.path / f"abandoned-{self.node}").touch()

    def read(self) -> tuple[Bundle, dict[str, torch.Tensor]]:
        _, bundle = pickle.loads((self.path / "bundle").read_bytes())
        pieces: dict[str, Array] = {
            piece: pickle.loads((self.path / piece).read_bytes()) for piece in bundle.pieces
        }
        return bundle, {
            name: tensor_of(joined(tensor, pieces), tensor.dtype)
            for name, tensor in bundle.tensors.items()
        }


def put_live(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, folder: Path
) -> dict[str, Any]:
    """Train; put the weights on the shelf on the way; compare with what an export writes."""
    if place.rank == 0:
        Library(folder / "library").publish("tiny", base, Facts())
    dist.barrier()
    session = Session(place, base, fields, data)
    version = Library(folder / "library").get("tiny", 1)
    shelf = Folder(folder, place.rank)
    live = LiveWeights(version, "tiny", "Demo_Run-1", shelf, "recompute")
    session.train(go_live=lambda progress: live.put(session.engine, progress.step))
    mine = list(shelf.names)
    dist.barrier()
    bundle, stored = shelf.read()
    adapter, model = session.config.adapter, session.engine.module
    if adapter and not adapter.dora:
        write_adapter(model, version.ref, folder / f"adapter-{place.rank}", 0)
        trained = load_file(folder / f"adapter-{place.rank}" / WEIGHTS)
        assert bundle.files[CONFIG] == (folder / f"adapter-{place.rank}" / CONFIG).read_bytes()
    else:
        trained = {
            name: gathered(t, stored[name].dtype, True)
            for name, t in live_tensors(merged(model) if adapter else model).items()
            if name in stored
        }
    return {
        "ref": bundle.ref,
        "base": bundle.base,
        "update": bundle.update,
        "files": sorted(bundle.files),
        "names": sorted(stored),
        "mine": mine,
        "apart": max(float((stored[n].float() - trained[n].float()).abs().max()) for n in stored),
    }


def put_too_much(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, folder: Path
) -> str:
    """One rank's shelf is full in the middle; training goes on."""
    if place.rank == 0:
        Library(folder / "library").publish("tiny", base, Facts())
    dist.barrier()
    session = Session(place, base, fields, data)
    version = Library(folder / "library").get("tiny", 1)
    shelf = Folder(folder, place.rank, room=2 if place.rank == 1 else 10**9)
    live, said = LiveWeights(version, "tiny", "run", shelf), list[str]()

    def go_live(progress: Any) -> None:
        try:
            live.put(session.engine, progress.step)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")

    progress = session.train(go_live=go_live)
    assert progress.step == session.order.steps
    [told] = said
    return told
