"""Memory of one rank, told before the run. Pure arithmetic, checked against measured runs.

What each ZeRO stage holds at the end of a backward pass, the fullest moment of a step, follows
DeepSpeed 0.19: whole gradients live until their bucket is reduced, stages 1 to 3 keep the shard
that a rank owns beside them, and flatten that shard once more for the step. N trainable
parameters, P all of them, W ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import trained_in

if TYPE_CHECKING:
    from cluster.library.manifest import Architecture

RUNTIME_BYTES = 1_150_000_000
"""Libraries, and what the allocator keeps of freed memory: seen in runs of 135M parameters."""
LIVE_PARAMETERS = 1_000_000_000
"""Whole parameters that ZeRO 3 keeps gathered at most: DeepSpeed's stage3_max_live_parameters."""
LOSS_BYTES = 12
"""For each logit: itself, its log-probability and its gradient, in float32."""


def of_rank(
    config: FinetuneConfig,
    architecture: Architecture,
    data: Dataset,
    dtype: str,
    added: int | None = None,
) -> dict[str, int]:
    """Return bytes by what they are for; empty where the base's size is not known.

    ``added`` is how many parameters an adapter has, None for a full fine-tune.
    """
    if not architecture.parameters:
        return {}
    wide = 2 if dtype == "bfloat16" else 4
    everything = architecture.parameters + (added or 0)
    trainable = architecture.parameters if added is None else added
    ranks, stage = config.run.workers, config.zero
    shard = trainable // ranks
    weights = everything * wide
    if stage == 3:
        weights = weights // ranks + min(everything, LIVE_PARAMETERS) * wide
    # float32 without stages steps on the weights themselves; all else has a master copy
    master = 0 if stage == 0 and wide == 4 else 4 * (shard if stage else trainable)
    moments = 8 * (shard if stage else trainable)
    flattened = 4 * shard if stage else 0
    gradients = trainable * wide + (shard * wide if stage > 1 else 0)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimiser": master + moments + flattened,
        "buckets": 4 * min(config.bucket, trainable) if ranks > 1 else 0,
        "activations": _activations(architecture, config, data) * wide,
        "logits": _predicted(config, data) * (architecture.vocab_size or 0) * LOSS_BYTES,
        "runtime": RUNTIME_BYTES,
    }


def _activations(architecture: Architecture, config: FinetuneConfig, data: Dataset) -> int:
    """Return the elements that one micro-batch keeps for its backward pass.

    For each token and layer of a Llama-like model: six vectors of the width of the model (inputs
    of norms and of the attention's layers, its queries and its output), keys and values twice,
    and four of the inner width of the feed-forward layer.
    """
    hidden, layers = architecture.hidden or 0, architecture.layers or 0
    if not hidden or not layers:
        return 0
    heads, head_dim = architecture.heads or 1, architecture.head_dim or hidden
    keys = (architecture.kv_heads or heads) * head_dim
    embeddings = (architecture.vocab_size or 0) * hidden
    embeddings *= 1 if architecture.tied_embeddings else 2
    per_layer = max(0, (architecture.parameters or 0) - embeddings) // layers
    attention = 2 * hidden * heads * head_dim + 2 * hidden * keys
    inner = max(0, per_layer - attention) // (3 * hidden)
    longest = max(sum(example.tokens for example in row) for row in data.rows)
    return config.batch.micro * longest * layers * (6 * hidden + 4 * keys + 4 * inner)


def _predicted(config: FinetuneConfig, data: Dataset) -> int:
    """Return how many places of the fullest micro-batch the head computes."""
    return config.batch.micro * max(trained_in(row) for row in data.rows)
