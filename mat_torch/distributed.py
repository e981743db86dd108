"""Which of the run's processes this is, and what they agree on (torch's own launcher, torchrun)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mat_torch.training_options import TrainingError

__all__ = ["World", "join_world"]

_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"  # its name before PyTorch 2.13
)


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: Number of this one, from 0; that one logs and saves.
        size: How many there are.
        device: Where this one computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, the same bits in each."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.size == 1:
            return flag
        return bool(self.mean(torch.tensor([float(flag)], device=self.device)).item() > 0.0)

    def synced(self, network: nn.Module) -> nn.Module:
        """The network as one whose backward pass averages gradients over the processes.

        They are those accumulated so far, so micro-batches before the last go through the network
        itself. Buffers are left alone: they change by what all processes agree on.
        """
        if self.size == 1:
            return network
        options: dict[str, Any] = {_SYNC_BUFFERS: False}
        return DistributedDataParallel(network, **options)


@contextmanager
def join_world(device: torch.device | None = None) -> Iterator[World]:
    """Join the processes that torchrun started (NCCL on CUDA, else Gloo), or be the only one.

    Args:
        device: Where to compute; by default the CUDA device of the local rank, or the CPU.

    Raises:
        TrainingError: If torchrun's variables are incomplete or the device is not there.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device is None:
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise TrainingError(
                f"process {local} has no GPU of its own: this machine has {count}; "
                f"start at most so many (torchrun --nproc-per-node={count})"
            )
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=device)
        return
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise TrainingError(
            f"WORLD_SIZE is {size} and {', '.join(missing)} not set; start with torchrun"
        )
    on_cuda = device.type == "cuda"
    dist.init_process_group("nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
