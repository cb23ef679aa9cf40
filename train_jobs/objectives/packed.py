"""Documents one after the other in one sequence, without padding: the batch of all decoders.

Shapes: T tokens of all documents, K places that predict a target, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cluster.errors import ConfigError
from train_jobs.attention import Layout
from train_jobs.data.example import Document
from train_jobs.objectives.families import check_heads
from train_jobs.ulysses import Team

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
    def sharing(self) -> int:
        """How many ranks hold a slice of this."""
        return self.layout.team.size if self.layout.team else 1

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
        """Return the sum of ``values_K`` over each document, ``[documents]``.

        Where a team holds the sequence, every rank of it calls this, and gets the sums of all.
        """
        sums = values_K.new_zeros(self.documents).index_add(0, self.owners_K, values_K)
        return self.layout.team.sum(sums) if self.layout.team else sums

    def slice_of(self, team: Team | None) -> Packed:
        """Return the slice of a rank: equal parts, each with the targets of its own places.

        What is missing to equal parts is one more document, of which nothing is trained.
        """
        if team is None:
            return self
        size = -(-self.layout.tokens // team.size)
        missing = size * team.size - self.layout.tokens
        lengths = (*self.layout.lengths, *([missing] if missing else []))
        first = team.rank * size
        here_K = self.predicts_K // size == team.rank
        return replace(
            self,
            ids_1T=F.pad(self.ids_1T, (0, missing))[:, first : first + size],
            positions_1T=F.pad(self.positions_1T, (0, missing))[:, first : first + size],
            layout=Layout(self.layout.prefix, lengths, team),
            predicts_K=self.predicts_K[here_K] - first,
            targets_K=self.targets_K[here_K],
            owners_K=self.owners_K[here_K],
        )


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


def probe(ranks: int, vocabulary: int) -> tuple[Document, Document]:
    """Return two documents of which every slice predicts something, the last with a place over."""
    ids = tuple(at % vocabulary for at in range(3, 4 * ranks + 2))
    trained = (True,) * len(ids)
    return Document("", ids[:3], trained[:3]), Document("", ids[3:], trained[3:])


def share_sequences(model: Any, team: Team | None) -> None:
    """Prove that a model with packed attention computes the same from slices; a collective.

    Layers that look at the tokens before, as convolutions and recurrent ones do, find none before
    a slice. So two documents are run whole on each rank, and again in slices.

    Raises:
        ConfigError: it does not, or it has fewer heads than ranks share a sequence.
    """
    if team is None:
        return
    heads = model.config.get_text_config().num_attention_heads
    check_heads({"num_attention_heads": heads}, team.size)
    embedding = model.get_input_embeddings()
    whole = pack_documents(probe(team.size, embedding.num_embeddings), embedding.weight.device)
    part = whole.slice_of(team)
    here_K = whole.predicts_K // part.ids_1T.shape[1] == team.rank
    training = model.training
    model.eval()
    with torch.no_grad():
        alone, together = (model(**packed.inputs).logits[0] for packed in (whole, part))
    model.train(training)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    near = (alone[here_K] - together).abs().amax() <= tolerance * alone.abs().amax()
    # all of a team raise, or none: the first slice is right in any model
    if float(team.sum(near.float())) < team.size:
        raise ConfigError(
            f"sequence_parallel: {type(model).__name__} computes something else from slices of a "
            "sequence: a layer beside its attention looks at other tokens; use sequence_parallel: "
            "1, or another model (Llama, Qwen, Mistral, SmolLM ...)"
        )


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
