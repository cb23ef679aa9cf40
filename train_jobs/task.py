"""What a run reads before anything computes. No torch: the plan of a run is made from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cluster.config import dump
from cluster.library.store import Library, Version
from cluster.text.chat import ChatText
from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset, load_dataset
from train_jobs.data.order import Order


@dataclass(frozen=True)
class Task:
    """The base model, the data and its order: the same on every rank."""

    config: FinetuneConfig
    base: Version
    train: Dataset
    heldout: Dataset | None
    order: Order

    @classmethod
    def load(cls, config: FinetuneConfig) -> Task:
        """Read the base's tokenizer and the data; ConfigError names the file and the line."""
        base = Library().resolve(config.model)
        text = ChatText.load(base.path)
        data = load_dataset(config.data.train, config.data, text)
        heldout = config.data.heldout
        return cls(
            config,
            base,
            data,
            load_dataset(heldout, config.data, text) if heldout else None,
            Order(
                rows=len(data.rows),
                total=config.batch.total,
                seed=config.run.seed,
                epochs=config.run.epochs,
                max_steps=config.run.steps,
            ),
        )


def config_hash(config: FinetuneConfig) -> str:
    """Return the SHA-256 of the resolved configuration."""
    return hashlib.sha256(dump(config).encode()).hexdigest()
