"""A decoder's output layer, asked for a function of its logits instead of the logits.

With a vocabulary of 150,000 entries the logits of a batch, their log-probabilities and their
gradients are most of a step's memory. So the layer computes them for some places at a time,
reduces them at once to what the loss needs, and forgets them: the loss and its gradient come from
the same pass over a block (as in arXiv:2410.10989).

The layer itself stays where it is, with its name, its hooks and its ties; only its ``forward`` is
told what is wanted. Shapes: K places, H the width of the model, V entries of the vocabulary, C
places of one block, F figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

BLOCK = 1 << 24
"""Logits that exist at once: 64 MiB in float32."""

Reduce = Callable[..., torch.Tensor]
"""``(logits_CV in float32, *extras of these places) -> values_CF``: the first column is what is
learnt from, the others only reported."""


@dataclass(frozen=True)
class _Ask:
    reduce: Reduce
    extras: tuple[torch.Tensor, ...]
    summed: bool


class Head:
    """See the module. One for each model; ``rows`` and ``total`` run the whole model once."""

    def __init__(self, model: Any) -> None:
        """``model`` is transformers' own, below adapters and engines."""
        layer = model.get_output_embeddings()
        self._ask: _Ask | None = None
        self._plain = not can_be_asked(model)
        if not self._plain:
            usual = layer.forward
            layer.forward = lambda hidden: self._answer(layer, usual, hidden)

    def rows(
        self, model: Any, inputs: Mapping[str, Any], reduce: Reduce, *extras: torch.Tensor
    ) -> torch.Tensor:
        """Return ``values_KF``.

        Gradients flow through all of it, at the price of the layer's work being done twice.
        """
        return self._run(model, inputs, _Ask(reduce, extras, summed=False))

    def total(
        self, model: Any, inputs: Mapping[str, Any], reduce: Reduce, *extras: torch.Tensor
    ) -> torch.Tensor:
        """Return ``values_F``, the sums over the places.

        The gradient of the first is computed on the way, so it may only be scaled afterwards; the
        others have none.
        """
        if not torch.is_grad_enabled():
            return self.rows(model, inputs, reduce, *extras).sum(0)
        return self._run(model, inputs, _Ask(reduce, extras, summed=True))

    def _run(self, model: Any, inputs: Mapping[str, Any], ask: _Ask) -> torch.Tensor:
        if self._plain:
            values_KF = _columns(ask.reduce(model(**inputs).logits[0].float(), *ask.extras))
            return values_KF.sum(0) if ask.summed else values_KF
        with self._asking(ask):
            answer: torch.Tensor = model(**inputs).logits[0]
        return answer[0] if ask.summed else answer

    @contextmanager
    def _asking(self, ask: _Ask) -> Iterator[None]:
        assert self._ask is None, "one question at a time"
        self._ask = ask
        try:
            yield
        finally:
            self._ask = None

    def _answer(self, layer: Any, usual: Callable[..., Any], hidden_1KH: Any) -> Any:
        if self._ask is None:
            return usual(hidden_1KH)
        ask, hidden_KH = self._ask, hidden_1KH[0]
        bias = layer.bias if layer.bias is not None else None
        kind = _Summed if ask.summed else _Rows
        values: torch.Tensor = kind.apply(ask.reduce, hidden_KH, layer.weight, bias, *ask.extras)
        return values[None, None] if ask.summed else values[None]


def can_be_asked(model: Any) -> bool:
    """Return whether a model's logits are what its output layer says, and that is a plain one.

    Some models scale or cap their logits behind the layer, each by a setting of its own name: so
    a few tokens are run. Under ZeRO 3 every rank calls this.
    """
    layer, said = model.get_output_embeddings(), []
    # BART adds its own bias behind the layer, as a rule zeros
    if type(layer) is not torch.nn.Linear or hasattr(model, "final_logits_bias"):
        return False
    hook = layer.register_forward_hook(lambda _, asked, answer: said.append(answer))
    ids_14 = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    given = {"decoder_input_ids": ids_14} if model.config.is_encoder_decoder else {}
    try:
        with torch.no_grad():
            logits = model(input_ids=ids_14, use_cache=False, **given).logits
    finally:
        hook.remove()
    return len(said) == 1 and logits.shape == said[0].shape and bool((logits == said[0]).all())


