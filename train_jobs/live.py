"""The weights of a running job on the cluster's shelf, where replicas and people find them.

Every rank hands over its share of the tensors, in the names and dtypes of the base's files. Under
ZeRO 3 they are gathered one by one, each for the rank whose turn it is: none ever holds the model.
Of a LoRA run the matrices alone travel; replicas add them to the base that they hold.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from cluster.errors import JobError, RoundhouseError
from cluster.library.ref import Update
from cluster.library.store import Version
from cluster.weights.files import small_files
from cluster.weights.layout import Bundle, Tensor
from train_jobs.export import gathered, live_tensors
from train_jobs.export_adapter import CONFIG, config_of, parts_of

Named = tuple[str, torch.Tensor]
BEGIN_S = 1.0
"""A run that is over waits so long for the first replica to take its last weights, ..."""
TAKE_S = 10.0
"""... and so long for all of them, before it saves and exports beside them."""

log = logging.getLogger(__name__)


class Writer(Protocol):
    """Where versions are put (`cluster.weights.client.Writer`, or a folder in a test)."""

    node: str
    """Where what this rank hands over will lie."""

    def ship(self, parcel: str, tensors: Iterator[Named]) -> dict[str, Tensor]:
        """Hand over tensors, one after the other; return their place in the layout."""

    def seal(self, shipped: Sequence[tuple[str, str]], bundle: Bundle) -> None:
        """Make a version of what (parcel, node) pairs name, at once."""

    def abandon(self, parcel: str) -> None:
        """Take back what was handed over."""

    def until_taken(self, ref: str, begin_s: float, most_s: float) -> bool:
        """Wait until nobody takes a version any more."""


class LiveWeights:
    """Puts what the engine has learnt on the shelf; each rank has one, and calls it together."""

    def __init__(
        self,
        base: Version,
        name: str,
        run_id: str,
        writer: Writer,
        update: Update | None = None,
    ) -> None:
        """Versions are called ``name@run.RUN.STEP``.

        ``update`` says what becomes of requests that run when one goes live.
        """
        self._base, self._writer, self._update = base, writer, update
        self.prefix = f"{name}@run.{run_word(run_id)}."
        """What the references of this run begin with."""
        self._files = small_files(base.path) if dist.get_rank() == 0 else {}
        self._stored = stored_names(base)

    def put(self, engine: Any, step: int) -> str:
        """Put the weights of this moment on the shelf; return the version's reference.

        Raises:
            JobError: on every rank, with the reason of one; the shelf is as it was before.
        """
        began = time.monotonic()
        ref, parcel = f"{self.prefix}{step}", _told(uuid.uuid4().hex)
        weights = self._of(engine.module)
        tensors = self._mine(weights)
        try:
            shipped: Any = self._writer.ship(parcel, tensors)
        except RoundhouseError as error:
            shipped = str(error)
            for _ in tensors:  # the others gather on, and wait for this rank in each of them
                pass
        all_shipped: list[Any] = [None] * dist.get_world_size()
        handed = time.monotonic()
        dist.all_gather_object(all_shipped, (self._writer.node, shipped))
        wrong = [told for _, told in all_shipped if isinstance(told, str)]
        if not wrong and dist.get_rank() == 0:
            layout = {name: one for _, told in all_shipped for name, one in told.items()}
            nodes = sorted({node for node, _ in all_shipped})
            wrong = self._seal(parcel, nodes, self._bundle(ref, weights, layout))
        wrong = _told(wrong)
        if wrong:
            self._writer.abandon(parcel)
            raise JobError(f"{ref} could not be put on the shelf: {wrong[0]}")
        log.info(
            "%s: handed over in %.2f s, on the shelf after %.2f s",
            ref, handed - began, time.monotonic() - began,
        )  # fmt: skip
        return ref

    def give_way(self, ref: str) -> None:
        """Let replicas take a run's last weights before it computes and writes on; bounded."""
        if dist.get_rank() == 0:
            try:
                self._writer.until_taken(ref, BEGIN_S, TAKE_S)
            except RoundhouseError as error:
                log.warning("not waited for replicas: %s", error)
        _told(None)

    def _of(self, module: Any) -> Matrices | Weights:
        if is_lora(module):
            return Matrices(module, self._base.ref)
        return Weights(module, self._base.ref, self._files, self._stored)

    def _bundle(
        self, ref: str, weights: Matrices | Weights, layout: Mapping[str, Tensor]
    ) -> Bundle:
        return Bundle(ref, weights.files, layout, self._base.ref, time.time(), self._update)

    def _seal(self, parcel: str, nodes: Sequence[str], bundle: Bundle) -> list[str]:
        try:
            self._writer.seal([(parcel, node) for node in nodes], bundle)
        except RoundhouseError as error:
            return [str(error)]
        return []

    def _mine(self, weights: Matrices | Weights) -> Iterator[Named]:
        """Yield this rank's tensors; where ZeRO divides them all ranks gather them together."""
        rank, size = dist.get_rank(), dist.get_world_size()
        for at, (name, dtype) in enumerate(weights.dtypes.items()):
            mine = at % size == rank
            if mine or weights.divided:
                whole = gathered(weights.get(name), dtype, mine)
                if whole is not None:
                    yield name, whole


