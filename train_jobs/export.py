"""Write a trained model as a library version: the base's files, with new weights in them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import JobError
from cluster.library.manifest import MANIFEST, Facts
from cluster.library.store import Library, Version


def write_model(weights: Mapping[str, Any], base: Path, target: Path) -> None:
    """Write ``weights`` into ``target`` as the safetensors files that ``base`` has.

    Same files, same tensor names, same dtype for each; everything else of the base (tokenizer,
    chat template, configuration) is copied byte for byte. Reads back what it wrote.

    Raises:
        JobError: the base holds a tensor that the live model does not have in that shape.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    target.mkdir(parents=True)
    for source in sorted(base.iterdir()):
        if source.suffix != ".safetensors":
            if source.name != MANIFEST:
                shutil.copyfile(source, target / source.name)
            continue
        with safe_open(source, framework="pt") as stored:
            old = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        for name, tensor in old.items():
            if name not in weights or weights[name].shape != tensor.shape:
                raise JobError(
                    f"{source.name} holds {name} {tuple(tensor.shape)}, which the trained model "
                    "does not have in this shape; this architecture cannot be exported yet"
                )
        tensors = {
            name: weights[name].detach().to("cpu", tensor.dtype).contiguous()
            for name, tensor in old.items()
        }
        save_file(tensors, target / source.name, metadata={"format": "pt"})
        with safe_open(target / source.name, framework="pt") as again:
            for name, tensor in tensors.items():
                if not torch.equal(again.get_tensor(name), tensor):
                    raise JobError(f"{target / source.name}: {name} reads back differently")


def publish(engine: Any, base: Version, name: str, staging: Path, facts: Facts) -> Version:
    """Export the engine's model and add it to the library; rank 0 alone calls it.

    ZeRO 0 and 2 hold the full parameters on every rank, so nothing is gathered.
    """
    shutil.rmtree(staging, ignore_errors=True)
    write_model(engine.module.state_dict(), base.path, staging)
    version = Library().publish(name, staging, facts, move=True)
    shutil.rmtree(staging, ignore_errors=True)
    return version
