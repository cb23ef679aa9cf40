"""One rank of each side: what it runs, and what it says of its steps."""

from __future__ import annotations

import functools
import json
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.training.cases import MAX_LEN, RANKS
from benchmarks.training.probe import Probe

PROFILED = "roundhouse-profiled"
OURS, DEEPSPEED, DDP_BF16 = "roundhouse", "hf-deepspeed-float32", "hf-ddp-bfloat16"


def ours(
    home: Path, address: str, rank: int, warm: int, measured: int, probe: Probe | None = None
) -> dict[str, Any]:
    """Run our own loop: seconds, useful tokens, and what of the time was not the model's."""
    from train_jobs import group, loop
    from train_jobs.fit import Fit
    from train_jobs.ports import PlainWorld
    from train_jobs.runs import RunDir

    config, device = joined(home, address, rank, "auto")
    task = _task(config, home)
    probe, steps = probe or Probe(), list[float]()
    overhead, communication = Clock(), Clock()

    class Recording(PlainWorld):
        def report(self, metrics: Mapping[str, Any]) -> None:
            if "step_s" in metrics:
                steps.append(metrics["step_s"])
                with overhead.running(len(steps) > warm):
                    self.run.append(metrics)
                probe.after(len(steps))

    run = RunDir(home / "run")
    run.path.mkdir(exist_ok=True)
    baseline = resident()
    fit = Fit.begin(task, run, Recording(rank, RANKS, run), device, None, time.monotonic())

    def counted() -> bool:
        return len(steps) >= warm

    with timed_collectives(communication, counted):
        loop.drawn = overhead.timing(loop.drawn, counted)
        collate = overhead.timing(fit.objective.collate, counted)
        fit.objective.collate = collate  # type: ignore[method-assign]
        fit.train()
    taken = [[seat for seat in task.order.step(n) if seat] for n in range(warm + measured)]
    tokens = [sum(e.tokens for e in loop.drawn(task.train, seats, 0)[0]) for seats in taken]
    most, seen = peak(), probe.found(steps[-1])
    group.leave()
    return {
        **seen,
        "step_s": steps[warm:],
        "tokens": tokens[warm:],
        "engine": dict(fit.record),
        "overhead": overhead.seconds,
        "communication": communication.seconds,
        "peak": most - baseline,
    }


class Clock:
    """Seconds spent in some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self, counted: bool) -> Iterator[None]:
        """Count what happens inside."""
        began = time.monotonic()
        yield
        self.seconds += (time.monotonic() - began) * counted

    def timing(self, call: Callable[..., Any], counted: Callable[[], bool]) -> Callable[..., Any]:
        """Return ``call``, counted."""

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.running(counted()):
                return call(*args, **kwargs)

        return timed


@contextmanager
def timed_collectives(clock: Clock, counted: Callable[[], bool]) -> Iterator[None]:
    """Count the time inside of torch's collectives; waiting for a slower rank is part of it."""
    import torch.distributed as dist

    names = ("all_reduce", "reduce", "broadcast", "all_gather_into_tensor", "barrier")
    usual = {name: getattr(dist, name) for name in names if hasattr(dist, name)}
    for name, call in usual.items():
        setattr(dist, name, clock.timing(call, counted))
    try:
        yield
    finally:
        for name, call in usual.items():
            setattr(dist, name, call)


def joined(home: Path, address: str, rank: int, dtype: str) -> tuple[Any, Any]:
    """Enter the process group; returns the configuration and the device."""
    from cluster.config import load
    from train_jobs import group
    from train_jobs.config import FinetuneConfig

    config = load(home / "train.json", FinetuneConfig, [f"run.dtype={dtype}"])
    place = group.Place(rank, RANKS, rank, RANKS, address)
    group.prepare(place, config.run)
    device = group.join(place, config.run)
    group.quiet()
    return config, device


def _task(config: Any, home: Path) -> Any:
    from cluster.library.store import Library
    from train_jobs.data.dataset import Dataset
    from train_jobs.data.example import Document, Example
    from train_jobs.data.order import Order
    from train_jobs.data.packing import pack
    from train_jobs.task import Task

    examples = [
        Example((Document(f"documents.jsonl:{n}", tuple(row["ids"]), tuple(row["trained"])),))
        for n, row in enumerate(documents(home), start=1)
    ]
    packed = pack([example.tokens for example in examples], MAX_LEN)
    rows = tuple(tuple(examples[n] for n in row) for row in packed)
    data = Dataset(rows, MAX_LEN, 0, "0" * 64)
    total, seed, steps = config.batch.total, config.run.seed, config.run.steps
    order = Order(len(rows), total, seed, max_steps=steps, work=data.row_work)
    base = Library(home / "library").resolve(config.model)
    return Task(config, base, data, None, order, config.objective)


