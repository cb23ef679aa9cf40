"""What of a model learns, and what is given up for memory. Pure."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from cluster.config import Frozen


class LoRA(Frozen):
    """Train low-rank additions to the linear layers, and leave the base as it is.

    ``W x`` becomes ``W x + alpha / r * B A x`` with A of r rows (arXiv:2106.09685). The run
    publishes the sum, an ordinary version, or with ``publish.merge: false`` the additions alone.
    """

    kind: Literal["lora"]
    r: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of the additions' input, while training."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of layers, as ``[q_proj, v_proj]``; patterns of whole names, as
    ``[model.layers.2?.*]``; or every linear layer but the output's."""
    dora: bool = False
    """Learn the length of each row of the sum apart from its direction (arXiv:2402.09353)."""
    rslora: bool = False
    """Scale by ``alpha / sqrt(r)``, which keeps a high rank learning (arXiv:2312.03732)."""
    base: Literal["whole", "nf4"] = "whole"
    """``nf4`` would keep the base in four bits (QLoRA, arXiv:2305.14314)."""

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not targets:
            raise ValueError("name at least one layer, or write all-linear")
        return targets

    @field_validator("base")
    @classmethod
    def _has_a_kernel(cls, base: str) -> str:
        if base == "nf4":
            raise ValueError(
                "nf4 needs a kernel that multiplies by four-bit weights: there is none for CPUs, "
                "and none for GPUs among our dependencies yet; use whole, and zero: 2 to divide "
                "what the adapter adds"
            )
        return base


class Freeze(Frozen):
    """Train some of the parameters and leave the others as they are."""

    kind: Literal["freeze"]
    trainable: Annotated[tuple[str, ...], Field(min_length=1)]
    """Patterns of parameter names, as ``[model.layers.2?.*, lm_head.*]``. A new head always
    learns."""


Adapter = Annotated[LoRA | Freeze, Field(discriminator="kind")]


class Offload(Frozen):
    """What waits in the machine's memory instead of the GPU's (arXiv:2101.06840)."""

    optimizer: bool = False
    """Moments and master weights, and the step on them. Needs ZeRO 1 to 3."""
    parameters: bool = False
    """The parameters that no layer needs right now. Needs ZeRO 3."""


def check_offload(offload: Offload, zero: int, num_gpus: float) -> None:
    """Refuse what DeepSpeed would refuse, or ignore; ValueError says what to change."""
    asked = [name for name in ("optimizer", "parameters") if getattr(offload, name)]
    if asked and not num_gpus:
        raise ValueError(
            f"offload.{asked[0]} moves memory from a GPU to its machine, and run.num_gpus is 0: a "
            "CPU run has it there already; leave offload out"
        )
    if offload.optimizer and zero == 0:
        raise ValueError("offload.optimizer needs the state divided: use zero: 1, 2 or 3")
    if offload.parameters and zero != 3:
        raise ValueError(f"offload.parameters needs zero: 3, which divides them, not {zero}")
