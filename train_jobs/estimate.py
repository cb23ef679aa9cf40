"""Memory of one rank, told before the run. Pure arithmetic, checked against measured runs.

Two moments of a step are the fullest ones: the end of a forward pass, when every activation is
there and no gradient, and the optimiser's step, when it is the other way round. Activations are
counted as autograd keeps them, layer by layer; what each ZeRO stage holds follows DeepSpeed 0.19:
whole gradients live until their bucket is reduced, stages 1 to 3 keep the shard that a rank owns
beside them, and flatten that shard once more for the step. N trainable parameters, P all of them,
W ranks.
"""

from __future__ import annotations

from train_jobs.adaptation import Freeze
from train_jobs.adapters import added_parameters
from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import trained_in
from train_jobs.shape import Shape
from train_jobs.task import Task

LIVE_PARAMETERS = 1_000_000_000
"""Whole parameters that ZeRO 3 keeps gathered at most: DeepSpeed's stage3_max_live_parameters."""
BLOCK = 1 << 24
"""Logits that exist at once: `train_jobs.objectives.head`."""
LOSS_COPIES = 4
"""Of a block of logits: itself, its log-probabilities and their gradients."""
CODE_BYTES = 60_000_000
"""Pages of libraries that are touched for the first time while the model runs."""
SLACK = {"decoder": 1.0, "encoder": 1.5, "seq2seq": 1.25}
"""What a CPU's allocator holds beside them for each byte of activations: it keeps freed memory, in
pieces that do not fit what is asked next. Seen after eight steps; encoders that pad ask for more
different sizes."""
GATHERED_SLACK = 0.35
"""As much more at stage 3, which gathers and frees parameters among the activations."""
GPU_SLACK = 0.1
"""The same, of all live bytes, where torch itself allocates."""


def of_task(task: Task, dtype: str) -> dict[str, int]:
    """Return bytes by what they are for; empty where the base does not tell its size."""
    return of_run(task, task.config, dtype)


def of_run(task: Task, config: FinetuneConfig, dtype: str) -> dict[str, int]:
    """Return what the same task would take under another configuration."""
    known = task.base.manifest.architecture
    shape = Shape.of(task.base.path, known)
    if not known.parameters or shape is None:
        return {}
    learnt = added_parameters(config.adapter, task.base.path) if config.adapter else None
    return of_rank(config, shape, known.parameters, task.train, dtype, learnt)


def of_rank(
    config: FinetuneConfig,
    shape: Shape,
    parameters: int,
    data: Dataset,
    dtype: str,
    learnt: int | None = None,
) -> dict[str, int]:
    """Return bytes by what they are for: they add up to the fullest moment of a step.

    ``learnt`` is how many parameters an adapter trains, None for all of them.
    """
    wide = 2 if dtype == "bfloat16" else 4
    added = 0 if learnt is None or isinstance(config.adapter, Freeze) else learnt
    everything, trainable = parameters + added, parameters if learnt is None else learnt
    ranks, stage = config.run.workers, config.zero
    shard = -(-trainable // ranks)
    weights = everything * wide
    if stage == 3:
        weights = weights // ranks + min(everything, LIVE_PARAMETERS) * wide
    # float32 without stages steps on the weights themselves; all else has a master copy
    master = 0 if stage == 0 and wide == 4 else 4 * (shard if stage else trainable)
    moments = 8 * (shard if stage else trainable)
    whole = trainable * wide
    owned = shard * wide if stage > 1 else 0
    flattened = 4 * shard if stage else 0
    # what is being reduced, and with other ranks what arrives from them
    buckets = wide * min(config.bucket, trainable) * min(2, ranks if ranks > 1 else bool(stage))
    activations = activations_of(config, shape, data) * wide
    logits = logits_of(config, shape, data, learnt is None)
    # forward's end, or the step: what the fuller one has and the other lacks
    ahead, behind = activations + logits, whole + owned + flattened
    if config.accumulate > 1:  # gradients of the micro-batches before are there in a forward pass
        ahead, behind = ahead + whole + owned, flattened
    gradients = whole + owned if config.accumulate > 1 or behind > ahead else 0
    forward = ahead >= behind
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimiser": master + moments + (0 if forward else flattened),
        "activations": activations if forward else 0,
        "logits": logits if forward else 0,
    }
    live = sum(parts.values()) + buckets
    share = SLACK[shape.family] + (GATHERED_SLACK if stage == 3 else 0)
    slack = GPU_SLACK * live if config.run.num_gpus else share * activations
    return parts | {"buffers": buckets + round(slack) + CODE_BYTES}


def activations_of(config: FinetuneConfig, shape: Shape, data: Dataset) -> int:
    """Return the elements that one micro-batch keeps for its backward pass."""
    tokens, longest = fullest(config, data)
    kept = per_layer(shape, longest)
    if config.gradient_checkpointing == "full":
        return tokens * (shape.layers * shape.hidden + kept)
    if config.gradient_checkpointing == "selective":
        kept = 2 * shape.hidden + 2 * shape.queries + 2 * shape.keys + 2 * shape.inner
    if config.adapter and not isinstance(config.adapter, Freeze):
        kept += 7 * config.adapter.r
    ends = 3 * shape.hidden
    return tokens * (shape.layers * kept + ends)


def per_layer(shape: Shape, longest: int) -> int:
    """Return the elements that autograd keeps of one token in one layer.

    A decoder's, as in Llama: both norms keep their input, what they normalised, and what they gave;
    attention its queries, keys, values, and its output twice; the gated feed-forward layer four
    vectors. An encoder's, as in BERT: the inputs and outputs of two norms, queries, keys and values
    twice where they are scaled, the feed-forward layer before and after its activation, and what
    dropout drew. Attention with dropout keeps its probabilities, what was drawn, and their product,
    for each head and each other token of the text.
    """
    hidden, inner = shape.hidden, shape.inner
    if shape.family == "decoder":
        return 6 * hidden + 3 * shape.queries + 2 * shape.keys + (4 if shape.gated else 2) * inner
    kept = 5 * hidden + 4 * shape.queries + 2 * shape.keys + 2 * inner
    if shape.dropout:
        kept += 2 * hidden
    if shape.attention_dropout:
        kept += 3 * shape.heads * longest
    return kept


def logits_of(config: FinetuneConfig, shape: Shape, data: Dataset, learnt: bool) -> int:
    """Return the bytes of the output layer: a block of float32 logits, and its own gradient."""
    kind = config.objective.kind
    if kind in ("sequence_classification", "token_classification", "reward"):
        return 0
    size = min(config.batch.micro, len(data.rows))
    most = max(trained_in(row) for row in data.rows) * size
    block = min(most * shape.vocabulary, max(BLOCK, shape.vocabulary)) * 4 * LOSS_COPIES
    return block + (shape.vocabulary * shape.hidden * 4 if learnt else 0)


def fullest(config: FinetuneConfig, data: Dataset) -> tuple[int, int]:
    """Return the tokens of the fullest micro-batch, padding among them, and of its longest text.

    Rows of about equal length come together, so the fullest one holds the longest rows.
    """
    longest = sorted(data.row_lengths)[-config.batch.micro :]
    if config.objective.packed:
        return sum(longest), longest[-1]
    return longest[-1] * len(longest), longest[-1]
