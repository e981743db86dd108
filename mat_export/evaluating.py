"""Models as they would be delivered (checkpoint, ONNX file, engine), measured on photographs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mat_export.contract import UserError
from mat_export.runners import Runner
from mat_torch.data import (
    CountingSampler,
    CropOptions,
    DataError,
    TrainingSet,
    loader,
    open_source,
    preload,
)
from mat_torch.evaluation import Evaluation, EvaluationError, Fill, evaluate
from mat_torch.sampling import draw

if TYPE_CHECKING:
    from mat_torch.features import MapFeatures, PooledFeatures

__all__ = ["EvaluationSet", "evaluate_all", "names_of", "runner_fill"]

_NAMED = 5
"""Damaged pictures that a note names; the evaluation has them all."""


class EvaluationSet:
    """Crops of photographs with masks, the same for every method.

    Args:
        path: Pictures: a folder, a ``.tar``, or a folder of them.
        resolution: Side of the crops.
        count: How many; None: one of each picture.
        masks: Kind of the masks, ``large`` or ``small`` (the published samplers).
        seed: What crops and masks are drawn from.
        share: Side of a crop as a share of its picture's shorter side, uniform in this range.

    Attributes:
        photographs: Names of the pictures that crops are cut from.

    Raises:
        UserError: If there are no pictures or they cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        resolution: int,
        count: int | None = None,
        *,
        masks: Literal["large", "small"] = "large",
        seed: int = 0,
        share: tuple[float, float] = (0.5, 1.0),
    ) -> None:
        try:
            crops = CropOptions(share=share, flip=False, masks=masks)
            source = preload(open_source(path))
            self._items = TrainingSet(source, resolution, seed, crops)
        except DataError as error:
            raise UserError(str(error)) from error
        self.photographs = source.names
        self._count = len(source) if count is None else count
        # Pictures and masks are asked for in step, so that each item is drawn once.
        self._item: Callable[[int], dict[str, Any]] = functools.lru_cache(maxsize=1)(self._drawn)

    def hold(self, workers: int = 0) -> None:
        """Draw every crop now and keep it (256 KiB each at 256), for several methods to take.

        Args:
            workers: Processes that draw; 0: this one does.

        Raises:
            UserError: If the pictures cannot be read.
        """
        sampler = CountingSampler(0, 1, repeat=len(self))
        try:
            batches = loader(self._items, sampler, workers=workers, pin_memory=False)
            held = [{name: batch[name][0] for name in ("image", "mask")} for batch in batches]
        except DataError as error:
            raise UserError(str(error)) from error
        self._item = held.__getitem__

    def __len__(self) -> int:
        return self._count

    @property
    def passed_over(self) -> tuple[str, ...]:
        """Names of the pictures met so far that cannot be read: others took their place."""
        return tuple(self._items.passed_over)

    def picture(self, i: int) -> NDArray[np.float32]:
        """[3, R, R] in [-1, 1]."""
        return np.asarray(self._item(i)["image"].numpy() / np.float32(127.5) - 1, np.float32)

    def mask(self, i: int) -> NDArray[np.float32]:
        """[1, R, R], 1 keep and 0 hole."""
        keep: NDArray[np.float32] = self._item(i)["mask"].numpy().astype(np.float32)
        return keep

    def pictures(self, numbers: Iterable[int] | None = None) -> Iterator[NDArray[np.float32]]:
        """These pictures one by one; None: all."""
        return map(self.picture, range(len(self)) if numbers is None else numbers)

    def masks(self, numbers: Iterable[int] | None = None) -> Iterator[NDArray[np.float32]]:
        """Their masks likewise."""
        return map(self.mask, range(len(self)) if numbers is None else numbers)

    def _drawn(self, i: int) -> dict[str, Any]:
        try:
            return self._items[i]
        except DataError as error:
            raise UserError(str(error)) from error


