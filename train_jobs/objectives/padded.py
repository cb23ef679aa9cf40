"""Sequences under each other, padded at their ends to the longest: the batch of all encoders.

Shapes: B sequences, S tokens of the longest, K places that are asked about, H the model's width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster.errors import ConfigError
from train_jobs.data.example import Document
from train_jobs.objectives.families import family_of


@dataclass(frozen=True)
class Padded:
    """B sequences of up to S tokens; what the mask hides is never attended to."""

    ids_BS: torch.Tensor
    mask_BS: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)
    """What else this kind of model is called with."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        return {"input_ids": self.ids_BS, "attention_mask": self.mask_BS, **self.options}


@dataclass(frozen=True)
class Padding:
    """How a model wants its sequences."""

    pad_id: int
    typed: bool
    """Whether it tells the two texts of a pair apart by token types."""
    caches: bool
    """Whether it is a decoder, which would keep keys and values for a next token."""

    @classmethod
    def of(cls, base: Path) -> Padding:
        """Read a model directory.

        A decoder without a padding token pads with its end of text: behind the last token causal
        attention sees nothing of it.
        """
        config = json.loads((base / "config.json").read_text())
        pad_id = config.get("pad_token_id")
        if pad_id is None:
            ends = config.get("eos_token_id")
            pad_id = ends[0] if isinstance(ends, list) else ends
        caches = family_of(config) == "decoder"
        return cls(pad_id or 0, config.get("type_vocab_size", 0) > 1, caches)

    def collate(self, sequences: Sequence[Sequence[Document]], device: Any) -> Padded:
        """Put sequences under each other.

        The documents of each follow one another in it, and have the token types 0, 1 ...
        """
        rows = [[number for part in parts for number in part.ids] for parts in sequences]
        types = [[kind for kind, part in enumerate(parts) for _ in part.ids] for parts in sequences]
        options: dict[str, Any] = {}
        if self.typed:
            options["token_type_ids"] = padded(types, 0, device)
        if self.caches:
            options["use_cache"] = False
        return Padded(
            padded(rows, self.pad_id, device),
            padded([[1] * len(row) for row in rows], 0, device),
            options,
        )


def padded(rows: Sequence[Sequence[int]], value: int, device: Any) -> torch.Tensor:
    """Return rows of numbers as a tensor ``[B, S]``, filled up with ``value`` on the right."""
    longest = max(map(len, rows))
    return torch.tensor(
        [[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long, device=device
    )


class Chosen:
    """Has a model's head see some places of its hidden states only.

    The head of a language model costs as much for each place as many layers, and most places of a
    masked or padded batch are not asked about. The hidden states of the ``body`` are picked where
    they come out of it; ``logits`` are then ``[1, K, vocabulary]``.
    """

    def __init__(self, body: Any) -> None:
        """``body`` is the module whose output the head reads."""
        self._places_K: torch.Tensor | None = None
        body.register_forward_hook(self._choose)

    @contextmanager
    def only(self, places_K: torch.Tensor) -> Iterator[None]:
        """Meanwhile choose these places of ``B * S``, row after row."""
        assert self._places_K is None, "one question at a time"
        self._places_K = places_K
        try:
            yield
        finally:
            self._places_K = None

    def _choose(self, _body: Any, _args: Any, output: Any) -> Any:
        if self._places_K is None:
            return None
        chosen_1KH = output[0].flatten(0, 1)[self._places_K][None]
        if isinstance(output, tuple):
            return (chosen_1KH, *output[1:])
        output.last_hidden_state = chosen_1KH
        return output


def load_with_head(auto: Any, base: Path, dtype: torch.dtype, **config: Any) -> Any:
    """Return the model of a directory behind one of transformers' heads.

    A head that the directory lacks, or has in another size, is drawn from torch's generator: seed
    every rank alike before. Its parameters' names are the model's ``added_parameters``. Raises
    ConfigError where transformers knows no such head for this model.
    """
    try:
        model, told = auto.from_pretrained(
            base,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **config,
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        kind = json.loads((base / "config.json").read_text()).get("model_type")
        raise ConfigError(
            f"transformers has no {auto.__name__.removeprefix('AutoModelFor')} head for a model "
            f"of type {kind!r:.60}; choose another base"
        ) from None
    drawn = {*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}
    # a tied parameter counts under its first name, which the base may well have
    model.added_parameters = tuple(name for name, _ in model.named_parameters() if name in drawn)
    return model


def by_owner(values_K: torch.Tensor, owners_K: torch.Tensor, owners: int) -> list[float]:
    """Return the sums of ``values_K`` over each of ``owners``."""
    summed = values_K.new_zeros(owners).index_add_(0, owners_K, values_K)
    return [float(value) for value in summed.tolist()]