def documents(home: Path) -> list[dict[str, Any]]:
    """Return the case's documents: ids and mask."""
    return [json.loads(line) for line in (home / "documents.jsonl").read_text().splitlines()]


def trainer(
    home: Path, address: str, rank: int, warm: int, measured: int, dtype: str, deepspeed: bool
) -> dict[str, Any]:
    """Run the Trainer over the same documents in file order, as many in a step as we have."""
    import torch

    from train_jobs import group

    config, device = joined(home, address, rank, dtype)
    from transformers import (
        AutoModelForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from cluster.library.store import Library

    task = _task(config, home)
    made = documents(home)
    micro = max(1, round(len(made) / len(task.train.rows) * config.batch.micro))
    rows = [{"ids": d["ids"], "labels": labels_of(d)} for d in made]

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    steps: list[float] = []

    class StepClock(TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.append(time.monotonic() - self.began)

    options: dict[str, Any] = {}
    if deepspeed:
        rendered = config.deepspeed(device.dtype, on_gpu=device.name != "cpu")
        rendered["train_micro_batch_size_per_gpu"] = micro
        rendered["zero_force_ds_cpu_optimizer"] = False
        options["deepspeed"] = rendered
    else:
        options |= {"use_cpu": device.name == "cpu", "ddp_backend": "gloo"}
    arguments = TrainingArguments(
        output_dir=str(home / f"trainer-{rank}"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=1,
        max_steps=warm + measured,
        learning_rate=config.optim.lr,
        max_grad_norm=config.optim.clip,
        optim="adamw_torch_fused",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        bf16=dtype == "bfloat16",
        **options,
    )
    baseline = resident()
    model = AutoModelForCausalLM.from_pretrained(
        Library(home / "library").resolve(config.model).path,
        # its own way to bf16 is autocast over float32 weights
        dtype=getattr(torch, device.dtype if deepspeed else "float32"),
        trust_remote_code=False,
        use_safetensors=True,
    )
    running = InOrder(
        model=model, args=arguments, train_dataset=rows, data_collator=pad, callbacks=[StepClock()]
    )
    running.train()
    engine = type(running.model_wrapped).__name__
    if deepspeed is (engine != "DeepSpeedEngine"):
        raise RuntimeError(f"the Trainer ran {engine}")
    whole = micro * RANKS
    sizes = [len(d["ids"]) for d in made]
    tokens = [sum(sizes[step * whole : (step + 1) * whole]) for step in range(warm + measured)]
    found = {"engine": engine, "dialogues_per_rank": micro, "dtype": dtype}
    group.leave()
    return {
        "step_s": steps[warm:],
        "tokens": tokens[warm:],
        "engine": found,
        "peak": peak() - baseline,
    }


def labels_of(document: Mapping[str, Any]) -> list[int]:
    """Return the ids with -100 where nothing is trained, as the Trainer wants them."""
    pairs = zip(document["ids"], document["trained"], strict=True)
    return [number if trained else -100 for number, trained in pairs]


def pad(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Pad a micro-batch to its longest dialogue."""
    import torch

    longest = max(len(row["ids"]) for row in batch)
    pairs = [(row, longest - len(row["ids"])) for row in batch]
    return {
        "input_ids": torch.tensor([[*r["ids"], *[0] * n] for r, n in pairs]),
        "labels": torch.tensor([[*r["labels"], *[-100] * n] for r, n in pairs]),
        "attention_mask": torch.tensor([[1] * len(r["ids"]) + [0] * n for r, n in pairs]),
    }


def resident() -> int:
    """Return the bytes that are resident now: libraries only, before anything is loaded."""
    import psutil
    import transformers  # noqa: F401 (part of the libraries)

    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """Return the most bytes that were resident at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def profiled(home: Path, address: str, rank: int, warm: int, measured: int) -> dict[str, Any]:
    """Run our own loop with its last step profiled."""
    from benchmarks.training.profiled import Profiler

    return ours(home, address, rank, warm, measured, Profiler(warm + measured))


SIDES: dict[str, Callable[[Path, str, int, int, int], dict[str, Any]]] = {
    OURS: ours,
    DEEPSPEED: functools.partial(trainer, dtype="float32", deepspeed=True),
    DDP_BF16: functools.partial(trainer, dtype="bfloat16", deepspeed=False),
}
RUNS = {**SIDES, PROFILED: profiled}
"""With the one that is no side, for its time is the profiler's too."""
