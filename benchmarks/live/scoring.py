"""Is an answer what its version gives? Each of its tokens, scored under that version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.live.publisher import version, weights
from benchmarks.live.rig import NAME
from benchmarks.load import Answer
from cluster.text.chat import ChatText

NEAR = 0.02
"""A greedy token may be so far below the most likely one, in logits: rounding of another batch."""
CONTROL = 24
"""Answers that are also scored under another version: the check must tell them apart."""


def unexplained(model: Path, answers: Sequence[tuple[str, Answer]]) -> tuple[int, float]:
    """Return how many answers their version does not give, and which share another would."""
    wrong, explained, compared = 0, 0, 0
    text = ChatText.load(model)
    by_version: dict[str, list[tuple[str, Answer]]] = {}
    for one in answers:
        by_version.setdefault(one[1].versions[0], []).append(one)
    numbers = {version(n): n for n in range(1, 4)} | {f"{NAME}@1": 0}
    ids = dict[bytes, int]()
    for ref, some in sorted(by_version.items()):
        module = opened(model, numbers[ref])
        for number in range(module.config.vocab_size):
            ids.setdefault(text.piece(number), number)
        wrong += sum(not fits(module, text, ids, *one) for one in some)
        others = [one for other, part in by_version.items() if other != ref for one in part[:8]]
        for one in others[:CONTROL]:
            explained += fits(module, text, ids, *one)
            compared += 1
    return wrong, explained / max(1, compared)


def opened(model: Path, number: int) -> Any:
    """Return a version as transformers has it, in float32."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, trust_remote_code=False
    )
    module.load_state_dict(weights(model, number), strict=False)
    return module.eval()


def fits(
    module: Any, text: ChatText, ids: Mapping[bytes, int], question: str, answer: Answer
) -> bool:
    """Say whether each token of an answer was the most likely one, but for rounding.

    Its text, encoded again, need not give the tokens that were sampled: their bytes do.
    """
    prompt = list(text.encode_chat([{"role": "user", "content": question}]))
    said = [ids[piece] for piece in answer.pieces]
    if answer.finish == "stop" and len(said) < answer.tokens:
        said.append(text.eos_ids[0])
    if len(said) != answer.tokens:
        return False
    with torch.inference_mode():
        logits = module(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
    lost = logits.amax(dim=-1) - logits.gather(1, torch.tensor(said)[:, None])[:, 0]
    return bool((lost <= NEAR).all())
