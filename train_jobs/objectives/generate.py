"""Generating with the very model that is being trained, in its own process.

For small models, for evaluation, and where the newest weights matter more than speed: each prompt
is continued by itself, with a cache, in transformers' own loop. What comes out depends on the
seed, the prompt and the weights alone, not on the batch or the ranks. ZeRO 3 is refused when the
configuration is read: its ranks would have to stop together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cluster.generation import Sample
from train_jobs.adapters import inner
from train_jobs.attention import NAME


def continued(
    module: Any,
    prompt_ids: Sequence[int],
    n: int,
    max_tokens: int,
    stop_ids: Sequence[int],
    seed: int,
    temperature: float = 1.0,
) -> list[Sample]:
    """Return ``n`` answers to a prompt; ``temperature`` 0 takes the likeliest token.

    ``module`` is the engine's, switched to evaluation, within :func:`own_attention`. The samples
    have no log-probabilities: the model that will be asked for them is this one.
    """
    device = module.get_input_embeddings().weight.device
    ids = torch.tensor([list(prompt_ids)], device=device)
    devices = [device] if device.type == "cuda" else []
    how: dict[str, Any] = {"do_sample": False}
    if temperature:
        how = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        found = module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            num_return_sequences=n,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=stop_ids[0] if stop_ids else 0,
            # else the model's own generation_config.json would have its say
            repetition_penalty=1.0,
            num_beams=1,
            **how,
        )
    return [_sample(row, frozenset(stop_ids)) for row in found[:, len(prompt_ids) :].tolist()]


def _sample(ids: list[int], ends: frozenset[int]) -> Sample:
    end = next((at for at, one in enumerate(ids) if one in ends), None)
    return Sample(tuple(ids[:end]), (), end is not None)


@contextmanager
def own_attention(engine: Any) -> Iterator[Any]:
    """Yield the engine's module, ready to generate: packed attention has no place for a cache."""
    module, training = engine.module, engine.module.training
    model = inner(module)
    module.eval()
    model.set_attn_implementation("sdpa")
    try:
        yield module
    finally:
        model.set_attn_implementation(NAME)
        module.train(training)


def seed_of(key: str) -> int:
    """Return a seed that depends on an example's place in the run alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