def _blocks(places: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, BLOCK // vocabulary)
    return (slice(start, start + size) for start in range(0, places, size))


def _logits(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, bias: Any) -> torch.Tensor:
    return F.linear(hidden_CH, weight_VH, bias).float()


class _Gradients:
    """Gradients of the layer's inputs, gathered block by block."""

    def __init__(self, hidden_KH: Any, weight_VH: Any, bias: Any, needed: tuple[bool, ...]) -> None:
        self._weight_VH = weight_VH
        self.hidden = torch.zeros_like(hidden_KH) if needed[0] else None
        # float32 also beside a bfloat16 weight: its small steps would be lost in the sum
        wide: dict[str, Any] = {"dtype": torch.float32}
        self.weight = torch.zeros_like(weight_VH, **wide) if needed[1] else None
        self.bias = torch.zeros_like(bias, **wide) if bias is not None and needed[2] else None

    def add(self, at: slice, hidden_CH: torch.Tensor, logits_CV: torch.Tensor) -> None:
        """Take the gradient of one block's logits."""
        narrow = logits_CV.to(hidden_CH.dtype)
        if self.hidden is not None:
            torch.mm(narrow, self._weight_VH, out=self.hidden[at])
        if self.weight is not None:
            if narrow.dtype == self.weight.dtype:
                self.weight.addmm_(narrow.t(), hidden_CH)
            else:
                self.weight += narrow.t() @ hidden_CH
        if self.bias is not None:
            self.bias += logits_CV.sum(0)


class _Summed(torch.autograd.Function):  # type: ignore[misc]
    """Sums over places; the gradient of the first figure is ready before backward asks."""

    @staticmethod
    def forward(
        ctx: Any, reduce: Reduce, hidden_KH: Any, weight_VH: Any, bias: Any, *extras: Any
    ) -> torch.Tensor:
        needed = ctx.needs_input_grad[1:4]
        grads = _Gradients(hidden_KH, weight_VH, bias, needed)
        total: torch.Tensor | None = None
        for at in _blocks(len(hidden_KH), len(weight_VH)):
            logits_CV = _logits(hidden_KH[at], weight_VH, bias)
            with torch.set_grad_enabled(any(needed)):
                logits_CV.requires_grad_(any(needed))
                values_CF = _columns(reduce(logits_CV, *(extra[at] for extra in extras)))
                learnt = values_CF[:, 0].sum()
            if any(needed):
                [slope] = torch.autograd.grad(learnt, logits_CV)
                grads.add(at, hidden_KH[at], slope)
            summed = values_CF.detach().sum(0)
            total = summed if total is None else total + summed
        if total is None:
            total = hidden_KH.new_zeros(1, dtype=torch.float32)
        ctx.grads, ctx.extras, ctx.width = grads, len(extras), weight_VH.dtype
        return total

    @staticmethod
    def backward(ctx: Any, slope_F: torch.Tensor) -> Any:
        grads, scale = ctx.grads, slope_F[0]
        hidden = None if grads.hidden is None else grads.hidden.mul_(scale)
        weight = None if grads.weight is None else grads.weight.mul_(scale).to(ctx.width)
        bias = None if grads.bias is None else grads.bias.mul_(scale).to(ctx.width)
        ctx.grads = None  # scaled in place: it can be asked once
        return None, hidden, weight, bias, *([None] * ctx.extras)


class _Rows(torch.autograd.Function):  # type: ignore[misc]
    """A value for each place; backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, reduce: Reduce, hidden_KH: Any, weight_VH: Any, bias: Any, *extras: Any
    ) -> torch.Tensor:
        ctx.reduce, ctx.bias = reduce, bias
        ctx.save_for_backward(hidden_KH, weight_VH, *extras)
        blocks = [
            _columns(
                reduce(_logits(hidden_KH[at], weight_VH, bias), *(extra[at] for extra in extras))
            )
            # without any places, too: how many figures there are, only an answer tells
            for at in list(_blocks(len(hidden_KH), len(weight_VH))) or [slice(0, 0)]
        ]
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx: Any, slopes_KF: torch.Tensor) -> Any:
        hidden_KH, weight_VH, *extras = ctx.saved_tensors
        grads = _Gradients(hidden_KH, weight_VH, ctx.bias, ctx.needs_input_grad[1:4])
        for at in _blocks(len(hidden_KH), len(weight_VH)):
            logits_CV = _logits(hidden_KH[at], weight_VH, ctx.bias)
            with torch.enable_grad():
                logits_CV.requires_grad_(True)
                values_CF = _columns(ctx.reduce(logits_CV, *(extra[at] for extra in extras)))
            [slope] = torch.autograd.grad(values_CF, logits_CV, slopes_KF[at])
            grads.add(at, hidden_KH[at], slope)
        weight = None if grads.weight is None else grads.weight.to(weight_VH.dtype)
        bias = None if grads.bias is None else grads.bias.to(weight_VH.dtype)
        return None, grads.hidden, weight, bias, *([None] * len(extras))


def _columns(values: torch.Tensor) -> torch.Tensor:
    return values[:, None] if values.dim() == 1 else values


def nll(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each target, in nats."""
    return F.cross_entropy(logits_CV, targets_C, reduction="none")


def nll_and_hits(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    """Return ``[C, 2]``: the negative log-likelihood, and whether the target was the likeliest."""
    target_C = logits_CV.gather(1, targets_C[:, None])[:, 0]
    hits_C = (target_C >= logits_CV.amax(1)).float()
    return torch.stack([nll(logits_CV, targets_C), hits_C], dim=1)
