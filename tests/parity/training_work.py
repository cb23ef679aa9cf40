"""What the ranks of the training tests run; imported in their processes."""

from __future__ import annotations

import errno
import gc
import hashlib
import resource
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from train_jobs import checkpoint, loop
from train_jobs.adapters import merged
from train_jobs.config import FinetuneConfig
from train_jobs.data.dataset import Dataset
from train_jobs.data.example import trained_in
from train_jobs.data.order import Order
from train_jobs.engine import build_engine, forget
from train_jobs.evaluate import evaluate
from train_jobs.export import gathered, live_tensors, write_model
from train_jobs.export_adapter import write_adapter
from train_jobs.group import Device, Place
from train_jobs.guard import Guard
from train_jobs.ports import PlainWorld
from train_jobs.progress import START, Progress
from train_jobs.reshape import fitted
from train_jobs.runs import RunDir
from train_jobs.saver import Saver
from train_jobs.schedule import lr_at
from train_jobs.standing import Standing
from train_jobs.supervisor import Supervisor
from train_jobs.watch import Heart


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
        fields[key] = fields.get(key, {}) | value if isinstance(value, dict) else value
    return fields


class Session:
    """An engine on the tiny model, and what the loop needs beside it."""

    def __init__(
        self,
        place: Place,
        base: Path,
        fields: dict[str, Any],
        data: Dataset,
        universal: bool = False,
    ) -> None:
        fields = fields | {"run": fields["run"] | {"workers": place.size}}
        self.config = FinetuneConfig.model_validate(fields)
        self.data = data
        self.records: list[dict[str, Any]] = []
        self.world = Recorder(place.rank, place.size, self.records)
        run = self.config.run
        self.order = Order(len(data.rows), self.config.batch.total, run.seed, run.epochs, run.steps)
        device = Device("cpu", "float32")
        self.engine, self.objective = build_engine(base, self.config, device, universal)

    def train(
        self,
        save: Any = lambda progress, metrics: None,
        since: Progress = START,
        guard: Guard | None = None,
        go_live: Any = lambda progress: None,
    ) -> Progress:
        what = (self.engine, self.config, self.objective, self.data, self.order, self.world)
        return loop.train(*what, save, since, guard, go_live)

    def whole(self) -> dict[str, torch.Tensor]:
        """Return every tensor of the model, gathered under ZeRO 3."""
        live = live_tensors(self.engine.module)
        return {name: gathered(tensor, tensor.dtype, True) for name, tensor in live.items()}

    def meta(self, progress: Progress) -> checkpoint.Meta:
        config = self.config.model_dump(mode="json")
        return checkpoint.Meta(progress, self.world.size, self.config.zero, config)

    def save(self, folder: Path) -> Any:
        """Return what the loop calls to write its checkpoints into ``folder``."""
        run = self.config.run

        def write(progress: Progress, metrics: Any) -> None:
            checkpoint.save(
                self.engine,
                folder,
                self.meta(progress),
                self.world,
                run.keep,
                adapter=self.config.adapter is not None,
            )

        return write

    def load(self, path: Path) -> Progress:
        """Go on from a checkpoint."""
        meta = checkpoint.read_meta(path)
        checkpoint.check(path, meta, self.config.model_dump(mode="json"))
        checkpoint.load(self.engine, path, adapter=self.config.adapter is not None)
        return meta.progress

    def outcome(self) -> dict[str, Any]:
        """Return losses, norms and rates per step, and the parameters."""
        return {
            "loss": [record["loss"] for record in self.records],
            "norm": [record["grad_norm"] for record in self.records],
            "lr": [record["lr"] for record in self.records],
            "parameters": {name: tensor.numpy() for name, tensor in self.whole().items()},
            "digest": digest(self.whole()),
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

    def should_save(self) -> bool:
        return False


def digest(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def curve(place: Place, base: Path, fields: dict[str, Any], data: Dataset) -> dict[str, Any]:
    """Train and return the outcome."""
    session = Session(place, base, fields, data)
    session.train()
    return session.outcome() | {"record": check(session, "float32")}


def by_work(place: Place, base: Path, fields: dict[str, Any], data: Dataset) -> dict[str, Any]:
    """Train with rows dealt out by the work that they make, as a run does."""
    session = Session(place, base, fields, data)
    session.order = replace(session.order, work=data.row_work)
    session.train()
    return session.outcome()


def gradients(place: Place, base: Path, fields: dict[str, Any], data: Dataset) -> dict[str, Any]:
    """Return each parameter's whole gradient of the first step, as the optimiser is given it."""
    from deepspeed.utils import safe_get_full_grad

    session = Session(place, base, fields, data)
    found: dict[str, Any] = {}
    step = session.engine.step

    def looked() -> None:
        if session.engine.is_gradient_accumulation_boundary():
            for name, parameter in session.engine.module.named_parameters():
                found[name] = safe_get_full_grad(parameter).float().numpy().copy()
        step()

    session.engine.step = looked
    session.train()
    return found


def forgotten(place: Place, base: Path, fields: dict[str, Any], data: Dataset) -> float:
    """Train, let go of the engine, and return the share of its memory that is still taken."""

    def held() -> int:
        storages = {
            one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
            for one in gc.get_objects()
            if isinstance(one, torch.Tensor)
        }
        return sum(storages.values())

    before = held()
    session = Session(place, base, fields, data)
    session.train()
    most = held() - before
    forget(session.engine)
    del session
    gc.collect()
    return (held() - before) / most


def mean_of_means(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset
) -> dict[str, Any]:
    """Train as if each row counted alike, however few of its tokens are trained."""
    session = Session(place, base, fields, data)
    losses = []
    for step in range(session.order.steps):
        batches = session.order.micro_batches(step, 0, 1, 1)
        means = []
        for group in session.engine.optimizer.param_groups:
            group["lr"] = lr_at(step, session.order.steps, session.config.optim)
        for rows in batches:
            examples, keys = loop.drawn(data, [seat for seat in rows if seat], 0)
            batch = session.objective.collate(examples, keys, "cpu")
            mean = session.objective.loss(session.engine, batch).total / trained_in(examples)
            session.engine.backward(mean)
            session.engine.step()
            means.append(float(mean.detach()))
        losses.append(sum(means) / len(means))
    return {"loss": losses}


def check(session: Session, dtype: str) -> dict[str, Any]:
    return loop.check_engine(session.engine, session.config, dtype, session.world)


def wrong_dtype(place: Place, base: Path, fields: dict[str, Any], data: Dataset) -> None:
    """Ask for a number format that does not run."""
    check(Session(place, base, fields, data), "bfloat16")


def interrupted(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, folder: Path, at: int
) -> dict[str, Any]:
    """Train, saving as configured; then load step ``at`` into a fresh engine, train the rest."""
    whole = Session(place, base, fields, data)
    ended = whole.train(whole.save(folder))
    again = Session(place, base, fields, data)
    found, passed = checkpoint.newest(folder)
    assert found is not None, passed
    final = again.train(since=again.load(folder / f"step-{at:08d}"))
    return {
        "whole": whole.outcome(),
        "again": again.outcome(),
        "newest": found.name,
        "counted": [(p.step, p.tokens, p.trained_tokens) for p in (ended, final)],
        "tensors": saved_tensors(found) if place.rank == 0 else [],
    }


class Until(Guard):
    """Ends a leg of a run after a step, which the schedule of the rate knows nothing of."""

    def __init__(self, step: int) -> None:
        self.step, self.done = step, 0

    @property
    def is_over(self) -> bool:
        return self.done >= self.step

    def after(self, progress: Progress, metrics: Any) -> bool:
        self.done = progress.step
        return self.is_over


def leg(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, folder: Path, until: int
) -> dict[str, Any]:
    """Go on from the newest checkpoint, whoever wrote it, up to step ``until``, and save there."""
    found, passed = checkpoint.newest(folder / "checkpoints")
    assert not passed
    if found is None:
        session, since = Session(place, base, fields, data), START
    else:
        meta = checkpoint.read_meta(found)
        world = Recorder(place.rank, place.size, [])
        with fitted(found, meta, folder / "reshaped", world) as (source, universal):
            session = Session(place, base, fields, data, universal)
            checkpoint.check(found, meta, session.config.model_dump(mode="json"))
            checkpoint.load(session.engine, source, session.config.adapter is not None)
        since = meta.progress
    began = moments(session) if found else {}  # before a step there are none
    session.train(session.save(folder / "checkpoints"), since, Until(until))
    left = sorted(path.name for path in folder.iterdir())
    return session.outcome() | {"began": began, "ended": moments(session), "left": left}


def moments(session: Session) -> dict[str, Any]:
    """Return what each trained parameter and its optimiser have, whole, as float32."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, Any] = {}
    staged = session.config.zero > 0
    for name, parameter in session.engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if staged:
            state = {
                "value": safe_get_full_fp32_param(parameter),
                **{key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS},
            }
        else:
            kept = session.engine.optimizer.state.get(parameter, {})
            state = {"value": parameter.detach(), **{key: kept.get(key) for key in MOMENTS}}
        for key, value in state.items():
            if value is not None:
                found[f"{name}/{key}"] = value.clone().numpy()
    return found


MOMENTS = ("exp_avg", "exp_avg_sq")


def saved_tensors(path: Path) -> list[str]:
    """Return the names of the model's tensors in a checkpoint that rank 0 of ZeRO 0 to 2 wrote."""
    file = path / checkpoint.STATE / "mp_rank_00_model_states.pt"
    if not file.exists():
        return []
    return sorted(torch.load(file, weights_only=False)["module"])


def loaded_elsewhere(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, path: Path, wrote: int
) -> str:
    """Load a checkpoint that ``wrote`` ranks wrote; return the digest."""
    session = Session(place, base, fields, data)
    told = session.config.model_dump(mode="json")
    told["run"]["workers"] = wrote
    meta = checkpoint.read_meta(path)
    checkpoint.check(path, meta, told)
    checkpoint.load(session.engine, path, adapter=session.config.adapter is not None)
    return digest(session.whole())


def exported(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, target: Path
) -> dict[str, Any]:
    """Train, write the model, and return what the live one computes."""
    session = Session(place, base, fields, data)
    session.train()
    session.engine.eval()
    with torch.no_grad():
        logits = session.engine(input_ids=torch.arange(3, 19)[None], use_cache=False).logits
    frozen = {name: tensor for name, tensor in session.whole().items() if "lora_" not in name}
    record = check(session, "float32")
    adapter = session.config.adapter is not None
    if not session.config.publish.merge:
        write_adapter(session.engine.module, "base@1", target, place.rank)
        return {"logits": logits.numpy(), "frozen": frozen, "record": record}
    model = merged(session.engine.module) if adapter else session.engine.module
    if place.rank == 0 or session.config.zero == 3:
        write_model(live_tensors(model), base, target, place.rank)
    return {"logits": logits.numpy(), "frozen": frozen, "record": record}


def evaluated(place: Place, base: Path, fields: dict[str, Any], data: Dataset) -> dict[str, Any]:
    """Evaluate, and return what it may not have changed, before and after."""
    session = Session(place, base, fields, data)

    def state() -> tuple[str, bytes, bool]:
        random_state = torch.get_rng_state().numpy().tobytes()
        return digest(session.whole()), random_state, session.engine.module.training

    session.engine.train()
    before = state()
    loss = evaluate(session.engine, session.objective, data, session.world)["loss"]
    after = state()
    gradients = [p.grad for p in session.engine.module.parameters() if p.grad is not None]
    return {"same": before == after, "loss": loss, "gradients": len(gradients)}


def poisoned(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, token: int, folder: Path
) -> dict[str, Any]:
    """Train a model in which one token's embedding is not a number, saving after every step."""
    session = Session(place, base, fields, data)
    write = session.save(folder)

    def poison() -> None:
        with torch.no_grad():
            session.engine.module.get_input_embeddings().weight[token] = float("nan")

    def save(progress: Progress, metrics: Any) -> None:
        write(progress, metrics)
        poison()  # the optimiser's own copy of the weights has healed it

    poison()
    session.train(save)
    return session.outcome()


def disk_full(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, folder: Path, at: int
) -> None:
    """Train; from step ``at`` on files of rank 1 must not be larger than a few kilobytes."""
    session = Session(place, base, fields, data)
    write = session.save(folder / "checkpoints")

    def save(progress: Progress, metrics: Any) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if place.rank == 1 and progress.step >= at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            write(progress, metrics)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    session.train(save)


def sealed_beside(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, folder: Path, fails: bool
) -> dict[str, Any]:
    """Train with checkpoints that take long to seal, or cannot be; return what came when."""
    session = Session(place, base, fields, data)
    saver = Saver(folder, session.world, keep=2, adapter=False, wait_s=60)
    plain, gates = checkpoint.seal, [threading.Event()]

    def seal(*args: Any) -> None:
        assert gates[-1].wait(20), "a step waits for it"
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device", "manifest.json")
        plain(*args)

    class Beside(Guard):
        def is_broken(self) -> bool:
            gates[-1].set()  # the next step has begun
            if fails:
                saver.join()
            return saver.is_broken()

        def settle(self) -> None:
            saver.settle()

    def save(progress: Progress, metrics: Any) -> None:
        saver.settle()
        gates.append(threading.Event())
        saver.save(session.engine, session.meta(progress), (), {"step": progress.step})

    checkpoint.seal = seal
    try:
        session.train(save, guard=Beside())
        gates[-1].set()
        saver.settle()
    finally:
        gates[-1].set()
        saver.join()
        checkpoint.seal = plain
    told = [record.get("event", record.get("step")) for record in session.records]
    return {"told": told, "left": sorted(path.name for path in folder.iterdir())}


def looked_at(
    place: Place, base: Path, fields: dict[str, Any], data: Dataset, folder: Path
) -> dict[str, Any]:
    """Train with a look at the rows after every second step, as a real run does."""
    session = Session(place, base, fields, data)
    seen: list[float] = []

    def measure(when: str) -> dict[str, float]:
        figures = evaluate(session.engine, session.objective, data, session.world)
        seen.append(figures["loss"])
        return figures

    run = session.config.run
    saver = Saver(folder, session.world, run.keep, adapter=False, wait_s=60)
    heart = Heart(folder / "pulses", place.rank, place.size, 60)
    guard = Supervisor(run, Standing(), saver, heart, measure)
    saved: list[int] = []
    ended = session.train(lambda progress, _: saved.append(progress.step), guard=guard)
    stood = {"standing": guard.standing, "saved": saved, "seen": seen, "steps": ended.step}
    return session.outcome() | stood
