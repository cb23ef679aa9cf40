"""How a rank comes by a version: it has the same weights already, maps them, or reads and packs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import EngineError
from serve_apps.engine.native.room import Rooms
from serve_apps.engine.wire import RankSpec

if TYPE_CHECKING:
    import torch

    from cluster.weights.client import Fetched
    from serve_apps.engine.group import Group
    from serve_apps.engine.mapped import Mapped
    from serve_apps.engine.model import LoadedModel

log = logging.getLogger(__name__)


class Reader:
    """One rank's; ``model`` is called by its loader, ``leave`` by any thread."""

    def __init__(
        self, spec: RankSpec, group: Group, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._spec, self._group, self._device, self._dtype = spec, group, device, dtype
        self._proven: set[str] = set()
        """Configurations of which a version was computed as its model does."""
        self._mapped = self._shelf()
        self._rooms = Rooms()

    def model(
        self,
        version: str,
        directory: Path,
        holder: str | None,
        held: Mapping[str, LoadedModel],
    ) -> LoadedModel:
        """Return this rank's share of a version, proven; all ranks have theirs, or each raises.

        ``holder``: its weights lie on the shelf, leased to that one, and not in ``directory``.
        """
        alone = self._group.size == 1
        model = self._twin(version, directory, held) if alone and not holder else None
        if model is None and alone and self._mapped:
            model = self._map(self._mapped, version, directory)
        return model or self._read(version, directory, holder, held)

    def leave(self, version: str) -> None:
        """Take note that this rank has dropped a version."""
        if self._mapped:
            self._mapped.leave(version)

    @property
    def spare_bytes(self) -> int:
        """Bytes that are kept for the next version's weights."""
        return self._rooms.spare_bytes

    def tidy(self) -> None:
        """Give back what is kept for a next version, when none has come for long."""
        self._rooms.tidy()

    def close(self) -> None:
        """Leave all that is shared with other ranks; bounded."""
        if self._mapped:
            self._mapped.close()

    def _shelf(self) -> Mapped | None:
        spec = self._spec
        if spec.weights == "packed":
            return None
        if self._device.type != "cpu":
            raise EngineError(
                f"engine.weights: shared is for ranks on a CPU, and this one is on {self._device}; "
                "set device: cpu, or weights: packed"
            )
        from serve_apps.engine.mapped import Mapped

        dtype = str(self._dtype).removeprefix("torch.")
        return Mapped(spec.quantization, dtype, spec.rank, spec.num_ranks)

    def _twin(
        self, version: str, directory: Path, held: Mapping[str, LoadedModel]
    ) -> LoadedModel | None:
        """Return a held model again where a directory has the same weights, told by their hashes.

        What a run publishes last is as a rule what it put on the shelf last.
        """
        from cluster.weights.files import holds

        shape = _shape(directory)
        for other, model in held.items():
            if model.native is None or model.content is None:
                continue
            if _shape(model.directory) == shape and holds(directory, model.content):
                log.info("%s is what %s is: nothing is read", version, other)
                if self._mapped:
                    self._mapped.again(version, other)
                return model.again()
        return None

    def _map(self, mapped: Mapped, version: str, directory: Path) -> LoadedModel | None:
        """Return a version as another rank of this node has packed and proven it, if one has."""
        from serve_apps.engine.model import bare_model

        model = bare_model(str(directory), self._dtype, self._spec.quantization)
        began = time.monotonic()
        made = None if model is None else mapped.find(version)
        if model is None or made is None:
            return None
        model.prepare(self._spec.step_timeout_s, made=made)
        log.info("%s: mapped in %.2f s", version, time.monotonic() - began)
        return model

    def _read(
        self, version: str, directory: Path, holder: str | None, held: Mapping[str, LoadedModel]
    ) -> LoadedModel:
        """Read and pack a version; where weights are shared, put it there and map it."""
        group, mapped, began = self._group, self._mapped, time.monotonic()
        # apart from reading: there transformers makes process groups, which torch numbers, and a
        # rank that failed before would be one behind in every load from then on
        fetched, shape = group.all_or_none(lambda: self._gather(version, directory, holder))
        like = next((m for m in held.values() if m.bare and _shape(m.directory) == shape), None)
        model = group.all_or_none(lambda: self._build(directory, fetched, like))
        read = time.monotonic()
        proven = shape in self._proven
        room = None if mapped else self._rooms.room()
        group.all_or_none(
            lambda: model.prepare(
                self._spec.step_timeout_s, proven, shareable=mapped is not None, room=room
            )
        )
        if room and model.native:
            self._rooms.lend(room, model.native)
        self._proven.add(shape)
        packed = time.monotonic()
        if mapped:
            group.all_or_none(lambda: model.settle(mapped.put(version, model.tensors)))
        log.info(
            "%s: read in %.2f s, packed and proven in %.2f s, shared in %.2f s",
            version, read - began, packed - read, time.monotonic() - packed,
        )  # fmt: skip
        return model

    def _gather(
        self, version: str, directory: Path, holder: str | None
    ) -> tuple[Fetched | None, str]:
        """Return what the shelf has, checked, and config.json: a rank may fail here alone."""
        fetched = None
        if holder:
            from cluster.weights.client import fetch

            fetched = fetch(version, holder)
        return fetched, _shape(directory)

    def _build(
        self, directory: Path, fetched: Fetched | None, like: LoadedModel | None
    ) -> LoadedModel:
        from serve_apps.engine.model import read_model

        spec = self._spec
        state = tensors_of(fetched) if fetched else None
        model = read_model(
            str(directory),
            self._device,
            self._dtype,
            spec.num_ranks,
            spec.quantization,
            state,
            like,
        )
        model.content = fetched.bundle.tensors if fetched else None
        return model


def _shape(directory: Path) -> str:
    """Return what tells whether two versions differ in their numbers alone."""
    told = directory / "config.json"
    return told.read_text() if told.is_file() else ""


def tensors_of(fetched: Fetched) -> dict[str, torch.Tensor]:
    """Return a version's tensors as they lie on this node's shelf, without a copy."""
    from cluster.weights.layout import tensor_of

    return {name: tensor_of(array, dtype) for name, dtype, array in fetched.whole()}
