"""Write what an adapter learnt by itself: peft's two files, with the base that it was made on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.errors import JobError
from train_jobs.export import gathered

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"
"""What peft calls an adapter that nobody named; its files leave that out."""


def write_adapter(model: Any, base: str, target: Path, rank: int = 0) -> None:
    """Write a peft model's LoRA matrices into ``target``, pinned to the library version ``base``.

    Tensors keep their dtype. Reads back what it wrote. Where ZeRO 3 divides the weights every rank
    calls it, and they are gathered one by one; rank 0 writes.

    Raises:
        JobError: nothing was added, or it reads back differently.
    """
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {
        name: gathered(parameter, parameter.dtype, rank == 0)
        for name, parameter in parts_of(model).items()
    }
    if not tensors:
        raise JobError("the model has no adapter to publish; give `adapter: {kind: lora}`")
    if rank:
        return
    target.mkdir(parents=True)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    (target / CONFIG).write_text(config_of(model, base))
    again = load_file(target / WEIGHTS)
    if any(not torch.equal(again[name], tensor) for name, tensor in tensors.items()):
        raise JobError(f"{target / WEIGHTS} reads back differently")


def parts_of(model: Any) -> dict[str, Any]:
    """Return the parameters that LoRA adds to a peft model, under the names of peft's files."""
    return {
        name.replace(f".{NAME}.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def config_of(model: Any, base: str) -> str:
    """Return the text of ``adapter_config.json``, pinned to the library version ``base``."""
    told = model.peft_config[NAME].to_dict()
    told |= {"base_model_name_or_path": base, "inference_mode": True}
    return json.dumps(_plain(told), indent=2, sort_keys=True) + "\n"


def _plain(value: Any) -> Any:
    """Return a configuration's values as JSON has them: peft keeps names in sets."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
