"""A model directory as the shelf takes it: safetensors mapped by NumPy, all else as bytes."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from cluster.errors import LibraryError
from cluster.library.intake import INDEX, check_safetensors
from cluster.library.manifest import CARD, MANIFEST
from cluster.weights.layout import STORED, Array, Tensor, hash_of

DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
"""Torch's names by those of safetensors."""


def small_files(directory: Path) -> dict[str, bytes]:
    """Return whatever of a version is neither a tensor nor about its files."""
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.suffix != ".safetensors" and path.name not in {MANIFEST, INDEX, CARD}
    }


def write_files(files: Mapping[str, bytes], directory: Path) -> None:
    """Write small files into a new directory that appears whole, whoever else writes it too."""
    beside = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    beside.mkdir(parents=True)
    try:
        for name, data in files.items():
            (beside / name).write_bytes(data)
        try:
            beside.rename(directory)
        except OSError:
            if not directory.is_dir():  # else another process was faster, with the same files
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def stored_tensors(directory: Path) -> Iterator[tuple[str, str, Array]]:
    """Yield name, torch's dtype and mapped array of each tensor, as the files have them.

    Raises LibraryError for a file that is no safetensors, or a dtype that the shelf cannot hold.
    """
    for path in sorted(directory.glob("*.safetensors")):
        check_safetensors(path)
        with path.open("rb") as reader:
            length = int.from_bytes(reader.read(8), "little")
            header = json.loads(reader.read(length))
        data = np.memmap(path, np.uint8, "r", offset=8 + length)
        for name, told in header.items():
            if name == "__metadata__":
                continue
            dtype = DTYPES.get(told["dtype"])
            if dtype is None:
                raise LibraryError(
                    f"{path.name}: {name} is {told['dtype']}, which the shelf does not hold; "
                    f"serve this version with weights: packed, or convert it to one of "
                    f"{', '.join(sorted(DTYPES))}"
                )
            start, end = told["data_offsets"]
            array = np.frombuffer(data[start:end].tobytes(), STORED[dtype])
            yield name, dtype, array.reshape(told["shape"])


def holds(directory: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Say whether a directory has these tensors and no others, bit for bit.

    Reads until the first that differs. LibraryError as `stored_tensors`.
    """
    left = dict(tensors)
    for name, dtype, array in stored_tensors(directory):
        told = left.pop(name, None)
        if told is None or (told.dtype, told.shape) != (dtype, array.shape):
            return False
        if [piece.sha256 for piece in told.pieces] != [hash_of(array)]:
            return False  # also where it lies on the shelf in parts: then it is read again
    return not left
