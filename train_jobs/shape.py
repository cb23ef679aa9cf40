"""How wide a network is, as far as its memory while it learns depends on that. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.library.manifest import Architecture
from train_jobs.objectives.families import family_of
from train_jobs.objectives.settings import Family

PLAIN = frozenset({"gpt2", "gpt_neo", "gpt_neox", "opt", "bloom", "phi", "falcon", "starcoder2"})
"""Decoders whose feed-forward layers have one matrix going in, where others have two."""


BIASED = frozenset({"bart", "mbart", "marian", "pegasus", "blenderbot", "blenderbot-small", "led"})
"""Models that add a bias of their own behind the output layer."""
SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of models that scale or cap their logits there (Gemma 2, Cohere, Granite)."""


@dataclass(frozen=True)
class Shape:
    """Widths of one layer, in elements of a token's vectors."""

    family: Family
    layers: int
    hidden: int
    inner: int
    """Of the feed-forward layer."""
    queries: int
    """All heads together."""
    keys: int
    """Keys, or values: all their heads together."""
    heads: int
    vocabulary: int
    gated: bool
    dropout: bool
    """Whether vectors lose entries at random while the model learns."""
    attention_dropout: bool
    """Whether attention does: then its probabilities exist, for each pair of tokens of a text."""
    blocks: bool = True
    """Whether its logits can be computed for some places at a time: nothing changes them behind the
    output layer."""

    @classmethod
    def of(cls, base: Path, known: Architecture) -> Shape | None:
        """Read a model directory; None where it does not say enough."""
        told: dict[str, Any] = json.loads((base / "config.json").read_text())
        text = told.get("text_config")
        facts = text if isinstance(text, dict) else told
        layers = known.layers or _number(facts, "num_layers")
        hidden = known.hidden or _number(facts, "d_model")
        heads = known.heads or _number(facts, "num_heads", "encoder_attention_heads")
        if not (layers and hidden and heads):
            return None
        width = known.head_dim or _number(facts, "d_kv") or hidden // heads
        family = family_of(told)
        inner = _number(facts, "intermediate_size", "d_ff", "encoder_ffn_dim", "n_inner")
        return cls(
            family=family,
            layers=layers * (2 if family == "seq2seq" else 1),
            hidden=hidden,
            inner=inner or 4 * hidden,
            queries=heads * width,
            keys=(known.kv_heads or heads) * width,
            heads=heads,
            vocabulary=known.vocab_size or 0,
            gated=_is_gated(family, facts),
            dropout=_any(facts, "hidden_dropout_prob", "dropout_rate", "dropout", "resid_pdrop"),
            attention_dropout=_any(
                facts, "attention_probs_dropout_prob", "attention_dropout", "dropout_rate"
            ),
            blocks=facts.get("model_type") not in BIASED and not any(map(facts.get, SCALED)),
        )


def _is_gated(family: Family, facts: Mapping[str, Any]) -> bool:
    act = str(facts.get("hidden_act") or facts.get("feed_forward_proj") or "")
    if family == "decoder":
        return facts.get("model_type") not in PLAIN
    return act.startswith("gated") or facts.get("model_type") == "modernbert"


def _number(facts: Mapping[str, Any], *names: str) -> int | None:
    return next((facts[name] for name in names if isinstance(facts.get(name), int)), None)


def _any(facts: Mapping[str, Any], *names: str) -> bool:
    return any(float(facts.get(name) or 0) > 0 for name in names)
