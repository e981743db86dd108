"""A stand-in for the training data, and a small run, shared by the tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from small import SMALL
from torch import Tensor

from mat_torch.checkpoint import random_checkpoint
from mat_torch.training_options import TrainingOptions
from mat_torch.training_state import TrainingState
from mat_torch.training_step import Batch

__all__ = ["Loaders", "batch_of", "l1", "options", "seasoned_state"]


def options(**changes: Any) -> TrainingOptions:
    """A run of the smallest network in float32, whose steps take a fraction of a second."""
    return replace(
        TrainingOptions(SMALL, batch=4, bf16=False, images=16, perceptual_weight=0.0), **changes
    )


def batch_of(numbers: list[int], side: int = SMALL.resolution) -> dict[str, Tensor]:
    """Samples as the data gives them: smooth noise with a square hole, by number alone."""
    images, masks = [], []
    for number in numbers:
        source = torch.Generator().manual_seed(number)
        coarse = torch.rand(1, 3, 8, 8, generator=source)
        smooth = F.interpolate(coarse, size=(side, side), mode="bilinear")[0]
        images.append((smooth * 255.0).to(torch.uint8))
        top, left = torch.randint(0, side // 2, (2,), generator=source).tolist()
        mask = torch.ones(1, side, side, dtype=torch.uint8)
        mask[:, top : top + side // 2, left : left + side // 2] = 0
        masks.append(mask)
    return {
        "image": torch.stack(images),
        "mask": torch.stack(masks),
        "number": torch.tensor(numbers),
    }


class Loaders:
    """(start, rank, world) → batches without end, dealt to the processes in turn."""

    def __init__(self, batch: int = 4) -> None:
        self.batch = batch

    def __call__(self, start: int, rank: int, world: int) -> Iterator[Batch]:
        while True:
            yield batch_of(list(range(start + rank, start + self.batch, world)))
            start += self.batch


def l1(output: Tensor, image: Tensor) -> Tensor:
    """A perceptual loss without a network."""
    return (output - image).abs().mean()


def seasoned_state(settings: TrainingOptions) -> TrainingState:
    """A state whose weights and biases are all nonzero, as after some training.

    At the very start tokens of the hole are zero, and the derivative of x/max(‖x‖, 1e-12) there is
    10¹²: gradients are then those of rounding errors.
    """
    state = TrainingState.start(settings)
    tensors = random_checkpoint(settings.config, 0).tensors
    for network in (state.generator, state.ema):
        network.load_state_dict(tensors)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in state.discriminator.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=source))
    return state