def names_of(paths: Iterable[Path]) -> dict[Path, str]:
    """A name for each file: its own, with as many folders before it as tell it from the others."""
    files = list(dict.fromkeys(paths))
    names = {}
    for path in files:
        others = [other.parts for other in files if other != path]
        depths = range(1, len(path.parts))
        apart = (n for n in depths if all(parts[-n:] != path.parts[-n:] for parts in others))
        names[path] = Path(*path.parts[-next(apart, len(path.parts)) :]).as_posix()
    return names


def runner_fill(runner: Runner, *, truncation: float = 1.0) -> Fill:
    """A model as a method: its random inputs are those that each seed names.

    Args:
        runner: Of a graph that takes floats.
        truncation: ψ.

    Raises:
        UserError: If the graph takes bytes.
    """
    spec = runner.spec
    if spec.io != "float":
        raise UserError("an evaluation needs a model that takes floats: export it with --io float")

    def fill(image: NDArray[Any], mask: NDArray[Any], seeds: Sequence[int]) -> NDArray[np.float32]:
        size = spec.batch or len(seeds)
        outputs = []
        for begin in range(0, len(seeds), size):
            chosen = np.minimum(np.arange(begin, begin + size), len(seeds) - 1)
            random = draw(spec.config, [seeds[i] for i in chosen], noise=spec.noise == "input")
            psi = np.array([truncation], np.float32)
            inputs = {"image": image[chosen], "mask": mask[chosen], **random, "truncation": psi}
            outputs.append(runner.run(inputs)["output"][: len(seeds) - begin])
        return np.concatenate(outputs).astype(np.float32)

    return fill


def evaluate_all(
    methods: Mapping[str, Fill],
    data: EvaluationSet,
    *,
    features: str | os.PathLike[str] | None = None,
    batch: int = 8,
    seed: int = 0,
    answers: int = 1,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> list[Evaluation]:
    """Measure each method on the same pictures and masks.

    Args:
        methods: By name.
        data: The pictures.
        features: Inception weights, for FID; EfficientNet-Lite0 takes its place without.
            Perceptual distance and diversity are EfficientNet-Lite0's in any case.
        batch: Pictures filled at once.
        seed: Of the answers.
        answers: Fillings of each picture; from two on diversity is measured.
        device: Where the feature networks run, ``cpu`` or ``cuda``.
        progress: Called with the method, pictures done and their number.
        note: Called with sentences for the user.

    Raises:
        UserError: If a method fails, the weights cannot be read, or a package is missing.
    """
    from mat_torch.features import FeatureError, open_features
    from mat_torch.metrics import MetricError, require_packages

    try:
        require_packages()
        network = open_features("auto", features).to(device)
        maps = _maps_beside(network, device, note)
        found = [
            evaluate(
                fill,
                data.pictures(),
                data.masks(),
                network,
                name=name,
                perceptual=maps,
                batch=batch,
                seed=seed,
                answers=answers,
                progress=lambda done, _, name=name: progress(name, done, len(data)),  # type: ignore[misc]
            )
            for name, fill in methods.items()
        ]
    except (EvaluationError, FeatureError, MetricError) as error:
        raise UserError(str(error)) from error
    damaged = data.passed_over
    if damaged:
        named = ", ".join(damaged[:_NAMED]) + (", …" if len(damaged) > _NAMED else "")
        note(f"passed over {len(damaged)} damaged pictures, others took their place: {named}")
    return [replace(each, passed_over=damaged) for each in found]


def _maps_beside(
    network: PooledFeatures, device: str, note: Callable[[str], None]
) -> MapFeatures | None:
    """What compares pictures place by place: the network itself, or EfficientNet-Lite0."""
    from mat_torch.features import EfficientNetLite0Features, FeatureError, MapFeatures

    if isinstance(network, MapFeatures):
        return network
    try:
        return EfficientNetLite0Features.load().to(device)
    except FeatureError as error:
        note(f"perceptual distance and diversity are left out: {error}")
        return None
