"""What a process needs before it is a rank: its environment and its process group."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cluster.device import resolve_dtype
from train_jobs.config import Optim, Run

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3), which are no part of any Python module."""


@dataclass(frozen=True)
class Place:
    """Where one rank stands."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    """``host:port`` where rank 0 listens for the others."""


@dataclass(frozen=True)
class Device:
    """Where this rank computes, and in which number format."""

    name: str
    """``cpu`` or ``cuda:0``."""
    dtype: str


def free_address(host: str = "127.0.0.1") -> str:
    """Return ``host:port`` with a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def prepare(place: Place, run: Run) -> None:
    """Set what torch and DeepSpeed read when they are imported. Call before either is."""
    host, port = place.address.rsplit(":", 1)
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.size),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_size),
        # DeepSpeed's CPU accelerator counts its devices from LOCAL_SIZE, else from NUMA nodes
        LOCAL_SIZE=str(place.local_size),
        MASTER_ADDR=host,
        MASTER_PORT=port,
        TOKENIZERS_PARALLELISM="false",
    )
    if not run.num_gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["OMP_NUM_THREADS"] = str(threads(place, run))
        if host.startswith("127.") and sys.platform == "linux":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo asks the name service who we are
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: fewer faults
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed instead of giving it back to the kernel.

    Each step allocates and frees the same gigabytes. Given back, every page comes zeroed anew,
    which is a good part of a step's CPU time. Elsewhere than on glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def threads(place: Place, run: Run) -> int:
    """Return the CPU threads of one rank: its share of this machine, unless the run says."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return run.threads or max(1, cores // place.local_size)


def join(place: Place, run: Run) -> Device:
    """Enter the process group of the run; gloo on CPUs, nccl on GPUs.

    Every collective is bounded by ``run.timeout_s``: a rank that died or hangs is an error.
    """
    import deepspeed
    import torch
    import torch.distributed as dist

    on_gpu = bool(run.num_gpus)
    if on_gpu:
        # Ray shows each worker its own GPUs; plain processes see all of them
        index = place.local_rank if torch.cuda.device_count() > 1 else 0
        torch.cuda.set_device(index)  # before the first nccl collective
        device = f"cuda:{index}"
    else:
        # DeepSpeed would compile a C++ shared-memory collective here; gloo does without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(threads(place, run))
        device = "cpu"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://{place.address}",
        rank=place.rank,
        world_size=place.size,
        timeout=timedelta(seconds=run.timeout_s),
    )
    deepspeed.init_distributed()  # wraps the group that exists
    return Device(device, resolve_dtype(run.dtype, device))


def leave() -> None:
    """End the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def quiet() -> None:
    """Silence the libraries' own progress: a rank's words go through the run's metrics."""
    import logging
    import warnings

    from deepspeed.utils import logger
    from transformers.utils import logging as hf

    logger.setLevel(logging.WARNING)
    hf.disable_progress_bar()
    # torch 2.13 renames a collective that DeepSpeed 0.19 still calls by its old name
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor.*", FutureWarning)


def seed_everything(seed: int) -> None:
    """Seed Python and torch, every rank alike: ranks differ by their rows only."""
    import random

    import torch

    random.seed(seed)
    torch.manual_seed(seed)


def open_engine(model: Any, rendered: dict[str, Any], optim: Optim) -> Any:
    """Hand a model to DeepSpeed with our own AdamW over what asks for gradients.

    A client optimiser: DeepSpeed's own "AdamW" compiles C++ or CUDA at run time.
    """
    import deepspeed
    import torch

    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=optim.lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        fused=True,  # one pass over the state, without temporaries of its size
    )
    gather_in_pieces(rendered["zero_optimization"])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=rendered)
    return engine


def gather_in_pieces(zero: Mapping[str, Any]) -> None:
    """Have stages 1 and 2 gather their parameters ``allgather_bucket_size`` elements at a time.

    DeepSpeed does where the backend cannot gather into one tensor. Gloo can, but by way of a second
    copy of the whole model, where pieces stay in a CPU's cache.
    """
    from deepspeed.comm import comm

    pieces = zero["stage"] in (1, 2) and "allgather_bucket_size" in zero
    comm.cdb.all_gather_function = None if pieces else comm.cdb.get_all_gather_function()
