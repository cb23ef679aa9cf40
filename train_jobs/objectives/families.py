"""Which kind of network a directory holds, from its config.json alone. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.errors import ConfigError
from train_jobs.objectives.settings import Family, MaskedLM, Settings

_ENCODERS = (
    "albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra "
    "ernie esm eurobert flaubert fnet funnel ibert layoutlm longformer mega megatron-bert "
    "mobilebert modernbert mpnet nezha nomic_bert nystromformer rembert roberta "
    "roberta-prelayernorm roc_bert roformer squeezebert xlm xlm-roberta xlm-roberta-xl xmod "
    "yoso"
)
ENCODERS = frozenset(_ENCODERS.split())
"""Values of ``model_type`` whose attention reads in both directions."""


def family_of(config: Mapping[str, Any]) -> Family:
    """Say which family a Hugging Face ``config.json`` describes."""
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    if config.get("model_type") in ENCODERS and not config.get("is_decoder"):
        return "encoder"
    return "decoder"


def check_family(objective: Settings, config: Mapping[str, Any], ref: str, max_len: int) -> None:
    """Refuse a base of another kind than an objective trains. A decoder can classify, too.

    Raises ConfigError, also for ``max_len`` beyond the positions that an encoder has.
    """
    found, wanted = family_of(config), objective.family
    fits = found == wanted or (
        wanted == "encoder" and found == "decoder" and not isinstance(objective, MaskedLM)
    )
    if not fits:
        kinds = {
            "decoder": "a decoder (Llama, Qwen, SmolLM2 ...)",
            "encoder": "an encoder (BERT, RoBERTa, MiniLM ...)",
            "seq2seq": "an encoder with a decoder (T5, BART ...)",
        }
        raise ConfigError(
            f"objective: {getattr(objective, 'kind', '')} trains {kinds[wanted]}, and {ref} is "
            f"{kinds[found]} of type {config.get('model_type')!r:.60}; choose another model or "
            "objective"
        )
    places = config.get("max_position_embeddings")
    if found == "encoder" and isinstance(places, int) and max_len > places:
        raise ConfigError(
            f"data.max_len: {max_len} tokens, {ref} has positions for {places}; use at most those"
        )


def check_heads(config: Mapping[str, Any], slices: int) -> None:
    """Refuse more ranks for one sequence than a Hugging Face ``config.json`` has heads."""
    text = config.get("text_config") or config
    heads = text.get("num_attention_heads", text.get("n_head"))
    if isinstance(heads, int) and heads < slices:
        raise ConfigError(
            f"sequence_parallel: {slices} ranks share a sequence, and each needs a head to attend "
            f"with; this model has {heads}; use sequence_parallel: {heads} or less"
        )
