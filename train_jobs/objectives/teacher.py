"""Whom a student learns from: a model in this process, or one that the cluster serves.

Shapes: K places, C of them in one block, V entries of the vocabulary, H width of the teacher.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from train_jobs.attention import use_packed_attention
from train_jobs.objectives.head import can_be_asked
from train_jobs.objectives.packed import Packed, load_decoder


class Teacher:
    """A frozen model beside the engine. Its logits, too, exist for one block at a time."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: Any) -> None:
        """Load it, the same on every rank."""
        model = load_decoder(directory, dtype).to(device).eval().requires_grad_(False)
        use_packed_attention(model)
        self._model = model
        self._layer: Any = None
        if can_be_asked(model):
            # the model gives what its output layer is given; the layer is asked block by block
            self._layer = model.get_output_embeddings()
            self._layer.forward = lambda hidden: hidden

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self._model.get_input_embeddings().num_embeddings)

    def hidden(self, batch: Packed) -> torch.Tensor:
        """Return ``[K, H]``: what :meth:`logits` needs of each place that predicts a target."""
        with torch.no_grad():
            hidden: torch.Tensor = self._model(**batch.inputs).logits[0]
        return hidden

    def logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        """Return ``[C, V]`` in float32."""
        if self._layer is None:
            return hidden_CH.float()
        with torch.no_grad():
            return F.linear(hidden_CH, self._layer.weight, self._layer.bias).float()
