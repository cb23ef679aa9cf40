"""What the ranks of the training tests run; imported in their processes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from train_jobs import checkpoint, loop
from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset
from train_jobs.data.order import Order
from train_jobs.evaluate import heldout_loss
from train_jobs.export import write_model
from train_jobs.group import Device, Place, open_engine, seed_everything
from train_jobs.ports import PlainWorld
from train_jobs.rank import load_model
from train_jobs.runs import RunDir


def settings(**changes: Any) -> dict[str, Any]:
    """Return the fields of a configuration for a tiny model."""
    fields: dict[str, Any] = {
        "model": "tiny@1",
        "data": {"train": "/toy.jsonl", "max_len": 64},
        "optim": {"lr": 1e-2, "warmup_ratio": 0.1, "weight_decay": 0.01},
        "batch": {"micro": 1, "total": 4},
        "run": {"workers": 1, "steps": 12, "dtype": "float32"},
    }
    for key, value in changes.items():
        fields[key] = fields[key] | value if isinstance(value, dict) else value
    return fields


class Session:
    """An engine on the tiny model, and what the loop needs beside it."""

    def __init__(self, place: Place, base: Path, fields: dict[str, Any], data: Dataset) -> None:
        fields = fields | {"run": fields["run"] | {"workers": place.size}}
        self.config = FinetuneConfig.model_validate(fields)
        self.data = data
        self.records: list[dict[str, Any]] = []
        self.world = Recorder(place.rank, place.size, self.records)
        run = self.config.run
        self.order = Order(len(data.rows), self.config.batch.total, run.seed, run.epochs, run.steps)
        seed_everything(0)
        model = load_model(base, Device("cpu", "float32"))
        self.engine = open_engine(
            model, self.config.deepspeed("float32", on_gpu=False), self.config.optim
        )

    def train(self, save: Any = lambda step, metrics: None, first: int = 0) -> loop.Progress:
        return loop.train(self.engine, self.config, self.data, self.order, self.world, save, first)

    def outcome(self) -> dict[str, Any]:
        """Return losses, norms and rates per step, and the parameters."""
        return {
            "loss": [record["loss"] for record in self.records],
            "norm": [record["grad_norm"] for record in self.records],
            "lr": [record["lr"] for record in self.records],
            "parameters": {
                name: tensor.detach().numpy().copy()
                for name, tensor in self.engine.module.named_parameters()
            },
            "digest": digest(self.engine.module),
        }


class Recorder(PlainWorld):
    """A world that keeps what is reported."""

    def __init__(self, rank: int, size: int, records: list[dict[str, Any]]) -> None:
        super().__init__(rank, size, RunDir(Path("/nowhere")))
        object.__setattr__(self, "records", records)

    def report(self, metrics: Any) -> None:
        self.records.append(dict(metrics))  # type: ignore[attr-defined]

    def should_stop(self) -> bool:
        return False


def digest(model: Any) -> str:
    total = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        total.update(tensor.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def curve(place: Place, base: Path, fields: dict[str, Any], data: Dataset) -> dict[str, Any]:
    """Train and return the outcome."""
    session = Session(place, base, fields, data)
    session.train()
    return session.outcome() | {"record": check(session, "float32")}


def check(session: Session, dtype: str) -> dict[str, Any]:
    return loop.check_engine(session.engine, session.config, dtype, session.world)


def wrong_dtype(place: Place, base: Path, fields: dict[str, Any], data: Dataset) -> None:
    """Ask for a number format that does not run."""
    check(Session(place, base, fields, data), "bfloat16")


def interrupted(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, folder: Path, at: int
) -> dict[str, Any]:
    """Train, saving at step ``at``; then load that into a fresh engine and train the rest."""
    whole = Session(place, base, fields, data)

    def save(step: int, metrics: Any) -> None:
        meta = checkpoint.Meta(step, place.size, whole.config.zero, "0")
        checkpoint.save(whole.engine, folder, meta, whole.world)

    whole.train(save)
    again = Session(place, base, fields, data)
    found, passed = checkpoint.newest(folder)
    assert found is not None, passed
    meta = checkpoint.load(again.engine, folder / f"step-{at:08d}", again.world)
    again.train(first=meta.step)
    return {"whole": whole.outcome(), "again": again.outcome(), "newest": found.name}


def exported(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, target: Path
) -> dict[str, Any]:
    """Train, write the model, and return what the live one computes."""
    session = Session(place, base, fields, data)
    session.train()
    if place.rank == 0:
        write_model(session.engine.module.state_dict(), base, target)
    session.engine.eval()
    with torch.no_grad():
        logits = session.engine(input_ids=torch.arange(3, 19)[None], use_cache=False).logits
    return {"logits": logits.numpy()}


def evaluated(place: Place, base: Path, fields: dict[str, Any], data: Dataset) -> dict[str, Any]:
    """Evaluate, and return what it may not have changed, before and after."""
    session = Session(place, base, fields, data)

    def state() -> tuple[str, bytes, bool]:
        random_state = torch.get_rng_state().numpy().tobytes()
        return digest(session.engine.module), random_state, session.engine.module.training

    session.engine.train()
    before = state()
    loss = heldout_loss(session.engine, data, session.world)
    after = state()
    gradients = [p.grad for p in session.engine.module.parameters() if p.grad is not None]
    return {"same": before == after, "loss": loss, "gradients": len(gradients)}


def poisoned(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, token: int
) -> dict[str, Any]:
    """Train a model in which one token's embedding is not a number."""
    session = Session(place, base, fields, data)
    with torch.no_grad():
        session.engine.module.get_input_embeddings().weight[token] = float("nan")
    session.train()
    return session.outcome()
