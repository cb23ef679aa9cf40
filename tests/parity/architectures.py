"""Which architectures the engine serves: what `test_engine_architectures.py` shows, as a table.

``python -m tests.parity.architectures --write docs/models.md`` writes the document; a test holds
the committed one to this table, others hold the table to what happens.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
ALONE = {"num_key_value_heads": None}
"""Every query head has keys of its own."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model type and the tiny configuration that stands for it."""

    model_type: str
    name: str
    special: str
    """What it asks of an engine, beside what Llama does."""
    changes: dict[str, Any] = field(default_factory=dict)
    one_rank: str = ""
    """Why it is not cut for several ranks; empty if it is."""


NO_PLAN = "transformers has no plan for it"
GATHERED = "its plan cuts projections and gathers them again"
EXPERTS = "its plan cuts expert weights"

SERVED = (
    Architecture("llama", "Llama 2, 3; SmolLM 1, 2", "grouped queries"),
    Architecture("mistral", "Mistral", "sliding window", {"sliding_window": 9}),
    Architecture("qwen2", "Qwen 2, 2.5", "biases on q, k and v"),
    Architecture("qwen3", "Qwen 3", "norms of q and k, head width of its own", {"head_dim": 16}),
    Architecture("gemma", "Gemma", "scaled embeddings", {"head_dim": 16, "num_key_value_heads": 2}),
    Architecture(
        "gemma2",
        "Gemma 2",
        "soft-capped scores and logits, alternating windows",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 9,
            "layer_types": WINDOWS,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    Architecture(
        "gemma3_text",
        "Gemma 3 (text)",
        "two rotary bases, five windows to one full layer",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 9,
            "layer_types": WINDOWS,
        },
    ),
    Architecture("phi", "Phi 1, 1.5, 2", "parallel blocks, partial rotary embedding"),
    Architecture("phi3", "Phi 3, 3.5, 4", "fused qkv and gate", one_rank=GATHERED),
    Architecture("gpt2", "GPT-2", "learned positions", ALONE, NO_PLAN),
    Architecture(
        "gpt_neox",
        "GPT-NeoX, Pythia",
        "fused qkv by head, partial rotary embedding",
        ALONE | {"hidden_size": 32, "num_attention_heads": 2},
    ),
    Architecture(
        "opt",
        "OPT",
        "learned positions with an offset",
        ALONE | {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.3},
        NO_PLAN,
    ),
    Architecture(
        "mixtral",
        "Mixtral",
        "experts",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        EXPERTS,
    ),
    Architecture(
        "qwen3_moe",
        "Qwen 3 MoE",
        "experts, norms of q and k",
        {
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        EXPERTS,
    ),
    Architecture(
        "gpt_oss",
        "gpt-oss",
        "attention sinks, alternating windows, experts",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 9,
            "layer_types": WINDOWS,
        },
        NO_PLAN,
    ),
    Architecture(
        "smollm3", "SmolLM 3", "layers without rotary embedding", {"no_rope_layers": [1, 0, 1]}
    ),
    Architecture(
        "granite",
        "Granite 3",
        "multipliers of scores, residuals and logits",
        {
            "embedding_multiplier": 2.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
        },
    ),
    Architecture("olmo2", "OLMo 2", "norms behind the blocks", {}, GATHERED),
    Architecture(
        "olmo3",
        "OLMo 3",
        "norms behind the blocks, windows",
        {"sliding_window": 9, "layer_types": WINDOWS},
        GATHERED,
    ),
    Architecture("stablelm", "StableLM", "layer norms, partial rotary embedding", {}, NO_PLAN),
    Architecture(
        "cohere2",
        "Command R7B",
        "parallel blocks, windows, full layers without rotary embedding",
        {"sliding_window": 9, "layer_types": WINDOWS, "logit_scale": 0.5},
    ),
    Architecture("glm4", "GLM 4", "fused gate, four norms", {"head_dim": 16}, GATHERED),
    Architecture("starcoder2", "StarCoder 2", "layer norms and biases", {"sliding_window": 9}),
    Architecture("nemotron", "Nemotron", "squared ReLU, partial rotary embedding", {}, NO_PLAN),
    Architecture(
        "exaone4",
        "EXAONE 4",
        "windows, full layers without rotary embedding",
        {"sliding_window": 9, "layer_types": WINDOWS},
    ),
)

REFUSED: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("bloom", "BLOOM", "its forward takes no position_ids", {}),
    (
        "mpt",
        "MPT",
        "its forward takes no position_ids",
        {"n_layers": 3, "n_heads": 4, "d_model": 64},
    ),
    ("mamba", "Mamba", "its forward takes no position_ids", {}),
    ("falcon", "Falcon", "our attention was called for layers []", {}),
    ("gptj", "GPT-J", "our attention was called for layers []", {"rotary_dim": 8}),
    (
        "gpt_neo",
        "GPT-Neo",
        "our attention was called for layers []",
        {"attention_types": [[["global"], 3]]},
    ),
)
"""Model type, name, reason and tiny configuration of what is refused."""

HEAD = """\
# Which models the engine serves

Written by `python -m tests.parity.architectures --write docs/models.md`; do not edit.

The engine runs the model code of transformers and replaces the attention below it. So it serves
every causal decoder whose code goes through transformers' attention interface and takes explicit
positions. When a version is loaded, each rank compares its logits with the model's own attention
and refuses the model by name if they differ: a model that is not in this table either answers
like itself or does not start.

## Served

For each of these, a tiny random model of the type gives the same greedy tokens as transformers'
`generate` (prompts of 1, 7 and 31 tokens, 64 new ones, prompts cut into chunks, requests sharing
steps), and log-probabilities within 1e-4 of a plain forward pass, of prompt and answer. Windows
are shorter than the texts. *Ranks*: the same tokens from two ranks (`engine.tensor_parallel: 2`).

| models | `model_type` | what is special | ranks |
| --- | --- | --- | --- |
"""

TAIL = """
A model with `longrope` (Phi 3 of 128k) is served up to its original length, 4,096 tokens: beyond
it, transformers turns every request of a step to other frequencies, and the cached keys are not
turned with them.

## Refused when they are loaded

| models | `model_type` | the reason that the error gives |
| --- | --- | --- |
"""


def render() -> str:
    """Return the document."""
    lines = [HEAD.rstrip("\n")]
    for a in SERVED:
        ranks = f"one: {a.one_rank}" if a.one_rank else "as many as divide its heads"
        lines.append(f"| {a.name} | `{a.model_type}` | {a.special} | {ranks} |")
    lines.append(TAIL.rstrip("\n"))
    lines += (f"| {name} | `{kind}` | {why} |" for kind, name, why, _ in REFUSED)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, metavar="FILE")
    parser.parse_args().write.write_text(render())
