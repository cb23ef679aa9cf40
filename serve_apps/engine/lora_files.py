"""What a LoRA adapter's directory says of itself, and whether this engine computes that. No torch.

The files are peft's: ``adapter_config.json`` and ``adapter_model.safetensors``. Whatever changes
the sum ``W x + scale * B A x`` in a way that is not computed here is refused by name: an adapter
that is computed in part answers wrongly without a word.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import EngineError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
"""Names of tensors as peft stores them: the layer's whole name, and which of the two it is."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "megatron_config": (None,),
}
"""Fields of peft's LoraConfig that change more than the sum, with the values that do not."""
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that move part of the base's weights into the adapter: it fits another base."""


@dataclass(frozen=True, slots=True)
class LoraFacts:
    """How an adapter is to be added, as its configuration says."""

    directory: Path
    r: int
    alpha: float
    rslora: bool
    ranks: dict[str, int]
    """Patterns of layers whose rank is another."""
    alphas: dict[str, float]

    def scale(self, layer: str, rank: int) -> float:
        """Return what ``B A x`` is multiplied with in a layer of this rank."""
        alpha: float = _of(self.alphas, layer, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def rank(self, layer: str) -> int:
        """Return the rank that a layer should have."""
        return int(_of(self.ranks, layer, self.r))


def read_facts(directory: Path, adapter: str, max_rank: int) -> LoraFacts:
    """Read an adapter's configuration; EngineError says what of it cannot be computed."""
    path = directory / CONFIG
    try:
        told = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise refused(adapter, f"its version has no {CONFIG}, so it is no adapter") from None
    except ValueError as error:
        raise refused(adapter, f"{CONFIG} is not JSON ({error})") from None
    if not isinstance(told, dict):
        raise refused(adapter, f"{CONFIG} is not an object")
    kind = told.get("peft_type")
    if kind != "LORA":
        raise refused(adapter, f"its peft_type is {kind!r}, and only LORA is computed here")
    for field, harmless in NEUTRAL.items():
        if field in told and told[field] not in harmless:
            raise refused(
                adapter,
                f"{field}={json.dumps(told[field])[:80]} is not computed here; merge it into its "
                "base and publish that as a model, or train without it",
            )
    begun = str(told.get("init_lora_weights", True)).lower()
    if begun.startswith(CHANGED_BASE):
        raise refused(
            adapter,
            f"init_lora_weights={begun!r} changed its base's weights as well; convert it with "
            "peft's path_initial_model_for_weight_conversion, or merge it",
        )
    return _bounded(_facts(directory, adapter, told), adapter, max_rank)


def _facts(directory: Path, adapter: str, told: dict[str, Any]) -> LoraFacts:
    try:
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in told.get(field) or {}:
                re.compile(pattern)
        return LoraFacts(
            directory,
            int(told["r"]),
            float(told["lora_alpha"]),
            bool(told.get("use_rslora")),
            {str(k): int(v) for k, v in (told.get("rank_pattern") or {}).items()},
            {str(k): float(v) for k, v in (told.get("alpha_pattern") or {}).items()},
        )
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise refused(
            adapter, f"{CONFIG} has no usable r, lora_alpha and patterns ({error!r})"
        ) from None


def _bounded(facts: LoraFacts, adapter: str, max_rank: int) -> LoraFacts:
    for rank in (facts.r, *facts.ranks.values()):
        if not 1 <= rank <= max_rank:
            raise refused(
                adapter,
                f"its rank r={rank} is outside 1 to {max_rank} (engine.max_lora_rank); raise that "
                "or train with a smaller r",
            )
    return facts


def layer_of(key: str, adapter: str) -> tuple[str, str]:
    """Return a stored tensor's layer and whether it is its A or B; EngineError for all others."""
    found = KEY.fullmatch(key)
    if found is None:
        raise refused(
            adapter,
            f"{WEIGHTS} holds {key:.120}, and only lora_A and lora_B of linear layers are "
            "computed here; train without it, or merge it into its base",
        )
    return found[1], found[2]


def refused(adapter: str, why: str) -> EngineError:
    """Return the refusal of an adapter by name."""
    return EngineError(f"adapter {adapter} cannot be served: {why}")


def _of(patterns: dict[str, Any], layer: str, otherwise: Any) -> Any:
    """Return a pattern's value as peft matches it: the whole name, or what ends in it."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return value
    return otherwise
