"""Which versions a version was made with, and which name it in turn."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.library.manifest import Manifest


def ref_of(manifest: Manifest) -> str:
    """Return the exact reference of a manifest's version, as ``name@3``."""
    return f"{manifest.name}@{manifest.version}"


def named(manifest: Manifest) -> dict[str, str]:
    """Return the versions that this one names, by what they were to it: base, teacher, ..."""
    others = dict(manifest.lineage.models) if manifest.lineage else {}
    return {"base": manifest.base, **others} if manifest.base else others


def referrers(manifests: Iterable[Manifest], ref: str) -> list[str]:
    """Say which versions name ``ref``, and as what: ``tiny-lora@2 (base)``."""
    return [
        f"{ref_of(manifest)} ({role})"
        for manifest in manifests
        for role, other in named(manifest).items()
        if other == ref and ref_of(manifest) != ref
    ]
