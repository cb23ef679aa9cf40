"""The model that generates gets the weights that were learnt, as a version of its own name.

A replica follows its alias in the library: when that moves it loads the version, lets answers of
the old one finish, and says with each answer which version gave it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from cluster.errors import JobError, RoundhouseError
from cluster.generation import Ask, Sampler
from cluster.library.manifest import CARD, Facts
from cluster.library.ref import CHAMPION
from cluster.library.store import Library, Version
from train_jobs.export import live_tensors, write_model

WAIT_S = 300.0
POLL_S = 0.5
NOTE = "a policy in training, published to generate with"


class Refresh:
    """Publishes the policy every few steps and waits until the app answers with it."""

    def __init__(self, app: str, base: Version, every: int, sampler: Sampler) -> None:
        self._app, self._base, self._every, self._sampler = app, base, every, sampler
        self._steps = 0

    def step(self, engine: Any) -> None:
        """Call before each step on every rank; raises JobError on all of them together."""
        due = self._steps % self._every == 0
        self._steps += 1
        if not due:
            return
        told: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                self._renew(engine)
            except RoundhouseError as error:
                told[0] = str(error)
        dist.broadcast_object_list(told)
        if told[0]:
            raise JobError(f"the app {self._app} was not given new weights: {told[0]}")

    def _renew(self, engine: Any) -> None:
        library = Library()
        staging = library.root / f".{self._app}-policy"
        shutil.rmtree(staging, ignore_errors=True)
        write_model(policy_tensors(engine.module), self._base.path, staging)
        (staging / CARD).write_text(f"# {self._app}\n\nMade from `{self._base.ref}`: {NOTE}.\n")
        old = self._base.manifest
        facts = Facts(
            base=self._base.ref,
            licence=old.licence,
            notes=(*old.notes, NOTE),
        )
        version = library.publish(self._app, staging, facts, move=True)
        shutil.rmtree(staging, ignore_errors=True)
        now = library.aliases(self._app).get(CHAMPION)
        library.move_alias(self._app, CHAMPION, version.number, now, "grpo")
        self._await(version.ref)
        for one in self._policies(library):
            if one.ref != version.ref:
                library.remove(one.ref)  # nothing answers with it any more

    def _policies(self, library: Library) -> list[Version]:
        """Return what this run has published to generate with, also before it was resumed.

        Told by the manifest: a policy has no lineage, and says last that it is one. What somebody
        has given an alias is no longer the run's to remove.
        """
        named = set(library.aliases(self._app).values())
        return [
            one
            for one in library.versions(self._app)
            if one.manifest.notes[-1:] == (NOTE,)
            and one.manifest.lineage is None
            and one.manifest.base == self._base.ref
            and one.number not in named
        ]

    def _await(self, ref: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Wait until two answers in a row come from the version."""
        until, probe = clock() + WAIT_S, Ask(prompt_ids=(0,), max_tokens=1)
        while True:
            said = {answer.version for answer in self._sampler.ask([probe, probe])}
            if said == {ref}:
                return
            if clock() > until:
                raise JobError(
                    f"after {WAIT_S:g} s it still answers with {', '.join(sorted(said))}, not with "
                    f"{ref}; is it deployed as {self._app}@{CHAMPION}?"
                )
            time.sleep(POLL_S)


def policy_tensors(module: Any) -> Mapping[str, Any]:
    """Return the weights by the base's names, an adapter added; the module stays as it is."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, PeftModel):
        return live_tensors(module)
    model = module.get_base_model()
    found: dict[str, Any] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            found[f"{name}.weight"] = _sum_of(layer)
    plain = {name.replace(".base_layer", ""): value for name, value in live_tensors(model).items()}
    return plain | found


def _sum_of(layer: Any) -> Any:
    """Return what a layer multiplies by: its weight and its addition, as its forward pass has it.

    DoRA's is not a sum: peft has a merge of its own for it, which scales each row.
    """
    import torch

    [adapter] = layer.active_adapters
    base, variant = layer.get_base_layer().weight, layer.lora_variant.get(adapter)
    with torch.no_grad():
        if variant is not None:
            return variant.merge_safe(layer, adapter, base.detach().clone())
        return base.detach() + layer.get_delta_weight(adapter)
