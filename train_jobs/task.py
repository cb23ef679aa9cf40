"""What a run reads before anything computes. No torch: the plan of a run is made from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.config import dump
from cluster.errors import ConfigError
from cluster.library.manifest import Facts, Lineage
from cluster.library.store import Library, Version
from train_jobs.adapters import check_targets, note
from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset, load_datasets
from train_jobs.data.order import Order
from train_jobs.data.settle import settle
from train_jobs.objectives.families import check_family, check_heads
from train_jobs.objectives.settings import Objective

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Task:
    """The base model, the data and its order: the same on every rank."""

    config: FinetuneConfig
    base: Version
    train: Dataset
    heldout: Dataset | None
    order: Order
    objective: Objective
    """The configuration's, with all that the data settles."""

    @classmethod
    def load(cls, config: FinetuneConfig, head: int | None = None) -> Task:
        """Read the base's tokenizer and the data; ConfigError names the file and the line.

        Also ConfigError for a base that cannot be trained as the configuration asks. ``head``
        bounds the rows of each source that are read: enough to refuse a run by, not to begin it.
        """
        base = Library().resolve(config.model)
        check_base(config, base)
        objective = config.objective
        data, measured = load_datasets(config.data, objective, base.path, head=head)
        if not data.partial:
            objective, data, measured = settle(
                objective, base.path, data, measured, config.run.seed
            )
        return cls(
            config,
            base,
            data,
            measured,
            Order(
                rows=len(data.rows),
                total=config.batch.total,
                seed=config.run.seed,
                epochs=config.run.epochs,
                max_steps=config.run.steps,
                lengths=None if config.objective.packed else data.row_lengths,
                work=data.row_work if config.objective.packed else None,
            ),
            objective,
        )

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file of the data."""
        return {**self.train.hashes, **(self.heldout.hashes if self.heldout else {})}


def check_base(config: FinetuneConfig, base: Version) -> None:
    """Refuse what this base cannot do, from its headers alone."""
    if config.adapter:
        check_targets(config.adapter, base.path)
    facts = json.loads((base.path / "config.json").read_text())
    check_family(config.objective, facts, base.ref, config.data.max_len)
    check_heads(facts, config.sequence_parallel)
    experts = [key for key in EXPERTS if isinstance(facts.get(key), int) and facts[key] > 1]
    if config.zero == 3 and experts:
        raise ConfigError(
            f"zero: 3 with {base.ref}: it is a mixture of experts ({experts[0]}="
            f"{facts[experts[0]]}), whose layers DeepSpeed's stage 3 gathers differently on each "
            "rank, and waits for ever; use zero: 2"
        )


def config_hash(config: FinetuneConfig) -> str:
    """Return the SHA-256 of the resolved configuration."""
    return hashlib.sha256(dump(config).encode()).hexdigest()


def lineage(
    task: Task,
    run_id: str,
    losses: Mapping[str, float],
    revision: str | None,
    models: Mapping[str, str],
) -> Facts:
    """Return what the library is to remember of this run; ``models`` are those it asked."""
    old, adapter = task.base.manifest, task.config.adapter
    made = [f"fine-tuned from {task.base.ref} by {run_id}"]
    if adapter:
        made.append(note(adapter, task.config.publish.merge))
    return Facts(
        kind="model" if task.config.publish.merge else "adapter",
        base=task.base.ref,
        lineage=Lineage(
            run_id=run_id,
            config_hash=config_hash(task.config),
            data_hashes=task.hashes,
            code_revision=revision,
            models=dict(models),
        ),
        metrics=dict(losses),
        licence=old.licence,
        notes=(*old.notes, *made),
    )
