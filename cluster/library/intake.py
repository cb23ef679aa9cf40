"""What may enter the library: plain data files, checked before anything is mapped or loaded.

Only the names below are taken. Weights are safetensors whose header was read with a size cap and
holds together; pickles, Python code, and configs that name code are refused.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import LibraryError
from cluster.library.manifest import CARD, FILE_NAME, MANIFEST

MAX_HEADER_BYTES = 25_000_000
MAX_JSON_BYTES = 200_000_000
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".npz", ".npy"}
_VOCABULARIES = {"tokenizer.json", "vocab.json", INDEX}
"""JSON whose keys are data: a vocabulary may well hold the word auto_map."""
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ",), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class Intake:
    """The files of a directory that may enter, and what their headers say."""

    files: Mapping[str, Path]
    config: Mapping[str, Any]
    dtype: str | None
    parameters: int
    left_out: tuple[str, ...] = field(default=())
    """Names that were there and are not taken."""

    @property
    def chat_template(self) -> bool:
        """Whether a template is there, in its own file or in the tokenizer's config."""
        if "chat_template.jinja" in self.files:
            return True
        path = self.files.get("tokenizer_config.json")
        return bool(path and _read_json(path).get("chat_template"))


def allowed(name: str) -> bool:
    """Say whether a file of this name may be part of a version."""
    return bool(FILE_NAME.fullmatch(name)) and (
        name.endswith((".safetensors", ".json", ".txt", ".jinja"))
        or name in {"tokenizer.model", CARD}
    )


def inspect(source: Path) -> Intake:
    """Check a model directory; LibraryError names the file, the rule and the way out."""
    if not source.is_dir():
        raise LibraryError(f"{source}: not a directory")
    files, left_out = _select(source)
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights:
        pickles = [name for name in left_out if Path(name).suffix in _PICKLES]
        why = (
            f"{', '.join(pickles[:3])} may run code when loaded and is refused; save the model "
            "again with save_pretrained(), which writes safetensors"
            if pickles
            else "it has no *.safetensors file"
        )
        raise LibraryError(f"{source}: no weights to import: {why}")
    if "config.json" not in files and ADAPTER_WEIGHTS not in files:
        raise LibraryError(f"{source}: config.json is missing, so the architecture is unknown")
    for name, path in files.items():
        if name.endswith(".json") and name not in _VOCABULARIES:
            _refuse_code(_read_json(path), path)
    tensors = {name: check_safetensors(files[name]) for name in weights}
    _check_index(files, tensors, source)
    counts: Counter[str] = Counter()
    for header in tensors.values():
        for dtype, elements in header.values():
            counts[dtype] += elements
    most = counts.most_common(1)[0][0] if counts else None
    return Intake(
        files=files,
        config=_read_json(files["config.json"]) if "config.json" in files else {},
        dtype=_DTYPES.get(most, most.lower()) if most else None,
        parameters=counts.total(),
        left_out=tuple(left_out),
    )


def check_safetensors(path: Path) -> dict[str, tuple[str, int]]:
    """Read a header; return {tensor: (dtype, elements)}.

    The format: eight bytes of header length, a JSON object, then the data, which the tensors'
    offsets cover without a gap or an overlap (https://github.com/huggingface/safetensors).
    """
    size = path.stat().st_size
    with path.open("rb") as reader:
        length = int.from_bytes(reader.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise _not_safetensors(path, f"a header of {length} bytes in a file of {size}")
        raw = reader.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_once)
        header.pop("__metadata__", None)
        return _check_layout(path, header, size - 8 - length)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise _not_safetensors(path, f"its header cannot be read ({error})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that is said twice: two readers could believe two things."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _check_layout(path: Path, header: dict[str, Any], size: int) -> dict[str, tuple[str, int]]:
    at, found = 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if any(not isinstance(side, int) or side < 0 for side in entry["shape"]):
            raise _not_safetensors(path, f"tensor {name!r:.60} has the shape {entry['shape']}")
        elements = math.prod(entry["shape"])
        bits = _BITS.get(entry["dtype"])
        if bits is None:
            raise _not_safetensors(path, f"tensor {name!r:.60} has dtype {entry['dtype']!r:.20}")
        if begin != at or end - begin != -(-elements * bits // 8):
            raise _not_safetensors(path, f"tensor {name!r:.60} does not lie where it must")
        at, found[name] = end, (str(entry["dtype"]), elements)
    if at != size:
        raise _not_safetensors(path, f"its tensors cover {at} of {size} bytes")
    return found


def _not_safetensors(path: Path, why: str) -> LibraryError:
    return LibraryError(
        f"{path}: not a safetensors file: {why}; download or save it again (a pickle or an archive "
        "under that name is refused)"
    )


def _select(source: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the files that may enter and the names that may not."""
    files: dict[str, Path] = {}
    left_out: list[str] = []
    root = source.resolve()
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.name.endswith(".py"):
            raise LibraryError(
                f"{path}: a model directory with Python code is refused; Roundhouse loads "
                "architectures that transformers knows, and never code from a model"
            )
        if entry.name == MANIFEST or not allowed(entry.name):
            left_out.append(entry.name)
            continue
        if entry.is_symlink():
            path = path.resolve()
            if not path.is_relative_to(root):
                raise LibraryError(
                    f"{entry.path}: a link that leaves the directory is refused; copy the files "
                    f"first: cp -rL {source} COPY"
                )
        if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
            left_out.append(entry.name)
            continue
        if twin := next((name for name in files if name.lower() == entry.name.lower()), None):
            raise LibraryError(f"{source}: {twin} and {entry.name} differ in case only; keep one")
        files[entry.name] = path
    return files, left_out


def _check_index(
    files: Mapping[str, Path], tensors: Mapping[str, Mapping[str, Any]], source: Path
) -> None:
    if INDEX not in files:
        if not {"model.safetensors", ADAPTER_WEIGHTS} & set(files):
            raise LibraryError(f"{source}: neither model.safetensors nor {INDEX} is there")
        return
    weight_map = _read_json(files[INDEX]).get("weight_map")
    if not isinstance(weight_map, dict):
        raise LibraryError(f"{files[INDEX]}: weight_map is missing")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or shard not in tensors:
            raise LibraryError(
                f"{files[INDEX]}: {tensor!r:.60} is said to lie in {shard!r:.60}, which is not a "
                "safetensors file of this directory; download or save the model again"
            )
        if tensor not in tensors[shard]:
            raise LibraryError(f"{files[INDEX]}: {tensor!r:.60} is not in {shard}")


def _refuse_code(value: Any, path: Path) -> None:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending += item
        elif isinstance(item, dict):
            if "auto_map" in item or item.get("trust_remote_code"):
                raise LibraryError(
                    f"{path}: auto_map or trust_remote_code asks to run code from the model, "
                    "which is refused; use an architecture that transformers knows and delete it"
                )
            pending += item.values()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise LibraryError(f"{path}: more than {MAX_JSON_BYTES} bytes of JSON are refused")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LibraryError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        # special_tokens_map and the like are objects; a list has nothing that could name code
        return {"": value}
    return value
