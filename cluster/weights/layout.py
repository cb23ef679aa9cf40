"""The shelf's format, as data: a version is its small files and its tensors, by content.

A tensor lies on the shelf under the SHA-256 of its bytes, whole or cut into equal parts along one
dimension. What two versions have in common lies there once, and a reader proves what it got.
NumPy has no bfloat16 and no float8: such tensors lie there as unsigned integers of their width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import ConfigError, Corrupt
from cluster.library.ref import Update

Array = NDArray[Any]

STORED = {
    **{name: name for name in ("float64", "float32", "float16", "bool")},
    **{name: name for name in ("int64", "int32", "int16", "int8", "uint8")},
    "bfloat16": "uint16",
    "float8_e4m3fn": "uint8",
    "float8_e5m2": "uint8",
}
"""By torch's name of a dtype: what NumPy stores it as."""

CutPlan = Mapping[str, tuple[int, int]]
"""By tensor: the dimension to cut, and into how many equal parts."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that lie in the object store: a tensor, or a part of one."""

    sha256: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a version."""

    dtype: str
    """Torch's name, as ``bfloat16``."""
    shape: tuple[int, ...]
    """Of the whole."""
    pieces: tuple[Piece, ...]
    """Its parts along ``dim`` in their order; one piece is the whole."""
    dim: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """Shape of each piece."""
        return cut_shape(self.shape, self.dim, len(self.pieces))


@dataclass(frozen=True)
class Bundle:
    """A version on the shelf: all that a replica needs to answer with it."""

    ref: str
    """``name@3``, or ``name@run.<id>.<step>`` of a run that has not published it."""
    files: Mapping[str, bytes]
    """Configuration, tokenizer, template: whatever is no tensor."""
    tensors: Mapping[str, Tensor]
    base: str | None = None
    """The library version that it was made from."""
    created: float = 0.0
    """Seconds since the epoch."""
    update: Update | None = None
    """What becomes of running requests when it goes live, where its run has said so."""

    @property
    def pieces(self) -> dict[str, int]:
        """Bytes of each different piece by its hash."""
        return {p.sha256: p.nbytes for t in self.tensors.values() for p in t.pieces}

    @property
    def nbytes(self) -> int:
        """Bytes of its different pieces."""
        return sum(self.pieces.values())

    @property
    def digest(self) -> str:
        """Identity of the content: equal files and tensors give an equal digest."""
        told = {
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()},
            "tensors": {
                name: [one.dtype, one.shape, one.dim, [piece.sha256 for piece in one.pieces]]
                for name, one in self.tensors.items()
            },
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def form_key(ref: str, form: str) -> str:
    """Return what a node's shelf calls a version as a certain reader prepares it.

    Such a form stays on its node, and goes as soon as its last user has left.
    """
    return f"{ref}#{form}"


def is_form(key: str) -> bool:
    """Say whether a key of the shelf is that of a form."""
    return "#" in key


def cut_shape(shape: tuple[int, ...], dim: int, parts: int) -> tuple[int, ...]:
    """Return the shape of each of ``parts`` equal parts along ``dim``; ConfigError if it is not."""
    if parts == 1:
        return shape
    if not 0 <= dim < len(shape) or shape[dim] % parts:
        raise ConfigError(
            f"a tensor of shape {shape} cannot be cut into {parts} equal parts along dimension "
            f"{dim}; choose a number that divides it"
        )
    return (*shape[:dim], shape[dim] // parts, *shape[dim + 1 :])


def cut(array: Array, dim: int, parts: int) -> Iterator[Array]:
    """Yield equal parts, each contiguous; one part is the array itself where it is contiguous."""
    size = cut_shape(array.shape, dim, parts)[dim] if parts > 1 else 0
    for at in range(parts):
        index = (slice(None),) * dim + (slice(at * size, (at + 1) * size),)
        yield np.ascontiguousarray(array if parts == 1 else array[index])


def joined(tensor: Tensor, pieces: Mapping[str, Array]) -> Array:
    """Return a whole tensor from its pieces by hash: one piece is not copied."""
    parts = [pieces[piece.sha256].reshape(tensor.piece_shape) for piece in tensor.pieces]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=tensor.dim)


def share(tensor: Tensor, pieces: Mapping[str, Array], rank: int, ranks: int, dim: int) -> Array:
    """Return what ``rank`` of ``ranks`` has of a tensor cut along ``dim``.

    Where it lies there cut so, only those pieces are touched.
    """
    parts = len(tensor.pieces)
    if tensor.dim == dim and parts % ranks == 0 and parts > 1:
        each = parts // ranks
        mine = tensor.pieces[rank * each : (rank + 1) * each]
        arrays = [pieces[piece.sha256].reshape(tensor.piece_shape) for piece in mine]
        return arrays[0] if each == 1 else np.concatenate(arrays, axis=dim)
    size = cut_shape(tensor.shape, dim, ranks)[dim]
    index = (slice(None),) * dim + (slice(rank * size, (rank + 1) * size),)
    part: Array = joined(tensor, pieces)[index]
    return part


def hash_of(array: Array) -> str:
    """Return the SHA-256 of a contiguous array's bytes."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def check(piece: Piece, array: Array) -> None:
    """Raise Corrupt where an array is not what the layout says."""
    if array.nbytes != piece.nbytes or hash_of(array) != piece.sha256:
        raise Corrupt(
            f"a shard of {piece.nbytes} bytes differs from its hash {piece.sha256[:12]}: it was "
            "damaged on its way; publish the version again"
        )


def array_of(tensor: Any) -> Array:
    """Return a contiguous CPU tensor's memory as an array of the stored type, without a copy."""
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    if name not in STORED:
        raise ConfigError(f"a tensor of {name} cannot lie on the shelf; take one of {_known()}")
    plain = tensor.detach().cpu().contiguous()
    array: Array = plain.view(getattr(torch, STORED[name])).numpy()
    return array


def tensor_of(array: Array, dtype: str) -> Any:
    """Return an array of the stored type as a torch tensor on the same memory.

    What comes from the object store is shared with every process of its node. Torch does not know
    that it may not be written: nothing may work in place on it.
    """
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        tensor = torch.from_numpy(array)
    return tensor.view(getattr(torch, dtype))


def _known() -> str:
    return ", ".join(sorted(STORED))
