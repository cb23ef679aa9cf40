"""Bring a model into the library: from a directory, a GGUF file, or the Hugging Face hub.

Importing the same thing twice gives the version that is there already.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import LibraryError, RoundhouseError
from cluster.library.disk import explained, hash_file, need, staging
from cluster.library.gguf_convert import FACTS
from cluster.library.intake import allowed, inspect
from cluster.library.manifest import Facts, Origin
from cluster.library.source import Source, parse_source
from cluster.library.store import Library, Version

Report = Callable[[str], None]
CONVERT_TIMEOUT_S = 3600.0
HEARTBEAT_S = 5.0
GGUF_GROWTH = 5
"""Bytes of bfloat16 to plan for each byte of GGUF: 16 bits against at least 3.4 a weight."""


@dataclass(frozen=True)
class Imported:
    """What an import gave."""

    version: Version
    new: bool
    """False when the library held the same content already."""


def import_model(
    library: Library,
    source: str,
    name: str | None = None,
    report: Report = lambda _: None,
    random_weights: int | None = None,
) -> Imported:
    """Import ``source`` (see ``parse_source``) as the next version of ``name``.

    With the seed ``random_weights`` the source is a directory without weights, and they are drawn:
    a model to train from the beginning. ``report`` gets lines for the user while it takes its
    time. Raises LibraryError for what cannot be imported and NotEnough when the disk is short;
    then the library is unchanged.
    """
    found = parse_source(source)
    name = name or found.default_name
    library.versions(name)  # a name that breaks the rule is told before the work
    bring = {"hub": from_hub, "gguf": from_gguf, "directory": from_hf_dir}[found.kind]
    with explained(f"import {found.where}", library.root, 0):
        if random_weights is not None:
            return from_config(library, found, name, random_weights, report)
        return bring(library, found, name, report)


def from_hf_dir(library: Library, source: Source, name: str, report: Report) -> Imported:
    """Import a directory that transformers' ``save_pretrained`` or a download made."""
    assert source.path is not None
    if same := library.same_content(name, source.path):
        return Imported(same, new=False)
    taken = inspect(source.path)
    notes = ["imported from a Hugging Face directory"]
    odd = [file for file in taken.left_out if not file.startswith(".")]
    if odd:
        notes.append(f"left out: {', '.join(odd[:12])}")
        report(f"left out, not model data: {', '.join(odd[:12])}")
    if "tokenizer.json" not in taken.files:
        report("no tokenizer.json: this version can be neither served nor trained on text")
    facts = Facts(
        kind="model" if "config.json" in taken.files else "adapter",
        base=_base(library, taken.files.get("adapter_config.json")),
        origin=Origin(source=source.where),
        notes=tuple(notes),
    )
    return Imported(library.publish(name, source.path, facts), new=True)


def from_config(library: Library, source: Source, name: str, seed: int, report: Report) -> Imported:
    """Draw the weights of a directory that has a config.json and a tokenizer only."""
    folder = source.path
    if source.kind != "directory" or folder is None or not (folder / "config.json").is_file():
        raise LibraryError(
            f"{source.where}: random weights need a local directory with a config.json and a "
            "tokenizer.json"
        )
    if weights := sorted(folder.glob("*.safetensors")):
        raise LibraryError(
            f"{folder}: has weights already ({weights[0].name}); import it without "
            "--random-weights, or remove them"
        )
    with staging(library.root) as stage:
        report(f"drawing the weights of {source.where} with seed {seed}")
        out = stage / "drawn"
        _convert("random_weights", [folder, out, seed], stage / "log", report)
        for file in sorted(folder.iterdir()):
            if file.is_file() and allowed(file.name) and not (out / file.name).exists():
                shutil.copyfile(file, out / file.name)
        if same := library.same_content(name, out):
            return Imported(same, new=False)
        note = f"weights drawn with seed {seed}: untrained"
        facts = Facts(origin=Origin(source=source.where), notes=(note,))
        return Imported(library.publish(name, out, facts, move=True), new=True)


def from_gguf(library: Library, source: Source, name: str, report: Report) -> Imported:
    """Dequantise a GGUF file to bfloat16 safetensors and import those."""
    assert source.path is not None
    sha256, size = hash_file(source.path)
    for version in reversed(library.versions(name)):
        if version.manifest.origin and version.manifest.origin.sha256 == sha256:
            return Imported(version, new=False)
    with staging(library.root) as stage:
        need(stage, GGUF_GROWTH * size)
        report(f"converting {source.path.name} ({size / 1e6:.0f} MB) to safetensors")
        started = time.monotonic()
        out = stage / "converted"
        _convert("gguf_convert", [source.path, out], stage / "log", report)
        told = json.loads((out / FACTS).read_text())
        (out / FACTS).unlink()
        report(f"converted in {time.monotonic() - started:.0f} s")
        facts = Facts(
            origin=Origin(source=source.where, sha256=sha256),
            licence=told["licence"],
            notes=(f"weights dequantised from {told['quantisation']} (GGUF) to bfloat16",),
        )
        return Imported(library.publish(name, out, facts, move=True), new=True)


