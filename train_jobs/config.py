"""What a file in ``configs/train/`` may say. Pure: no Ray, no torch, no DeepSpeed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from cluster.config import Frozen
from cluster.library.ref import NAME, Update
from train_jobs.adaptation import Adapter, LoRA, Offload, check_offload
from train_jobs.data.settings import Data
from train_jobs.objectives.settings import GRPO, ChatSFT, Distillation, Objective
from train_jobs.search import Tune
from train_jobs.supervision import Best, Diverge, EarlyStop, check_batch, read_workers

Decay = Annotated[float, Field(ge=0, lt=1)]


class Optim(Frozen):
    """AdamW with linear warm-up and cosine decay."""

    lr: PositiveFloat = 1e-4
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Of the running means of gradients and of their squares: 0 forgets at once."""
    clip: NonNegativeFloat = 1.0
    """Global gradient norm; 0 switches clipping off."""


class Batch(Frozen):
    """How many packed rows one optimiser step sees: ``micro * accumulate * workers``."""

    micro: PositiveInt = 1
    """Rows of one forward pass on one rank."""
    total: PositiveInt = 8
    """Rows of one optimiser step over all ranks and micro-batches."""


class Run(Frozen):
    """Where and how long."""

    workers: PositiveInt = 1
    """Ranks; or ``{min: 1, max: 4}``, and the run takes what the cluster has, shrinks when a
    machine goes and grows when one comes. ``batch.total`` stays the same."""
    min_workers: PositiveInt | None = None
    """Where ``workers`` is ``{min, max}``, its ``min``; ``workers`` then is its ``max``."""
    resize_s: PositiveFloat = 60.0
    """Seconds between two looks at whether more ranks fit."""
    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    """Instead of epochs."""
    seed: NonNegativeInt = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """``auto``: bfloat16 where the device is fast at it, else float32."""
    num_cpus: PositiveFloat = 1.0
    num_gpus: float = Field(0.0, ge=0)
    """Reserved for each worker."""
    threads: PositiveInt | None = None
    """CPU threads of a worker; by default the machine's cores divided by its workers."""
    save_every: PositiveInt | None = None
    """Optimiser steps between checkpoints; by default a run saves only when it is stopped."""
    keep: PositiveInt = 2
    """The newest checkpoints that stay on disk."""
    evaluate_every: PositiveInt | None = None
    """Optimiser steps between two looks at the held-out rows; by default before and after only."""
    best: Best | None = None
    """Which checkpoints stay beside the newest ones."""
    early_stop: EarlyStop | None = None
    max_failures: NonNegativeInt = 0
    """How often a cluster may start all ranks anew because one was killed or lost. They go on
    from the newest checkpoint; a loss that is no number is not tried again."""
    timeout_s: PositiveFloat = 600.0
    """A collective that takes longer means that a rank is stuck."""
    stall_s: PositiveFloat = 600.0
    """Seconds without progress after which a run is ended, by the name of the rank that is stuck.
    Longer than one micro-batch, and than what the objective asks of others."""
    diverge: Diverge | None = Field(default_factory=Diverge)
    """What ends a run whose loss runs away; null lets it."""

    _read_workers = model_validator(mode="before")(read_workers)

    @property
    def least_workers(self) -> int:
        """The fewest ranks that it works with."""
        return self.min_workers or self.workers


class Publish(Frozen):
    """The library entry that the run makes; ``name`` defaults to the base model's."""

    name: str | None = None
    which: Literal["last", "best"] = "last"
    """The weights of the last step, or of the checkpoint that ``run.best`` found best."""
    merge: bool = True
    """Add what a LoRA learnt to its base and publish the sum. False publishes the additions alone,
    an adapter under a name of its own that is served beside its base (``adapters:`` of a model)."""
    hold: bool = False
    """Leave the model in the run's folder instead, as a search does with its trials'."""
    every: PositiveInt | None = None
    """Steps after which the weights go on the cluster's shelf, as ``NAME@run.RUN.STEP``: what is
    deployed as ``NAME@live`` answers with the newest of them while the run goes on."""
    update: Update | None = None
    """What becomes of requests that run when one of these goes live: they ``finish`` on the version
    before, or those without a token begin anew (``recompute``). By default the deployed model's
    configuration says it."""

    def is_due(self, step: int) -> bool:
        """Say whether the weights go on the shelf after this step."""
        return self.every is not None and step % self.every == 0

    @field_validator("name")
    @classmethod
    def _can_be_published(cls, name: str | None) -> str | None:
        if name is not None and not NAME.fullmatch(name):
            raise ValueError(
                f"{name!r:.80} is no name of a library entry: 1 to 64 of a-z 0-9 . _ - and a "
                "letter or digit first, as in my-model; the library counts its versions"
            )
        return name