class Weights:
    """The live weights by the base's names, an adapter's addition made when it is asked for."""

    def __init__(
        self,
        module: Any,
        base: str,
        files: Mapping[str, bytes],
        stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    ) -> None:
        """Raise JobError where the model lacks what the base's files hold (``stored``)."""
        self._sums = adapted_layers(module)
        plain = module if not self._sums else module.get_base_model()
        self._plain = {
            name.replace(".base_layer", ""): tensor for name, tensor in live_tensors(plain).items()
        }
        self.files, self.dtypes = files, {name: dtype for name, (dtype, _) in stored.items()}
        self.divided = any(hasattr(tensor, "ds_id") for tensor in self._plain.values())
        for name, (_, shape) in stored.items():
            if self._shape(name) != shape:
                raise JobError(
                    f"{base} holds {name} {shape}, which the trained model does not have in this "
                    "shape; this architecture cannot go live while it trains"
                )

    def get(self, name: str) -> Any:
        """Return a tensor."""
        layer = self._sums.get(name)
        return self._plain[name] if layer is None else sum_of(layer)

    def all(self) -> dict[str, Any]:
        """Return every tensor."""
        return {name: self.get(name) for name in self.dtypes}

    def _shape(self, name: str) -> tuple[int, ...] | None:
        live = self._plain.get(name)
        # the shape of a parameter that ZeRO 3 divides lies beside it
        return None if live is None else tuple(getattr(live, "ds_shape", live.shape))


class Matrices:
    """What LoRA has learnt, as peft's files have it: replicas add it to the base."""

    def __init__(self, module: Any, base: str) -> None:
        self._parts = parts_of(module)
        self.files: Mapping[str, bytes] = {CONFIG: config_of(module, base).encode()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._parts.items()}
        self.divided = any(hasattr(tensor, "ds_id") for tensor in self._parts.values())

    def get(self, name: str) -> Any:
        """Return a matrix."""
        return self._parts[name]


def is_lora(module: Any) -> bool:
    """Say whether replicas can add what an adapter has learnt: DoRA scales the base as well."""
    from peft import PeftModel

    return isinstance(module, PeftModel) and not any(
        told.use_dora for told in module.peft_config.values()
    )


def adapted_layers(module: Any) -> dict[str, Any]:
    """Return the layers that an adapter adds to, by the name of their weight; often none."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, PeftModel):
        return {}
    return {
        f"{name}.weight": layer
        for name, layer in module.get_base_model().named_modules()
        if isinstance(layer, BaseTunerLayer)
    }


def sum_of(layer: Any) -> Any:
    """Return what a layer multiplies by: its weight and its addition, as its forward pass has it.

    DoRA's is not a sum: peft has a merge of its own for it, which scales each row.
    """
    [adapter] = layer.active_adapters
    base, variant = layer.get_base_layer().weight, layer.lora_variant.get(adapter)
    with torch.no_grad():
        if variant is not None:
            return variant.merge_safe(layer, adapter, base.detach().clone())
        return base.detach() + layer.get_delta_weight(adapter)


def stored_names(base: Version) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of each tensor in the base's files, from their headers."""
    from safetensors import safe_open

    found = {}
    for path in sorted(base.path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a mapping)
                part = stored.get_slice(name)
                found[name] = (DTYPES[part.get_dtype()], tuple(part.get_shape()))
    return found


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def run_word(run_id: str) -> str:
    """Return a run's id as a reference may have it: its end, which tells runs apart."""
    return re.sub(r"[^a-z0-9-]", "-", run_id.lower())[-48:]


def _told(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    told = [value]
    dist.broadcast_object_list(told)
    return told[0]
