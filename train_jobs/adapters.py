"""Low-rank adapters: which layers of a base can take one, attaching it, merging it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from train_jobs.config import LoRA


def check_targets(lora: LoRA, base: Path) -> None:
    """Refuse a target that no layer of ``base`` is called; reads the files' headers only.

    peft alone is content when one of several names is found.
    """
    if lora.targets == "all-linear":
        return
    known = linear_layers(base)
    for name in lora.targets:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"adapter.targets: no layer of this model is called {name!r:.60}; {hint}"
                f"it has {', '.join(known)}; or write all-linear"
            )


def linear_layers(base: Path) -> tuple[str, ...]:
    """Return the names of the linear layers inside a model's blocks, as ``q_proj``, sorted."""
    return tuple(sorted({layer for layer, _ in _matrices(base)}))


def added_parameters(lora: LoRA, base: Path) -> int:
    """Return how many parameters an adapter on ``base`` has."""
    wanted = linear_layers(base) if isinstance(lora.targets, str) else lora.targets
    return sum(lora.r * sum(shape) for layer, shape in _matrices(base) if layer in wanted)


def _matrices(base: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each linear layer, from the files' headers."""
    from safetensors import safe_open

    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="np") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a mapping)
                *path, layer, leaf = name.split(".")
                # inside a numbered block a matrix is a linear layer; embeddings lie outside
                if leaf == "weight" and any(part.isdigit() for part in path):
                    shape = tuple(stored.get_slice(name).get_shape())
                    if len(shape) == 2:
                        yield layer, shape


def attach(model: Any, lora: LoRA) -> Any:
    """Return ``model`` with an adapter around it; the additions alone ask for gradients.

    B is zero at first, so that nothing changes yet. A comes from torch's generator: seed every
    rank alike before. What the base lacked (``added_parameters``, the names of a new head's) is
    trained whole.
    """
    from peft import LoraConfig, get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    added = frozenset(getattr(model, "added_parameters", ()))
    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            exclude_modules=sorted({name.rpartition(".")[0] for name in added}) or None,
        ),
    )
    for name, parameter in inner(wrapped).named_parameters():
        if name in added:
            parameter.requires_grad_(True)
    return wrapped


def inner(model: Any) -> Any:
    """Return the transformers model below an adapter, if there is one."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def merged(model: Any) -> Any:
    """Add the additions to the base's weights and take the adapter away; returns the base.

    The model is of no use for training afterwards.
    """
    return model.merge_and_unload()


def note(lora: LoRA) -> str:
    """Return what a manifest says of a merged adapter."""
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    return f"LoRA merged: r={lora.r}, alpha={lora.alpha:g}, targets={targets}"
