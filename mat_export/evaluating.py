"""Models as they would be delivered (checkpoint, ONNX file, engine), measured on photographs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

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

__all__ = ["EvaluationSet", "evaluate_all", "runner_fill"]


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
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Evaluation]:
    """Measure each method on the same pictures and masks.

    Args:
        methods: By name.
        data: The pictures.
        features: Inception weights, for FID; EfficientNet-Lite0 takes its place without.
        batch: Pictures filled at once.
        seed: Of the answers.
        answers: Fillings of each picture; from two on diversity is measured.
        progress: Called with the method, pictures done and their number.

    Raises:
        UserError: If a method fails, or the weights cannot be read.
    """
    from mat_torch.features import FeatureError, open_features
    from mat_torch.metrics import MetricError

    try:
        network = open_features("auto", features)
        return [
            evaluate(
                fill,
                data.pictures(),
                data.masks(),
                network,
                name=name,
                batch=batch,
                seed=seed,
                answers=answers,
                progress=lambda done, _, name=name: progress(name, done, len(data)),  # type: ignore[misc]
            )
            for name, fill in methods.items()
        ]
    except (EvaluationError, FeatureError, MetricError) as error:
        raise UserError(str(error)) from error
