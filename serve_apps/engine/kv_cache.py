"""Where keys and values lie: one contiguous slot a request, bounded when it is made.

Shapes: L layers, C slots, N key/value heads, S positions of a slot, E width of a head.
The scheduler decides who holds which slot; this module only knows how large they are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import psutil
import torch

from cluster.errors import NotEnough

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


def free_bytes(device: torch.device) -> int:
    """Return what the device (or the host) has free, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def fit_slots(
    geometry: Geometry, slot_len: int, wanted: int, cache_tokens: int | None, free: int
) -> int:
    """Return how many slots of ``slot_len`` tokens the cache gets, at most ``wanted``.

    ``cache_tokens`` is a promise: NotEnough when it does not fit ``free`` bytes. Without it the
    cache shrinks to what fits, says so, and NotEnough is raised when not even one slot does.
    """
    if cache_tokens is not None:
        wanted = min(wanted, cache_tokens // slot_len)
    fits = int(free * FREE_MEMORY_SHARE) // (slot_len * geometry.token_bytes)
    if fits >= wanted:
        return wanted
    need = wanted * slot_len * geometry.token_bytes
    text = (
        f"{wanted} slots of {slot_len} tokens take {need / 2**30:.2f} GiB of KV cache and "
        f"{free / 2**30:.2f} GiB are free (a fifth stays for the rest)"
    )
    if fits == 0 or cache_tokens is not None:
        raise NotEnough(f"{text}; lower max_model_len, max_concurrent or cache_tokens")
    log.warning("%s: running %d requests at once instead of %d", text, fits, wanted)
    return fits


class KVCache:
    """Keys and values of all layers, ``[C, N, S, E]`` each.

    Zeros, not garbage: attention over neighbouring slots reads past a request's end under a mask,
    and a NaN there would survive the mask. The pages are touched only when they are written.
    """

    def __init__(self, geometry: Geometry, slots: int, slot_len: int, device: torch.device) -> None:
        self.geometry, self.slots, self.slot_len, self.device = geometry, slots, slot_len, device
        shape = (slots, geometry.kv_heads, slot_len, geometry.head_dim)
        self.layers_CNSE = [
            tuple(torch.zeros(shape, dtype=geometry.dtype, device=device) for _ in "kv")
            for _ in range(geometry.layers)
        ]
        # Row of (slot, head, position) when a layer is seen as [C*N*S, E]: slot and head part.
        self._head_row_N = torch.arange(geometry.kv_heads, dtype=torch.int64) * slot_len

    @property
    def tokens(self) -> int:
        """Tokens that fit in all slots together."""
        return self.slots * self.slot_len

    def rows(self, slots_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Return where T tokens go, head-major ``[N*T]``, in a layer seen as ``[C*N*S, E]``."""
        first_T = slots_T * (self.geometry.kv_heads * self.slot_len) + positions_T
        return (self._head_row_N[:, None] + first_T).reshape(-1).to(self.device)
