"""What objectives on decoders have in common: packed documents, a head asked block by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from train_jobs.attention import use_packed_attention
from train_jobs.data.example import Example
from train_jobs.objectives.head import Head
from train_jobs.objectives.packed import Packed, load_decoder, pack_documents, share_sequences
from train_jobs.ulysses import Team


class Decoder:
    """An objective whose batches are documents one after the other in one sequence."""

    _head: Head

    def load(self, base: Path, dtype: torch.dtype) -> Any:
        """See :class:`train_jobs.objectives.base.Objective`."""
        return load_decoder(base, dtype)

    def prepare(self, model: Any) -> None:
        """See :class:`train_jobs.objectives.base.Objective`."""
        use_packed_attention(model)
        self._head = Head(model)


class SlicedDecoder(Decoder):
    """One of which neighbouring ranks can hold slices."""

    team: Team | None = None
    """See :class:`train_jobs.objectives.base.Sliced`."""

    def prepare(self, model: Any) -> None:
        """See :class:`train_jobs.objectives.base.Objective`."""
        super().prepare(model)
        share_sequences(model, self.team)

    def pack(self, examples: Sequence[Example], device: Any) -> Packed:
        """Return this rank's slice of all documents of some examples."""
        documents = [document for example in examples for document in example.documents]
        return pack_documents(documents, device).slice_of(self.team)