def from_hub(library: Library, source: Source, name: str, report: Report) -> Imported:
    """Download from the Hugging Face hub; the branch is resolved to its commit, which is kept."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(
            source.hub_id, revision=source.revision, files_metadata=True, timeout=15
        )
        commit = str(info.sha)
        where = f"hub:{source.hub_id}@{commit}"
        for version in reversed(library.versions(name)):
            if version.manifest.origin and version.manifest.origin.source == where:
                return Imported(version, new=False)
        files = {f.rfilename: f.size or 0 for f in info.siblings or () if allowed(f.rfilename)}
        if not any(file.endswith(".safetensors") for file in files):
            raise LibraryError(
                f"{where}: the repository has no *.safetensors; other weight files are refused "
                "because loading them may run code"
            )
        with staging(library.root) as stage:
            wanted = sum(files.values())
            need(stage, wanted)
            report(f"downloading {source.hub_id} at {commit[:12]}: {wanted / 1e6:.0f} MB")
            out = stage / "download"
            snapshot_download(
                source.hub_id, revision=commit, allow_patterns=sorted(files), local_dir=out
            )
            licence = getattr(info.card_data, "license", None)
            facts = Facts(
                origin=Origin(source=where),
                licence=str(licence) if licence else None,
                notes=(f"downloaded from {source.hub_id}, commit {commit}",),
            )
            return Imported(library.publish(name, out, facts, move=True), new=True)
    except LibraryError:
        raise
    except Exception as error:
        raise _hub_error(source, error) from error


def _hub_error(source: Source, error: Exception) -> LibraryError:
    """Say what a hub failure means; only what is not ours comes through as it is."""
    from huggingface_hub import constants, errors

    where = source.hub_id + (f"@{source.revision}" if source.revision else "")
    if isinstance(error, errors.GatedRepoError):
        return LibraryError(f"{where}: gated; accept its terms on the hub and set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return LibraryError(f"{where}: the repository has no revision {source.revision}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return LibraryError(f"{where}: no such repository, or a private one without HF_TOKEN")
    if isinstance(error, errors.HFValidationError):
        return LibraryError(f"{where}: not a hub id: {error}")
    # the root of the errors of whichever HTTP client this release of the hub's library uses
    client_error = errors.HfHubHTTPError.__base__ or OSError
    if not isinstance(error, (OSError, client_error)):
        raise error
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE=1 forbids it"
    else:
        why = f"{constants.ENDPOINT} gave no answer ({type(error).__name__})"
    return LibraryError(
        f"{where}: the Hugging Face hub cannot be reached: {why} (HF_ENDPOINT is "
        f"{constants.ENDPOINT}, HF_HUB_OFFLINE is {os.environ.get('HF_HUB_OFFLINE', 'not set')}); "
        "download the model on a machine that can, and import its directory"
    )


def _convert(program: str, arguments: Sequence[Any], log: Path, report: Report) -> None:
    """Run one of our converters as a process; its output goes to ``log``, shown when it fails.

    Its first argument is the source.
    """
    source = arguments[0]
    command = [sys.executable, "-m", f"cluster.library.{program}", *map(str, arguments)]
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    started = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=env
        )
        try:
            while process.poll() is None:
                seconds = time.monotonic() - started
                if seconds > CONVERT_TIMEOUT_S:
                    raise LibraryError(f"{source}: converting took over {CONVERT_TIMEOUT_S:g} s")
                try:
                    process.wait(timeout=HEARTBEAT_S)
                except subprocess.TimeoutExpired:
                    report(f"converting {source.name}: {time.monotonic() - started:.0f} s")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise LibraryError(
            f"{source}: cannot be converted: {lines[-1] if lines else 'no output'} (exit code "
            f"{process.returncode}); check the file, or import a safetensors directory instead"
        )


def _base(library: Library, adapter_config: Path | None) -> str | None:
    """Return the pinned base of an imported adapter: a version of this library."""
    if adapter_config is None:
        return None
    config: dict[str, Any] = json.loads(adapter_config.read_text())
    named = str(config.get("base_model_name_or_path") or "")
    try:
        return library.resolve(named).ref
    except RoundhouseError as error:
        raise LibraryError(
            f"{adapter_config}: base_model_name_or_path is {named!r:.80}, which must be the base's "
            f"reference in this library: import the base, then write its name there ({error})"
        ) from None
