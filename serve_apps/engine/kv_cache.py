"""Where keys and values lie: blocks of a few tokens, as many as config and memory allow.

Shapes: L layers, P blocks, N key/value heads, E width of a head, S = 16 positions of a block.
Who holds which block is rank 0's business (`paging.py`); this module only knows how large they are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import psutil
import torch

from cluster.errors import NotEnough
from serve_apps.engine.plan import BLOCK, blocks_for

FREE_MEMORY_SHARE = 0.8
"""Of what is free once the weights are in; the rest is for activations and the neighbours."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a model writes for each token."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * int(self.dtype.itemsize)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return BLOCK * self.token_bytes


def free_bytes(device: torch.device) -> int:
    """Return what the device (or the host) has free, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def fit_blocks(
    geometry: Geometry, length: int, concurrent: int, cache_tokens: int | None, free: int
) -> int:
    """Return how many blocks the cache gets.

    ``cache_tokens`` is a promise: NotEnough when it does not fit ``free`` bytes. Without it
    ``concurrent`` requests of ``length`` tokens are wanted; fewer blocks will do, and say so, for
    requests rarely grow to the end all at once. NotEnough is raised when not even one would fit.
    """
    least = blocks_for(length)
    wanted = concurrent * least if cache_tokens is None else blocks_for(cache_tokens)
    fits = int(free * FREE_MEMORY_SHARE) // geometry.block_bytes
    if fits >= wanted >= least:
        return wanted
    need = wanted * geometry.block_bytes
    text = (
        f"a KV cache of {wanted * BLOCK} tokens takes {need / 2**30:.2f} GiB and "
        f"{free / 2**30:.2f} GiB are free (a fifth stays for the rest)"
    )
    if min(fits, wanted) < least or cache_tokens is not None:
        raise NotEnough(
            f"{text}; one request of max_model_len={length} needs {least * BLOCK} tokens: lower "
            "max_model_len, max_concurrent or cache_tokens"
        )
    log.warning("%s: it gets %d tokens", text, fits * BLOCK)
    return fits


class KVCache:
    """Keys ``[P, N, E, S]`` and values ``[P, N, S, E]`` of each layer, contiguous.

    Keys lie transposed inside their block: a query's product with all of a block's keys then
    runs along memory. Zeros, not garbage: what is read under a mask must be no NaN. The pages are
    touched only when they are written.
    """

    def __init__(self, geometry: Geometry, blocks: int, device: torch.device) -> None:
        self.geometry, self.blocks, self.device = geometry, blocks, device
        heads, width, dtype = geometry.kv_heads, geometry.head_dim, geometry.dtype
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = [
            (
                torch.zeros((blocks, heads, width, BLOCK), dtype=dtype, device=device),
                torch.zeros((blocks, heads, BLOCK, width), dtype=dtype, device=device),
            )
            for _ in range(geometry.layers)
        ]

    @property
    def tokens(self) -> int:
        """Tokens that fit in all blocks together."""
        return self.blocks * BLOCK
