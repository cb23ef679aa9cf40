"""Documents one after the other in one sequence, without padding: the batch of all decoders.

Shapes: T tokens of all documents, K places that predict a target, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train_jobs.attention import Layout
from train_jobs.data.example import Document

MIN_PREFIX = 8
"""A shorter common beginning is not worth the attention masks."""


@dataclass(frozen=True)
class Packed:
    """T tokens, K of which predict a target.

    What all documents begin with, as a rule the system message, stands there once, in front, and
    each document attends to it. Causal attention makes that exact: no token before the first
    difference can know in which document it is.
    """

    ids_1T: torch.Tensor
    positions_1T: torch.Tensor
    """As if each document stood alone."""
    layout: Layout
    predicts_K: torch.Tensor
    """Where in T the predictions are made: the place before each trained token."""
    targets_K: torch.Tensor
    owners_K: torch.Tensor
    """Which document each target belongs to."""
    documents: int

    @property
    def weight(self) -> float:
        """K."""
        return float(len(self.targets_K))

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        return {
            "input_ids": self.ids_1T,
            "position_ids": self.positions_1T,
            "layout": self.layout,
            "logits_to_keep": self.predicts_K,
            "use_cache": False,
        }

    def by_document(self, values_K: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``values_K`` over each document, ``[documents]``."""
        return values_K.new_zeros(self.documents).index_add_(0, self.owners_K, values_K)


def pack_documents(
    documents: Sequence[Document], device: Any = "cpu", share: bool = True
) -> Packed:
    """Build the sequence of at least one document; ``share`` says a common beginning once."""
    prefix = common_prefix([document.ids for document in documents]) if share else 0
    ids = list(documents[0].ids[:prefix])
    positions = list(range(prefix))
    predicts, targets, owners = [], [], []
    for owner, document in enumerate(documents):
        shift = len(ids) - prefix  # from a place in the document to a place in T
        for place in range(1, len(document.ids)):
            if document.trained[place]:
                before = place - 1
                predicts.append(before if before < prefix else before + shift)
                targets.append(document.ids[place])
                owners.append(owner)
        ids += document.ids[prefix:]
        positions += range(prefix, len(document.ids))

    def numbers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Packed(
        ids_1T=numbers(ids)[None],
        positions_1T=numbers(positions)[None],
        layout=Layout(prefix, tuple(len(document.ids) - prefix for document in documents)),
        predicts_K=numbers(predicts),
        targets_K=numbers(targets),
        owners_K=numbers(owners),
        documents=len(documents),
    )


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all sequences begin with, short of any whole one; 0 if too few."""
    if len(sequences) < 2:
        return 0
    longest = min(map(len, sequences)) - 1
    same = (len({s[at] for s in sequences}) == 1 for at in range(longest))
    length = next((at for at, equal in enumerate(same) if not equal), longest)
    return length if length >= MIN_PREFIX else 0


def load_decoder(base: Path, dtype: torch.dtype) -> Any:
    """Return the causal language model of a directory."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        base,
        # always said: the default is the file's own format, and DeepSpeed does not check
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
    )