class FinetuneConfig(Frozen):
    """The whole of one ``configs/train/*.yaml``."""

    model: str
    """A library reference: the version to start from."""
    data: Data
    objective: Objective = Field(default_factory=ChatSFT)
    adapter: Adapter | None = None
    """None trains every parameter."""
    gradient_checkpointing: Literal["none", "selective", "full"] = "none"
    """Forget activations and compute them again in the backward pass (arXiv:1604.06174): ``full``
    keeps a layer's input alone, at the price of a second forward pass; ``selective`` keeps the
    results of matrix products and computes what is cheap again."""
    offload: Offload = Field(default_factory=Offload)
    zero: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: what is divided over the ranks. 1: the optimiser's state; 2: also the
    gradients; 3: also the parameters; 0: nothing."""
    sequence_parallel: PositiveInt = 1
    """Ulysses (arXiv:2309.14509): so many neighbouring ranks share each row, every one of them with
    a slice of its tokens. For rows too long for one rank; ``run.workers`` is a multiple of it."""
    optim: Optim = Field(default_factory=Optim)
    batch: Batch = Field(default_factory=Batch)
    run: Run = Field(default_factory=Run)
    publish: Publish = Field(default_factory=Publish)
    track: tuple[Literal["tensorboard", "mlflow"], ...] = ()
    """Where figures go beside ``metrics.jsonl``: ``[tensorboard, mlflow]``."""
    tune: Tune | None = None
    """What ``roundhouse tune`` searches; ``roundhouse train`` leaves it alone."""

    @model_validator(mode="after")
    def _checks(self) -> FinetuneConfig:
        run = self.run
        if run.least_workers > run.workers:
            raise ValueError(f"run.workers: min={run.min_workers} is above max={run.workers}")
        self._check_slices()
        slices = self.sequence_parallel
        check_batch(self.batch.total, self.batch.micro, run.least_workers, run.workers, slices)
        self._check_evaluation()
        self._check_objective()
        if (self.run.epochs is None) == (self.run.steps is None):
            raise ValueError("run: give either epochs or steps, exactly one of them")
        self._check_apart()
        if self.adapter and self.zero == 3 and self.publish.merge:
            raise ValueError(
                "zero=3 with an adapter: stage 3 divides the base's weights, which an adapter "
                "leaves as they are and its merge needs whole; use zero: 2, which divides all "
                "that an adapter adds, or publish a LoRA by itself with publish.merge: false"
            )
        if self.gradient_checkpointing == "selective" and self.zero == 3:
            raise ValueError(
                "gradient_checkpointing=selective with zero=3: stage 3 gathers and frees "
                "parameters inside of what is computed again, which torch refuses; use full"
            )
        check_offload(self.offload, self.zero, run.num_gpus)
        return self

    def _check_apart(self) -> None:
        if self.publish.merge:
            return
        if not isinstance(self.adapter, LoRA):
            raise ValueError(
                "publish.merge=false needs something apart: give adapter: {kind: lora}"
            )
        if self.adapter.dora:
            raise ValueError(
                "publish.merge=false with adapter.dora: only plain additions are served beside a "
                "base; leave dora out, or publish the sum"
            )
        if self.objective.head:
            raise ValueError(
                f"publish.merge=false with objective {self.objective.kind}, whose head is no part "
                "of an adapter; publish the sum"
            )
        if self.publish.update == "recompute":
            raise ValueError(
                "publish.merge=false with publish.update=recompute: requests of an adapter finish "
                "on the version that they began with; leave it out"
            )
        if self.publish.name is None:
            raise ValueError(
                "publish.merge=false needs publish.name: an adapter has a name of its own, and by "
                "default a run publishes under its base's"
            )

    def _check_evaluation(self) -> None:
        run = self.run
        if run.evaluate_every and not (self.data.heldout or self.data.split):
            raise ValueError("run.evaluate_every needs held-out rows: give data.heldout")
        for name, asked in (("best", run.best), ("early_stop", run.early_stop)):
            if asked and not run.evaluate_every:
                raise ValueError(f"run.{name} needs figures to go by: give run.evaluate_every")
        if self.publish.which == "best" and not run.best:
            raise ValueError("publish.which=best needs run.best, which keeps that checkpoint")

    def _check_objective(self) -> None:
        objective = self.objective
        if self.publish.every and (objective.family != "decoder" or objective.head):
            raise ValueError(
                f"publish.every={self.publish.every} with objective {objective.kind}: replicas "
                "answer with decoders that generate; leave it out"
            )
        generates = isinstance(objective, GRPO) or (
            isinstance(objective, Distillation) and objective.lmbda > 0
        )
        if generates and self.zero == 3:
            raise ValueError(
                f"zero=3 with objective {objective.kind}, whose model generates while it learns: "
                "stage 3 gathers parameters on all ranks at once, and they do not stop together; "
                "use zero: 2"
            )
        if isinstance(objective, GRPO) and objective.beta and not isinstance(self.adapter, LoRA):
            raise ValueError(
                f"objective.beta={objective.beta:g} without an adapter: the reference is the base, "
                "which a full fine-tune no longer has; give an adapter, or leave beta out"
            )

    def _check_slices(self) -> None:
        slices, run, kind = self.sequence_parallel, self.run, self.objective.kind
        if slices == 1:
            return
        if not self.objective.sliced:
            raise ValueError(
                f"sequence_parallel={slices} with objective {kind}, which needs whole sequences "
                "on each rank; leave sequence_parallel out, or use causal_lm, sft, "
                "prompt_completion, dpo, orpo or simpo"
            )
        if run.least_workers != run.workers:
            raise ValueError(
                f"sequence_parallel={slices} with run.workers from {run.least_workers} to "
                f"{run.workers}: a cluster starts any number between, and {slices} ranks share a "
                f"row; give one number, a multiple of {slices}"
            )
        if run.workers % slices:
            below = run.workers // slices * slices
            fits = " or ".join(str(n) for n in (below, below + slices) if n)
            raise ValueError(
                f"run.workers={run.workers} is not a multiple of sequence_parallel={slices}, the "
                f"ranks that share a row; use {fits} workers"
            )

    def at(self, workers: int) -> FinetuneConfig:
        """Return the same run with this many ranks."""
        run = self.run.model_copy(update={"workers": workers, "min_workers": None})
        return self.model_copy(update={"run": run})

    @property
    def accumulate(self) -> int:
        """Micro-batches of one optimiser step on one rank."""
        return self.batch.total * self.sequence_parallel // (self.batch.micro * self.run.workers)

    @property
    def bucket(self) -> int:
        """Elements that are reduced or gathered at once on CPUs, few enough for their caches.

        DeepSpeed's 5e8 are 2 GB, touched every step.
        """
        return 4_000_000 if self.adapter else 8_000_000

    @property
    def _pieces(self) -> dict[str, int]:
        return dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size"), self.bucket)

    def deepspeed(self, dtype: str, on_gpu: bool) -> dict[str, Any]:
        """Render the DeepSpeed configuration: the only place where one is written."""
        moved = {"device": "cpu", "pin_memory": True}
        return {
            "train_micro_batch_size_per_gpu": self.batch.micro,
            "gradient_accumulation_steps": self.accumulate,
            # DeepSpeed 0.19 clips at 1.0 unless told otherwise: always say it
            "gradient_clipping": self.optim.clip,
            "zero_optimization": {
                "stage": self.zero,
                "overlap_comm": on_gpu,
                **({} if on_gpu else self._pieces),
                **({"offload_optimizer": moved} if self.offload.optimizer else {}),
                **({"offload_param": moved} if self.offload.parameters else {}),
            },
            # the optimiser is torch's own also where its state waits in the machine's memory
            **({"zero_force_ds_cpu_optimizer": False} if self.offload.optimizer else {}),
            "bf16": {"enabled": dtype == "bfloat16"},
            "steps_per_print": 10**9,
        }
