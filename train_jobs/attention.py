"""Attention over packed rows: each document attends to itself alone, at linear cost.

Packed documents lie one after the other in a batch of one sequence, without padding. Instead of
masking the block-diagonal out of a ``T x T`` matrix we run one causal SDPA per document, so the
work grows with the sum of squares of the documents and no mask exists at all.

Shapes: B = 1, N heads, M key/value heads, T tokens of all documents, E width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from cluster.errors import ConfigError
from train_jobs.ulysses import Team, attend_together

NAME = "roundhouse_packed"


@dataclass(frozen=True)
class Layout:
    """How a sequence of T tokens divides: a common prefix, then the rest of each document."""

    prefix: int
    lengths: tuple[int, ...]
    team: Team | None = None
    """Whose ranks hold equal slices of it, in their order."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.prefix + sum(self.lengths)


def packed_attention(
    module: torch.nn.Module,
    q_BNTE: torch.Tensor,
    k_BMTE: torch.Tensor,
    v_BMTE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as ``layout`` says, each document to itself and the prefix; returns ``[B, T, N, E]``.

    Where a team holds the sequence, T here is this rank's slice of it.

    Raises:
        ConfigError: the model wants what this attention does not do.
    """
    layout = layout or Layout(0, (q_BNTE.shape[2],))
    assert q_BNTE.shape[0] == 1, "packed documents are one sequence"
    ranks = layout.team.size if layout.team else 1
    assert layout.tokens == q_BNTE.shape[2] * ranks, "the layout covers every token once"
    longest = layout.prefix + max(layout.lengths)
    if softcap is not None or (sliding_window is not None and longest > sliding_window):
        raise ConfigError(
            f"this model's attention uses softcap={softcap}, sliding_window={sliding_window}; "
            "training supports full causal attention; for a sliding window set data.max_len to it"
        )
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": True}

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _each_document(layout, q, k, v, options)

    if layout.team is None:
        return attend(q_BNTE, k_BMTE, v_BMTE), None
    return attend_together(layout.team, q_BNTE, k_BMTE, v_BMTE, attend), None


def _each_document(
    layout: Layout,
    q_BNTE: torch.Tensor,
    k_BMTE: torch.Tensor,
    v_BMTE: torch.Tensor,
    options: Mapping[str, Any],
) -> torch.Tensor:
    q, k, v = (x.split([layout.prefix, *layout.lengths], dim=2) for x in (q_BNTE, k_BMTE, v_BMTE))
    pieces = []
    for at, length in enumerate(layout.lengths, start=1):
        if not layout.prefix:
            sdpa = F.scaled_dot_product_attention(q[at], k[at], v[at], is_causal=True, **options)
        else:
            sdpa = F.scaled_dot_product_attention(
                q[at],
                torch.cat([k[0], k[at]], dim=2),
                torch.cat([v[0], v[at]], dim=2),
                attn_mask=_after_prefix(layout.prefix, length, q[at].device),
                **options,
            )
        pieces.append(sdpa)
    if layout.prefix:
        pieces.insert(
            0, F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True, **options)
        )
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous()


@lru_cache(maxsize=512)
def _after_prefix(prefix: int, length: int, device: torch.device) -> torch.Tensor:
    """Return which of ``prefix + length`` keys each of ``length`` queries sees.

    Needed because SDPA's ``is_causal`` aligns a mask that is not square at its upper left.
    """
    allowed = torch.ones(length, prefix + length, dtype=torch.bool, device=device)
    return allowed.tril(diagonal=prefix)


def use_packed_attention(model: Any) -> None:
    """Switch a transformers causal LM to packed attention and prove that it calls it.

    Some architectures accept a registered attention and never call it; then packed documents
    would see each other. So two documents with a common beginning are run packed, and the second
    alone, and must agree: no other attention can do that.

    Raises:
        ConfigError: the model does not take part.
    """
    from transformers import AttentionInterface

    embedding = model.get_input_embeddings()
    common, first, second = (
        torch.arange(start, start + 4, device=embedding.weight.device) % embedding.num_embeddings
        for start in (3, 11, 19)
    )
    places = torch.arange(8, device=common.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        alone = model(input_ids=torch.cat([common, second])[None], use_cache=False).logits[:, 4:]
        AttentionInterface.register(NAME, packed_attention)
        model.set_attn_implementation(NAME)
        packed = model(
            input_ids=torch.cat([common, first, second])[None],
            position_ids=torch.cat([places, places[4:]])[None],
            layout=Layout(4, (4, 4)),
            logits_to_keep=places + 4,
            use_cache=False,
        ).logits[:, 4:]
    model.train(training)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    if packed.shape != alone.shape or not torch.allclose(
        packed, alone, rtol=tolerance, atol=tolerance * float(alone.abs().max())
    ):
        raise ConfigError(
            f"{type(model).__name__} lets packed documents see each other: its attention cannot "
            "be replaced; choose a model whose attention goes through transformers' "
            "AttentionInterface (Llama, Qwen, Mistral, SmolLM ...)"
        )
