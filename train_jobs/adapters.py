"""What of a model learns: which layers can take an adapter, attaching it, merging it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from train_jobs.adaptation import Adapter, Freeze, LoRA


def check_targets(adapter: Adapter, base: Path) -> None:
    """Refuse a target that ``base`` does not have; reads the files' headers only.

    peft alone is content when one of several names is found.
    """
    if isinstance(adapter, Freeze):
        _check_patterns(adapter.trainable, [name for name, _ in _tensors(base)])
    elif adapter.targets != "all-linear":
        known = linear_layers(base)
        for name in adapter.targets:
            if not is_pattern(name) and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ConfigError(
                    f"adapter.targets: no layer of this model is called {name!r:.60}; {hint}"
                    f"it has {', '.join(known)}; or write all-linear"
                )
        layers = [layer for layer, _ in _matrices(base)]
        _check_patterns(filter(is_pattern, adapter.targets), layers, "adapter.targets")


def _check_patterns(
    patterns: Iterable[str], names: Sequence[str], field: str = "adapter.trainable"
) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            shown = ", ".join([*names[:3], "..."] if len(names) > 3 else names)
            raise ConfigError(
                f"{field}: nothing in this model matches {pattern!r:.80}; its names are {shown} "
                "(* stands for any letters, ? for one)"
            )


def is_pattern(target: str) -> bool:
    """Say whether a target is a pattern of whole names instead of a layer's last name."""
    return any(sign in target for sign in "*?[.")


def matches(name: str, pattern: str) -> bool:
    """Say whether a whole name matches; what a wrapper puts in front of it does not count."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def linear_layers(base: Path) -> tuple[str, ...]:
    """Return the names of the linear layers inside a model's blocks, as ``q_proj``, sorted."""
    return tuple(sorted({layer.rpartition(".")[2] for layer, _ in _matrices(base)}))


def added_parameters(adapter: Adapter, base: Path) -> int:
    """Return how many parameters learn: those that are added, or those that are not frozen."""
    if isinstance(adapter, Freeze):
        return sum(
            math.prod(shape)
            for name, shape in _tensors(base)
            if any(matches(name, pattern) for pattern in adapter.trainable)
        )
    chosen = [shape for layer, shape in _matrices(base) if wanted(adapter, layer)]
    rows = sum(shape[0] for shape in chosen) if adapter.dora else 0
    return sum(adapter.r * sum(shape) for shape in chosen) + rows


def wanted(lora: LoRA, layer: str) -> bool:
    """Say whether a layer, by its whole name, takes an addition."""
    return lora.targets == "all-linear" or any(
        matches(layer, target) if is_pattern(target) else layer.rpartition(".")[2] == target
        for target in lora.targets
    )


def _matrices(base: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the whole name and the shape of each linear layer."""
    for name, shape in _tensors(base):
        *path, leaf = name.split(".")
        # inside a numbered block a matrix is a linear layer; embeddings lie outside
        if leaf == "weight" and any(part.isdigit() for part in path) and len(shape) == 2:
            yield ".".join(path), shape


def _tensors(base: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor, from the files' headers."""
    from safetensors import safe_open

    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="np") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a mapping)
                yield name, tuple(stored.get_slice(name).get_shape())


def attach(model: Any, adapter: Adapter) -> Any:
    """Return ``model`` with what learns asking for gradients, and nothing else.

    What the base lacked (``added_parameters``, the names of a new head's) is trained whole.
    """
    new = frozenset(getattr(model, "added_parameters", ()))
    wrapped = model if isinstance(adapter, Freeze) else _with_additions(model, adapter, new)
    kept = adapter.trainable if isinstance(adapter, Freeze) else ()
    for name, parameter in inner(wrapped).named_parameters():
        if name in new or any(matches(name, pattern) for pattern in kept):
            parameter.requires_grad_(True)
        elif isinstance(adapter, Freeze):
            parameter.requires_grad_(False)
    return wrapped


def _with_additions(model: Any, lora: LoRA, new: frozenset[str]) -> Any:
    """Wrap the layers; B is zero at first, so that nothing changes yet.

    A comes from torch's generator: seed every rank alike before.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets: str | list[str] = "all-linear"
    if lora.targets != "all-linear":
        linear = (torch.nn.Linear, Conv1D)  # GPT-2's layers are the latter
        layers = [name for name, layer in model.named_modules() if isinstance(layer, linear)]
        targets = [name for name in layers if wanted(lora, name)]
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            use_dora=lora.dora,
            use_rslora=lora.rslora,
            exclude_modules=sorted({name.rpartition(".")[0] for name in new}) or None,
        ),
    )


def recompute(model: Any, how: str) -> None:
    """Have a transformers model compute activations again: ``none``, ``selective`` or ``full``.

    Raises ConfigError for a model that cannot.
    """
    if how == "none":
        return
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"gradient_checkpointing: {how}: {type(model).__name__} has no layers that can be "
            "computed again; use none"
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if not any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        # else nothing that enters a layer asks for a gradient, and torch skips the layer's
        model.enable_input_require_grads()


def _kept(_: Any, operation: Any, *__: Any, **___: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    name = str(operation)
    dear = any(sign in name for sign in ("aten.mm", "aten.addmm", "aten.bmm", "scaled_dot_product"))
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def inner(model: Any) -> Any:
    """Return the transformers model below an adapter, if there is one."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def merged(model: Any) -> Any:
    """Add the additions to the base's weights and take the adapter away; returns the base.

    The model is of no use for training afterwards.
    """
    from peft import PeftModel

    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def note(adapter: Adapter, merge: bool = True) -> str:
    """Return what a manifest says of what was trained."""
    if isinstance(adapter, Freeze):
        return f"trained in part: {', '.join(adapter.trainable)}"
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    kind = "DoRA" if adapter.dora else "LoRA"
    scale = ", scaled by alpha / sqrt(r)" if adapter.rslora else ""
    what = f"{kind} merged" if merge else f"{kind} by itself"
    return f"{what}: r={adapter.r}, alpha={adapter.alpha:g}, targets={targets}{scale}"
