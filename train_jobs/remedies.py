"""What to change in a run that does not fit: each way tried by the estimate itself. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cluster.config import build
from cluster.errors import ConfigError
from cluster.resources import GIB
from train_jobs.config import FinetuneConfig
from train_jobs.estimate import dtype_of

Settings = Mapping[str, object]
Estimate = Callable[[FinetuneConfig], int]
"""Bytes of a rank."""
Fits = Callable[[FinetuneConfig, int], bool]
"""Whether ranks of so many bytes have room."""
SHOWN = 3


def remedies(config: FinetuneConfig, estimate: Estimate, fits: Fits) -> list[str]:
    """Return what makes the ranks fit, the smallest change first.

    Where no single change does, several together; and where those do not, the one that helps most.
    """
    tried = [(settings, other, estimate(other)) for settings, other in ways(config)]
    enough = [_told(settings, size) for settings, other, size in tried if fits(other, size)]
    if enough:
        return enough[:SHOWN]
    together = _together(config, estimate, fits)
    if together:
        return [_told(together, estimate(_changed(config, together)))]
    settings, _, size = min(tried, key=lambda one: one[2])
    return [f"{_told(settings, size)}, which is not enough by itself"]


def ways(config: FinetuneConfig) -> Iterator[tuple[Settings, FinetuneConfig]]:
    """Yield settings that may need less memory: first those that leave the result what it is."""
    for settings in _wanted(config):
        try:
            yield settings, _changed(config, settings)
        except ConfigError:
            continue  # another rule forbids it here


def _wanted(config: FinetuneConfig) -> Iterator[Settings]:
    run, zero = config.run, config.zero
    if config.batch.micro > 1:
        yield {"batch.micro": 1}
    if config.gradient_checkpointing != "full":
        yield {"gradient_checkpointing": "full"}
    if run.workers > 1:
        yield from ({"zero": stage} for stage in (2, 3) if stage > zero)
    if run.num_gpus and not config.offload.optimizer:
        yield {"offload.optimizer": True, "zero": max(2, zero)}
    if run.num_gpus and not config.offload.parameters:
        yield {"offload.optimizer": True, "offload.parameters": True, "zero": 3}
    if config.objective.sliced and run.workers > 1:
        yield {"sequence_parallel": 2 * config.sequence_parallel}
    most = 2 if config.adapter else 3
    if run.min_workers is None:
        yield {"run.workers": 2 * run.workers, "zero": most}
    elif 2 * run.min_workers <= run.workers:
        yield {"run.workers.min": 2 * run.min_workers, "zero": most}
    if dtype_of(config) != "bfloat16":
        yield {"run.dtype": "bfloat16"}
    if not config.adapter:
        yield {"adapter.kind": "lora", "zero": min(2, zero)}
    cut = {} if config.data.truncate != "error" else {"data.truncate": "end"}
    yield {"data.max_len": config.data.max_len // 2, **cut}


def _together(config: FinetuneConfig, estimate: Estimate, fits: Fits) -> Settings | None:
    """Return as few of all the ways as do it together; None where all of them do not."""
    chosen: list[Settings] = []
    size = estimate(config)
    for settings in _wanted(config):
        less = _estimated(config, [*chosen, settings], estimate)
        if less is None or less >= size:
            continue
        chosen, size = [*chosen, settings], less
        if not fits(_changed(config, _joined(chosen)), size):
            continue
        for one in reversed(list(chosen)):  # what changes the result goes first
            fewer = [other for other in chosen if other is not one]
            less = _estimated(config, fewer, estimate)
            if less is not None and fits(_changed(config, _joined(fewer)), less):
                chosen = fewer
        return _joined(chosen)
    return None


def _joined(several: list[Settings]) -> Settings:
    return {key: value for settings in several for key, value in settings.items()}


def _estimated(config: FinetuneConfig, several: list[Settings], estimate: Estimate) -> int | None:
    """Return the bytes with several changes; None where a rule forbids them together."""
    try:
        return estimate(_changed(config, _joined(several)))
    except ConfigError:
        return None


def _told(settings: Settings, size: int) -> str:
    return f"{said(settings)}: {size / GIB:.1f} GiB"


def said(settings: Settings) -> str:
    """Return settings as a command line has them."""
    values = ((key, str(v).lower() if isinstance(v, bool) else v) for key, v in settings.items())
    return "  ".join(f"--set {key}={value}" for key, value in values)


def _changed(config: FinetuneConfig, settings: Settings) -> FinetuneConfig:
    fields: dict[str, Any] = config.model_dump(mode="json")
    run = fields["run"]
    if least := run.pop("min_workers"):  # as a file writes it
        run["workers"] = {"min": least, "max": run["workers"]}
    if fields["adapter"] is None and any(key.startswith("adapter.") for key in settings):
        fields["adapter"] = {}
    told = ((key, str(v).lower() if isinstance(v, bool) else v) for key, v in settings.items())
    return build(fields, FinetuneConfig, [f"{key}={value}" for key, value in told])
