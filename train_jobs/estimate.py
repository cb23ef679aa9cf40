"""Memory of one rank, told before the run. Pure arithmetic, checked against measured runs.

Two moments of a step are the fullest ones: the end of a forward pass, when every activation is
there, and the optimiser's step, when gradients and their shards are. Where CPU ranks exchange, the
second finds the room of the first in pieces, and both count. Activations are counted as autograd
keeps them, layer by layer; what each ZeRO stage holds follows DeepSpeed 0.19: whole gradients live
until their bucket is reduced, stages 1 to 3 keep the shard that a rank owns beside them, and
flatten that shard once more for the step. N trainable parameters, P all of them, W ranks.

Where the model answers by itself before it learns, that is a third moment: keys and values of all
answers, and nothing of the others. The reference of DPO and KTO adds nothing, also where all of the
model learns: the base is asked before the first step, and numbers are kept. What a batch holds is
the objective's to say: `train_jobs.microbatch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster.device import resolve_dtype
from cluster.library.store import Library, Version
from train_jobs.adaptation import Freeze
from train_jobs.adapters import added_parameters
from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset
from train_jobs.microbatch import MicroBatch, microbatch
from train_jobs.shape import Shape
from train_jobs.task import Task

LIVE_PARAMETERS = 1_000_000_000
"""Whole parameters that ZeRO 3 keeps gathered at most: DeepSpeed's stage3_max_live_parameters."""
BLOCK = 1 << 24
"""Logits that exist at once: `train_jobs.objectives.head`."""
CODE_BYTES = 60_000_000
"""Pages of libraries that are touched for the first time while the model runs."""
SLACK = {"decoder": 1.0, "encoder": 1.5, "seq2seq": 1.25}
"""What a CPU's allocator holds beside them for each byte of activations: it keeps freed memory, in
pieces that do not fit what is asked next. Seen after eight steps; encoders that pad ask for more
different sizes."""
EXCHANGED_SLACK = {"encoder": 0.5}
"""As much more where ranks exchange gradients between them."""
GATHERED_SLACK = 0.35
"""As much more at stage 3, which gathers and frees parameters among the activations."""
GPU_SLACK = 0.1
"""The same, of all live bytes, where torch itself allocates."""


@dataclass(frozen=True)
class Beside:
    """A model that is asked while another learns: whole on every rank, and never changed."""

    parameters: int
    hidden: int
    """Width of what it says of each place, until its logits are needed."""

    @classmethod
    def of(cls, version: Version) -> Beside:
        """Read it from its manifest."""
        known = version.manifest.architecture
        return cls(known.parameters or 0, known.hidden or 0)


def dtype_of(config: FinetuneConfig) -> str:
    """Return the dtype that the ranks of a run will compute in.

    Those of a GPU run are elsewhere: of ``auto`` on a GPU there is only to say what those from
    compute capability 8.0 on make of it.
    """
    if config.run.dtype == "auto" and config.run.num_gpus:
        return "bfloat16"
    return resolve_dtype(config.run.dtype, "cpu")


def of_task(task: Task, dtype: str) -> dict[str, int]:
    """Return bytes by what they are for; empty where the base does not tell its size."""
    return of_run(task, task.config, dtype)


def of_run(task: Task, config: FinetuneConfig, dtype: str | None = None) -> dict[str, int]:
    """Return what the same task would take under another configuration.

    ``dtype`` by default is what the configuration says.
    """
    known = task.base.manifest.architecture
    shape = Shape.of(task.base.path, known)
    if not known.parameters or shape is None:
        return {}
    learnt = added_parameters(config.adapter, task.base.path) if config.adapter else None
    library = Library()
    others = {
        what: Beside.of(library.resolve(ref)) for what, ref in config.objective.others.items()
    }
    dtype = dtype or dtype_of(config)
    return of_rank(config, shape, known.parameters, task.train, dtype, learnt, others)


