"""What to change in a run that does not fit: each way tried by the estimate itself. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cluster.config import build
from cluster.errors import ConfigError
from cluster.resources import GIB
from train_jobs.config import FinetuneConfig

Estimate = Callable[[FinetuneConfig], Mapping[str, int]]
SHOWN = 3


def remedies(config: FinetuneConfig, estimate: Estimate, free: int) -> list[str]:
    """Return what makes a rank fit into ``free`` bytes, the smallest change first.

    Where no single change does, the one that helps most.
    """
    tried = [(sum(estimate(other).values()), said) for said, other in ways(config)]
    enough = [f"{said}: {size / GIB:.1f} GiB" for size, said in tried if size <= free]
    if enough or not tried:
        return enough[:SHOWN]
    size, said = min(tried)
    return [f"{said}: {size / GIB:.1f} GiB, which is not enough by itself"]


def ways(config: FinetuneConfig) -> Iterator[tuple[str, FinetuneConfig]]:
    """Yield settings that need less memory: first those that leave the result what it is."""
    wanted: list[list[str]] = []
    if config.batch.micro > 1:
        wanted.append(["batch.micro=1"])
    if config.run.workers > 1:
        wanted += [[f"zero={stage}"] for stage in (2, 3) if stage > config.zero]
    workers = config.run.workers * 2
    wanted.append([f"run.workers={workers}", "zero=3" if not config.adapter else "zero=2"])
    if config.run.dtype != "bfloat16":
        wanted.append(["run.dtype=bfloat16"])
    if not config.adapter:
        wanted.append(["adapter.kind=lora", f"zero={min(2, config.zero)}"])
    wanted.append([f"data.max_len={config.data.max_len // 2}"])
    for settings in wanted:
        try:
            yield "  ".join(f"--set {one}" for one in settings), _changed(config, settings)
        except ConfigError:
            continue  # another rule forbids it here


def _changed(config: FinetuneConfig, settings: list[str]) -> FinetuneConfig:
    fields: dict[str, Any] = config.model_dump(mode="json")
    if fields["adapter"] is None and any(one.startswith("adapter.") for one in settings):
        fields["adapter"] = {}
    return build(fields, FinetuneConfig, settings)
