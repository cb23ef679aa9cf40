"""vLLM's CPU build as a side of ``benchmarks.serve``: run by the python of ``.bench/vllm``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def load(
    model: Path, dtype: str, max_model_len: int, max_concurrent: int
) -> tuple[float, Callable[[Sequence[Sequence[int]], Sequence[int]], dict[str, Any]]]:
    """Start vLLM; returns its start in seconds and what answers a batch.

    Compiled, as it is by default: ``enforce_eager`` would start sooner and run slower.
    """
    began = time.monotonic()
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(model),
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_concurrent,
        trust_remote_code=False,
        disable_log_stats=False,
    )
    started = time.monotonic() - began

    def answer(prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> dict[str, Any]:
        wanted = [
            SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in answers
        ]
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        began = time.monotonic()
        done = engine.generate(asked, wanted, use_tqdm=False)
        seconds = time.monotonic() - began
        tokens = sum(len(one.outputs[0].token_ids) for one in done)
        firsts = [
            one.metrics.first_token_latency * 1000
            for one in done
            if one.metrics is not None and one.metrics.first_token_latency
        ]
        return {"seconds": seconds, "tokens": tokens, "ttft_ms": firsts}

    return started, answer