def of_rank(
    config: FinetuneConfig,
    shape: Shape,
    parameters: int,
    data: Dataset,
    dtype: str,
    learnt: int | None = None,
    others: Mapping[str, Beside] | None = None,
) -> dict[str, int]:
    """Return bytes by what they are for: they add up to the fullest moment of a step.

    ``learnt`` is how many parameters an adapter trains, None for all of them; ``others`` are the
    models that the objective asks, each a part of its own.
    """
    batch = fullest(config, data)
    wide = 2 if dtype == "bfloat16" else 4
    added = 0 if learnt is None or isinstance(config.adapter, Freeze) else learnt
    everything, trainable = parameters + added, parameters if learnt is None else learnt
    ranks, stage = config.run.workers, config.zero
    shard = -(-trainable // ranks)
    weights = everything * wide
    if stage == 3:
        divided = 0 if config.offload.parameters else weights // ranks
        weights = divided + min(everything, LIVE_PARAMETERS) * wide
    # float32 without stages steps on the weights themselves; all else has a master copy
    master = 0 if stage == 0 and wide == 4 else 4 * (shard if stage else trainable)
    moments = 8 * (shard if stage else trainable)
    whole = trainable * wide
    owned = shard * wide if stage > 1 else 0
    flattened = 4 * shard if stage else 0
    if config.offload.optimizer:  # the step and what it needs are the machine's
        master = moments = owned = flattened = 0
    # what is being reduced, and with other ranks what arrives from them
    buckets = wide * min(config.bucket, trainable) * min(2, ranks if ranks > 1 else bool(stage))
    activations = activations_of(config, shape, batch) * wide
    logits = logits_of(shape, batch, learnt is None)
    cache = batch.kept * shape.layers * 2 * shape.keys * wide
    said = {what: batch.asked * one.hidden * wide for what, one in (others or {}).items()}
    # forward's end, or the step: what the fuller one has and the other lacks
    ahead = activations + logits + sum(said.values())
    behind = whole + owned + flattened
    # gradients of the micro-batches before are there in a forward pass; on a CPU the room for what
    # several ranks exchange of them is not what activations leave behind, which is in pieces
    on_cpu = not config.run.num_gpus
    together = config.accumulate > 1 or (on_cpu and stage > 0 and ranks > 1)
    if together:
        ahead, behind = ahead + whole + owned, flattened
    answering = cache > max(ahead, behind)  # of a step that has no gradients yet
    forward = ahead >= behind and not answering
    step = not (forward or answering)
    parts = {
        "weights": weights,
        "gradients": whole + owned if step or forward and together else 0,
        "optimiser": master + moments + (flattened if step else 0),
        "activations": activations if forward else 0,
        "logits": logits if forward else 0,
    }
    if batch.kept:
        parts["generation"] = cache if answering else 0
    for what, one in (others or {}).items():
        parts[what] = one.parameters * wide + (said[what] if forward else 0)
    live = sum(parts.values()) + buckets
    share = SLACK[shape.family] + (GATHERED_SLACK if stage == 3 else 0)
    if ranks > 1:
        share += EXCHANGED_SLACK.get(shape.family, 0.0)
    slack = GPU_SLACK * live if config.run.num_gpus else share * activations
    return parts | {"buffers": buckets + round(slack) + CODE_BYTES}


def activations_of(config: FinetuneConfig, shape: Shape, batch: MicroBatch) -> int:
    """Return the elements that one micro-batch keeps for its backward pass."""
    tokens = batch.tokens
    kept = per_layer(shape, batch.longest)
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


def logits_of(shape: Shape, batch: MicroBatch, learnt: bool) -> int:
    """Return the bytes of the output layer: float32 logits, and its own gradient.

    A block of them, or all at once where a model changes them behind its layer.
    """
    if not batch.asked:
        return 0
    logits = batch.asked * shape.vocabulary
    if shape.blocks and not batch.whole:
        logits = min(logits, max(BLOCK, shape.vocabulary))
    return logits * 4 * batch.copies + (shape.vocabulary * shape.hidden * 4 if learnt else 0)


def fullest(config: FinetuneConfig, data: Dataset) -> MicroBatch:
    """Return what one rank has of the fullest micro-batch."""
    whole = microbatch(config.objective, data, config.batch.micro, config.data.max_len)
    slices = config.sequence_parallel
    tokens, asked = -(-whole.tokens // slices), -(-whole.asked // slices)
    return replace(whole, tokens=tokens, asked=asked)
