"""The manifest of a library version: what it is, where it came from, and every file's hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, StringConstraints

from cluster.config import Frozen
from cluster.library.ref import NAME

MANIFEST = "manifest.json"
CARD = "README.md"
"""The model card: it tells of a version and is no part of what makes it itself."""
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
"""One path component: a version is a flat directory, so nothing can lead out of it."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=rf"^{FILE_NAME.pattern}$")]


class FileEntry(Frozen):
    """One file of a version."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0)]
    """Bytes."""


class Architecture(Frozen):
    """Facts of the network that planning needs before anything is loaded."""

    model_type: str
    architectures: tuple[str, ...] = ()
    parameters: int | None = None
    """Elements of all stored tensors; tied ones count once."""
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    context_length: int | None = None
    vocab_size: int | None = None
    tied_embeddings: bool | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], parameters: int | None) -> Architecture:
        """Read a Hugging Face ``config.json``; what it does not say stays ``None``."""
        text = config.get("text_config")
        inner = text if isinstance(text, dict) else config

        def number(*keys: str) -> int | None:
            values = (inner.get(key) for key in keys)
            return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)

        heads, hidden = number("num_attention_heads", "n_head"), number("hidden_size", "n_embd")
        named = config.get("architectures")
        tied = inner.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        return cls(
            model_type=str(config.get("model_type") or "unknown"),
            architectures=tuple(map(str, named)) if isinstance(named, list) else (),
            parameters=parameters,
            layers=number("num_hidden_layers", "n_layer"),
            hidden=hidden,
            heads=heads,
            kv_heads=number("num_key_value_heads") or heads,
            head_dim=number("head_dim") or (hidden // heads if hidden and heads else None),
            context_length=number("max_position_embeddings", "n_positions"),
            vocab_size=number("vocab_size"),
            tied_embeddings=tied if isinstance(tied, bool) else None,
        )


class Lineage(Frozen):
    """The run that made a version."""

    run_id: str
    config_hash: str
    """SHA-256 of the resolved configuration."""
    data_hashes: dict[str, str] = {}
    """File or data set name to the SHA-256 of its bytes."""
    code_revision: str | None = None
    """Hash of the code package that ran."""
    models: dict[str, str] = {}
    """Versions that it asked beside its base, as ``name@3``, by what they were to it: a teacher."""


class Origin(Frozen):
    """Where an imported version came from."""

    source: str
    """What was imported: a directory's or file's name, a package, or a hub id with its commit."""
    sha256: Sha256 | None = None
    """Hash of the single file that was converted, when there was one."""


class Facts(Frozen):
    """What whoever publishes a version knows about it and the files do not say."""

    kind: Literal["model", "adapter"] = "model"
    base: str | None = None
    """The library version it was made from, as ``name@3``; an adapter must have one."""
    dtype: str | None = None
    """Of the stored weights; read from them when not given."""
    lineage: Lineage | None = None
    origin: Origin | None = None
    metrics: dict[str, float] = {}
    licence: str | None = None
    notes: tuple[str, ...] = ()


class Manifest(Facts):
    """``manifest.json``. A directory without a valid one is not a version."""

    schema_version: Literal[1] = 1
    name: Annotated[str, StringConstraints(pattern=rf"^{NAME.pattern}$")]
    version: PositiveInt
    created: str
    """UTC, ISO 8601."""
    architecture: Architecture
    files: dict[FileName, FileEntry]
    """Every file of the version but the manifest itself."""
    tokenizer: bool
    """Whether a fast tokenizer (``tokenizer.json``) is there."""
    chat_template: bool
    seal: str = ""
    """SHA-256 over all other fields: a flipped byte in the manifest is found as well."""

    @property
    def digest(self) -> str:
        """Identity of the content: equal files give an equal digest, under any name and card."""
        files = sorted((name, entry) for name, entry in self.files.items() if name != CARD)
        parts = (f"{name} {entry.sha256}\n" for name, entry in files)
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def sealed(self) -> Manifest:
        """Return this manifest with its seal."""
        return self.model_copy(update={"seal": _seal(self.model_dump(mode="json"))})


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; ValueError when it is not one, or a byte of it was changed."""
    return parse_manifest(path.read_bytes())


def parse_manifest(raw: bytes) -> Manifest:
    """Read a manifest's bytes; ValueError as above."""
    fields = json.loads(raw)
    manifest = Manifest.model_validate(fields)
    # over the file's own fields: a later release may know more of them
    if manifest.seal != _seal(fields):
        raise ValueError("it differs from its seal")
    return manifest


def _seal(fields: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in fields.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
