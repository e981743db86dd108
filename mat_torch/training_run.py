"""A training run on a folder of pictures: what ``mat-export train`` does, for programs too."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mat_torch.config import CHOICES
from mat_torch.data import (
    CountingSampler,
    CropOptions,
    HeldSource,
    TrainingSet,
    loader,
    open_source,
    preload,
)
from mat_torch.training_options import TrainingError, TrainingOptions

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from mat_torch.losses import Perceptual
    from mat_torch.training_state import InitialWeights, TrainingState

__all__ = ["TrainingData", "changed", "run_training"]


@dataclass(frozen=True)
class TrainingData:
    """Where samples come from, and how they are cut.

    Attributes:
        path: A folder of pictures, a ``.tar``, a folder of them, or a glob.
        crops: How crops and masks are drawn.
        max_side: Pictures are brought down to this longest side when they are read; None: as they
            are.
        memory_bytes: Decoded pictures that are held in memory, at most.
        workers: Processes that prepare samples.
    """

    path: str | os.PathLike[str]
    crops: CropOptions = field(default_factory=CropOptions)
    max_side: int | None = None
    memory_bytes: int = 4 * 2**30
    workers: int = 4


def changed(options: TrainingOptions, assignments: Sequence[str]) -> TrainingOptions:
    """Options with other values, each given as ``name=value``.

    The network's parts that can be left out (`mat_torch.config.CHOICES`) are names too.

    Raises:
        TrainingError: For an unknown name, or a value that is none of its type or range.
        ConfigError: For a choice that there is not.
    """
    names = [f.name for f in dataclasses.fields(options) if f.name != "config"]
    values: dict[str, Any] = {}
    choices: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in (*names, *CHOICES):
            known = ", ".join((*names, *CHOICES))
            raise TrainingError(f"'{assignment}' sets nothing: give name=value, of {known}")
        if name in CHOICES:
            choices[name] = text
        else:
            values[name] = _parsed(name, text, getattr(options, name))
    config = dataclasses.replace(options.config, **choices)
    return dataclasses.replace(options, config=config, **values)


def run_training(
    options: TrainingOptions,
    data: TrainingData,
    folder: str | os.PathLike[str],
    *,
    vgg: str | os.PathLike[str] | None = None,
    initial: InitialWeights | None = None,
    resume: bool = False,
    device: torch.device | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> TrainingState:
    """Train on pictures, or go on.

    Args:
        options: The run.
        data: Its pictures.
        folder: Where it is kept, see `training.train`.
        vgg: A file with torchvision's VGG-19 weights, the published perceptual loss; without it
            EfficientNet-Lite0 of the package of that name takes its place.
        initial: Weights to begin with, see `training.train`.
        resume: Go on from the newest checkpoint of the folder.
        device: Where to compute; by default CUDA, one device a process, or the CPU.
        report: Takes lines of progress.

    Raises:
        TrainingError: If the run cannot start or go on.
        DataError: If there are no pictures, or they cannot be read.
        FeatureError: If the perceptual network's weights cannot be read.
    """
    from mat_torch.training import train

    source = preload(open_source(data.path, max_side=data.max_side), data.memory_bytes)
    dataset = TrainingSet(source, options.config.resolution, options.seed, data.crops)
    for line in _findings(source, options.config.resolution):
        report(line)

    def make_loader(start: int, rank: int, world: int) -> Iterable[dict[str, torch.Tensor]]:
        sampler = CountingSampler(start, options.batch // world, rank, world)
        return loader(dataset, sampler, workers=data.workers)

    make_perceptual = None
    perceptual = "none"
    if options.perceptual_weight:
        perceptual, make_perceptual = _perceptual(vgg, options.gram_weight, report)
    surroundings = {
        "pictures": len(source),
        "names of pictures (SHA-256)": hashlib.sha256("\0".join(source.names).encode()).hexdigest(),
        **dataclasses.asdict(data.crops),
        "max_side": data.max_side,
        "perceptual loss": perceptual,
    }
    try:
        return train(
            options,
            make_loader,
            Path(folder),
            make_perceptual=make_perceptual,
            initial=initial,
            surroundings=surroundings,
            resume=resume,
            device=device,
            report=report,
        )
    finally:
        if set(dataset.passed_over) - source.damaged.keys():
            report(f"damaged pictures, passed over: {_named(dataset.passed_over)}")


def _findings(source: HeldSource, side: int) -> list[str]:
    """What there is to say of the pictures before they are used."""
    lines = [f"{len(source)} pictures"]
    if source.held < len(source) - len(source.damaged):
        lines.append(f"{source.held} of them are held in memory, the others are read each time")
    if source.damaged:
        lines.append(f"damaged pictures, passed over: {_named(list(source.damaged))}")
    small = source.smaller_than(side)
    if small:
        lines.append(f"smaller than {side}×{side}, padded by reflection: {_named(small)}")
    return lines


def _named(names: Sequence[str]) -> str:
    """``2 (a.png, b.png)``; of many, the first five."""
    return f"{len(names)} ({', '.join(sorted(names)[:5])}{' …' if len(names) > 5 else ''})"


def _perceptual(
    vgg: str | os.PathLike[str] | None, gram_weight: float, report: Callable[[str], None]
) -> tuple[str, Callable[[torch.device], Perceptual]]:
    """The perceptual loss's name, and what makes it.

    Its weights are read now, so that a wrong file is told at once.
    """
    from mat_torch.features import EfficientNetLite0Features, VGG19Features
    from mat_torch.perceptual import PerceptualLoss

    backbone = EfficientNetLite0Features.load() if vgg is None else VGG19Features.load(vgg)
    loss = PerceptualLoss(backbone, gram_weight=gram_weight)
    report(f"perceptual loss: {loss.name}" + ("" if vgg else " (the published one is VGG-19)"))
    return loss.name, lambda device: loss.to(device)


def _parsed(name: str, text: str, now: Any) -> Any:
    """A value of the type that it has now."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        if isinstance(now, bool):
            return words[text.lower()]
        if isinstance(now, tuple):
            return tuple(float(part) for part in text.split(","))
        if isinstance(now, int):
            return int(text.replace("_", ""))
        return None if text.lower() == "none" else float(text)
    except (KeyError, ValueError) as error:
        kind = {bool: "true or false", int: "a whole number", tuple: "numbers a,b"}
        wanted = next((w for t, w in kind.items() if isinstance(now, t)), "a number")
        raise TrainingError(f"{name} is {wanted}, got '{text}'") from error
