"""Write a trained model as a library version: the base's files, with new weights in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import JobError, RoundhouseError
from cluster.library.manifest import CARD, MANIFEST, Facts
from cluster.library.store import Library, Version
from train_jobs.adapters import merged

EXPORT = "export"
"""Where a run's folder holds its model until that is published."""
HELD = "held.json"
"""What the library is to remember of such a model."""


def write_model(weights: Mapping[str, Any], base: Path, target: Path, rank: int = 0) -> None:
    """Write ``weights`` into ``target`` as the safetensors files that ``base`` has.

    Same files, same tensor names, same dtype for each; everything else of the base (tokenizer,
    chat template, configuration) is copied byte for byte. Reads back what it wrote. Where ZeRO 3
    divides the weights every rank calls it, and they are gathered one by one; rank 0 writes.

    Raises:
        JobError: the base holds a tensor that the live model does not have in that shape.
    """
    from safetensors.torch import save_file

    if rank == 0:
        target.mkdir(parents=True)
    for source in sorted(base.iterdir()):
        if source.suffix == ".safetensors":
            tensors = dict(_tensors_of(source, weights, rank))
            if rank == 0:
                save_file(tensors, target / source.name, metadata={"format": "pt"})
                _read_back(target / source.name, tensors)
        elif source.name != MANIFEST and rank == 0:
            shutil.copyfile(source, target / source.name)


def _tensors_of(source: Path, weights: Mapping[str, Any], rank: int) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    with safe_open(source, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 (not a mapping)
            old = stored.get_tensor(name)
            live = weights.get(name)
            # the shape of a parameter that ZeRO 3 divides lies beside it
            if live is None or getattr(live, "ds_shape", live.shape) != old.shape:
                raise JobError(
                    f"{source.name} holds {name} {tuple(old.shape)}, which the trained model "
                    "does not have in this shape; this architecture cannot be exported yet"
                )
            whole = gathered(live, old.dtype, rank == 0)
            if whole is not None:
                yield name, whole


def gathered(tensor: Any, dtype: Any, wanted: bool) -> Any | None:
    """Return a copy of one tensor on the CPU, None where it is not ``wanted``.

    One that ZeRO 3 divides is gathered from all ranks, so each of them calls this.
    """
    import deepspeed

    divided = [tensor] if hasattr(tensor, "ds_id") else []
    with deepspeed.zero.GatheredParameters(divided, enabled=bool(divided)):
        if not wanted:
            return None
        return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def _read_back(path: Path, tensors: Mapping[str, Any]) -> None:
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as again:
        for name in again.keys():  # noqa: SIM118 (not a mapping)
            # transformers may store what it splits or joins when it loads under other names
            if name in tensors and not torch.equal(again.get_tensor(name), tensors[name]):
                raise JobError(f"{path}: {name} reads back differently")


def write_whole(model: Any, base: Path, target: Path, dtype: str, rank: int = 0) -> None:
    """Write a model that is of another kind than its base: with a head of its own.

    All tensors under transformers' names, in ``dtype`` (``float32``, ``bfloat16``), and a new
    config.json with its class and labels; the base's tokenizer and templates are copied byte for
    byte. Reads back what it wrote. Where ZeRO 3 divides the weights every rank calls it.
    """
    import torch

    wide = getattr(torch, dtype)
    whole: dict[int, Any] = {}
    weights: dict[str, Any] = {}
    live = model.state_dict(keep_vars=True)
    divided = any(hasattr(tensor, "ds_id") for tensor in live.values())
    for name, tensor in live.items():
        if id(tensor) not in whole:  # a tied one is the same object under each of its names
            kept = wide if tensor.is_floating_point() else tensor.dtype
            whole[id(tensor)] = gathered(tensor, kept, rank == 0)
        weights[name] = whole[id(tensor)]
    if rank:
        return
    # transformers 5.19 believes that what it loaded under ZeRO 3 had the names of old files
    model.save_pretrained(target, state_dict=weights, save_original_format=not divided)
    told = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(told | {"dtype": dtype}, indent=2) + "\n")
    for source in sorted(base.iterdir()):
        if not (
            (target / source.name).exists()
            or source.suffix == ".safetensors"
            or source.name.endswith(".safetensors.index.json")
            or source.name == MANIFEST
        ):
            shutil.copyfile(source, target / source.name)
    for path in target.glob("*.safetensors"):
        _read_back(path, weights)


def live_tensors(model: Any) -> dict[str, Any]:
    """Return parameters and buffers by name; a tied one under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def publish(
    engine: Any,
    base: Version,
    name: str,
    staging: Path,
    facts: Facts,
    rank: int,
    adapter: bool,
    head: bool = False,
    card: str | None = None,
    hold: bool = False,
    apart: bool = False,
) -> Version | None:
    """Export the engine's model and add it to the library; every rank calls it.

    Only rank 0 gets the version. With ``adapter`` the additions are merged into the base first,
    after which the engine cannot go on training. ``head`` says that the model is another kind
    than its base. ``card`` is the version's README, in place of its base's. With ``hold``
    the model stays in ``staging``, for `publish_held`, and nobody gets a version. With ``apart``
    the additions are published by themselves, and the engine stays as it is.
    """
    divided = engine.zero_optimization_stage() == 3
    if rank and not divided:
        return None
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
    model = merged(engine.module) if adapter and not apart else engine.module
    if apart:
        from train_jobs.export_adapter import write_adapter

        write_adapter(model, base.ref, staging, rank)
    elif head:
        write_whole(model, base.path, staging, base.manifest.dtype or "float32", rank)
    else:
        write_model(live_tensors(model), base.path, staging, rank)
    if rank:
        return None
    if card is not None:
        (staging / CARD).write_text(card)
    if hold:
        (staging.parent / HELD).write_text(facts.model_dump_json())
        return None
    try:
        version = Library().publish(name, staging, facts, move=True)
    except RoundhouseError as error:
        raise JobError(
            f"the model could not be published ({error}); it is whole in {staging}: put that "
            f"right, then `roundhouse models import {staging} --name {name}`"
        ) from error
    shutil.rmtree(staging, ignore_errors=True)
    return version


def publish_held(run: Path, name: str) -> Version:
    """Add the model that a run has kept in its folder to the library.

    Raises:
        JobError: it has kept none.
    """
    try:
        facts = Facts.model_validate_json((run / HELD).read_bytes())
    except FileNotFoundError:
        raise JobError(f"{run}: it holds no model; its run did not come to its end") from None
    version = Library().publish(name, run / EXPORT, facts, move=True)
    shutil.rmtree(run / EXPORT, ignore_errors=True)
    return version
