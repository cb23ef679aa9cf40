"""Random adapters as peft stores them, and what peft's own model answers with each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def plain(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="eager",  # its sdpa leaves soft caps out
    ).eval()


def save_adapter(base: Path, directory: Path, seed: int, size: float = 0.3, **changes: Any) -> Path:
    """Write an adapter of ``base`` whose A and B are both random: it says something else."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 8, "lora_alpha": 16, "target_modules": ALL} | changes
    model = get_peft_model(plain(base), LoraConfig(**settings))
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=made)
                parameter.copy_(drawn * size / parameter.shape[1] ** 0.5)
    model.save_pretrained(directory)
    return directory


def with_adapter(base: Path, adapter: Path | None) -> Any:
    """Return transformers' model under peft's own code, not merged."""
    from peft import PeftModel

    model = plain(base)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


def continued(model: Any, texts: Sequence[Sequence[int]], count: int) -> Any:
    """Return greedy ids of each text alone, and each step's gap between its two best logits."""
    ids, gaps = list[list[int]](), list[list[float]]()
    for text in texts:
        row, gap = list(text), list[float]()
        with torch.inference_mode():
            for _ in range(count):
                logits = model(input_ids=torch.tensor([row])).logits[0, -1]
                best = logits.topk(2).values
                gap.append(float(best[0] - best[1]))
                row.append(int(logits.argmax()))
        ids.append(row[len(text) :])
        gaps.append(gap)
    return ids, gaps
