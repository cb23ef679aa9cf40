"""What of a model may learn: refused when it is read, counted before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from cluster.errors import ConfigError
from train_jobs.adaptation import Freeze, LoRA
from train_jobs.adapters import added_parameters, check_targets, matches, note
from train_jobs.config import FinetuneConfig


def config(**changes: Any) -> FinetuneConfig:
    fields: dict[str, Any] = {"model": "x", "data": {"train": "/x.jsonl"}, "run": {"epochs": 1}}
    return FinetuneConfig.model_validate(fields | changes)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two blocks with one layer each for attention and feed-forward, and embeddings."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (16, 8)}
    for block in range(2):
        at = f"model.layers.{block}"
        shapes |= {f"{at}.self_attn.q_proj.weight": (8, 8), f"{at}.mlp.down_proj.weight": (8, 24)}
        shapes |= {f"{at}.input_layernorm.weight": (8,)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


GPU = {"epochs": 1, "num_gpus": 1.0}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"offload": {"optimizer": True}}, "moves memory from a GPU .* leave offload out"),
        ({"offload": {"optimizer": True}, "zero": 0, "run": GPU}, "use zero: 1, 2 or 3"),
        ({"offload": {"parameters": True}, "zero": 2, "run": GPU}, "needs zero: 3"),
        ({"adapter": {"kind": "lora", "base": "nf4"}}, "none for CPUs"),
        ({"adapter": {"kind": "freeze", "trainable": []}}, "at least 1 item"),
        ({"adapter": {"kind": "freeze", "trainable": ["x"]}, "zero": 3}, "use zero: 2"),
        ({"gradient_checkpointing": "selective", "zero": 3}, "use full"),
        ({"gradient_checkpointing": "some"}, "'none', 'selective' or 'full'"),
    ],
)
def test_a_wrong_combination_is_refused_when_it_is_read(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        config(**changes)


def test_what_is_offloaded_is_rendered_for_deepspeed() -> None:
    both = config(offload={"optimizer": True, "parameters": True}, zero=3, run=GPU)
    rendered = both.deepspeed("bfloat16", on_gpu=True)
    moved = {"device": "cpu", "pin_memory": True}
    assert rendered["zero_optimization"]["offload_optimizer"] == moved
    assert rendered["zero_optimization"]["offload_param"] == moved
    assert rendered["zero_force_ds_cpu_optimizer"] is False
    assert "offload_optimizer" not in config().deepspeed("float32", False)["zero_optimization"]


def test_patterns_are_of_whole_names_whatever_wraps_them() -> None:
    assert matches("model.layers.21.mlp.up_proj.weight", "model.layers.2?.*")
    assert matches("bert.encoder.layer.0.output.weight", "encoder.layer.0.*")
    assert not matches("model.layers.2.mlp.up_proj.weight", "model.layers.2?.*")


def test_a_pattern_that_matches_nothing_is_refused_with_names(base: Path) -> None:
    check_targets(Freeze(kind="freeze", trainable=("model.layers.1.*",)), base)
    with pytest.raises(ConfigError, match=r"adapter.trainable: nothing .* 'layer\.1\.\*'; its nam"):
        check_targets(Freeze(kind="freeze", trainable=("layer.1.*",)), base)
    check_targets(LoRA(kind="lora", targets=("model.layers.1.*",)), base)
    with pytest.raises(ConfigError, match="adapter.targets: nothing in this model matches"):
        check_targets(LoRA(kind="lora", targets=("model.layers.7.*", "q_proj")), base)


def test_what_learns_is_counted_from_shapes(base: Path) -> None:
    assert added_parameters(Freeze(kind="freeze", trainable=("*.1.*",)), base) == 64 + 192 + 8
    assert added_parameters(LoRA(kind="lora", r=2, targets=("model.layers.1.*",)), base) == 2 * (
        (8 + 8) + (8 + 24)
    )
    dora = LoRA(kind="lora", r=2, dora=True, targets=("q_proj",))
    assert added_parameters(dora, base) == 2 * (2 * 16 + 8)  # a length for each row


def test_a_manifest_says_how_it_was_trained() -> None:
    assert note(Freeze(kind="freeze", trainable=("a.*", "b"))) == "trained in part: a.*, b"
    lora = LoRA(kind="lora", r=8, alpha=16, dora=True, rslora=True)
    told = "DoRA merged: r=8, alpha=16, targets=all-linear, scaled by alpha / sqrt(r)"
    assert note(lora) == told
