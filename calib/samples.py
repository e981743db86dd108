"""What a model is calibrated on: picture, mask, latent and gates together, drawn from a seed.

Ranges depend on all inputs at once: a large hole widens what the decoder sees, ψ moves the styles,
gates decide what passes the bottleneck. So a sample is all of them, and the set covers the hole
ratios evenly, whatever the samplers draw most.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mat_export.contract import GraphSpec, UserError
from mat_export.images import READABLE, read_image
from mat_export.pixels import to_unit
from mat_export.suite import PHOTOGRAPHS, photograph
from mat_torch.masks import stratified
from mat_torch.sampling import draw

__all__ = [
    "FEWEST_PICTURES",
    "STRATA",
    "Pictures",
    "Sample",
    "digest_of",
    "draw_samples",
    "open_pictures",
]

STRATA = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))
"""Hole ratios that have as many samples each."""

_ROUND, _ALL_HOLE, _NO_HOLE = 16, 5, 15
"""Of so many samples one is all hole and one has none, at these places; the first few samples cover
every stratum and the full hole."""

FEWEST_PICTURES = 3
"""With fewer the ranges are those of a picture, not of pictures."""

_TRUNCATIONS = (1.0, 0.5, 1.0, 0.0, 2.0, 1.0)
"""ψ of the samples in turn: mostly the model's own range, and every other that a caller may set."""

_ORDER = 2
"""Beside a seed: what the order of pictures is drawn from; samples have 0 and 1."""


class Pictures:
    """Where crops come from: pictures in a fixed order, each looked at when it is asked for.

    Args:
        source: The folder's name, or ``built-in``.
        paths: Files in that order.
        resolution: Shortest side, in pixels, that a picture must have.

    Attributes:
        source: As above.
        passed_over: Files met so far that cannot be used, with the reason, in words.
    """

    def __init__(self, source: str, paths: Sequence[str], resolution: int) -> None:
        self.source, self.passed_over = source, list[str]()
        self._paths, self._resolution = tuple(paths), resolution
        self._coming = iter(self._paths)
        self._usable: list[str] = []

    def first(self, count: int) -> list[str]:
        """The first so many that can be used, or all of them if there are fewer."""
        while len(self._usable) < count:
            path = next(self._coming, None)
            if path is None:
                break
            try:
                size = self._open(path).size
            except UserError as error:
                self.passed_over.append(str(error))
                continue
            if min(size) < self._resolution:
                self.passed_over.append(f"'{path}' has {size[0]}x{size[1]} pixels")
            else:
                self._usable.append(path)
        return self._usable[:count]

    def read(self, index: int) -> Image.Image:
        """Of those that can be used the one at this place, upright, in RGB; round and round."""
        usable = self.first(index + 1)
        return self._open(usable[index % len(usable)])

    def backwards(self) -> Pictures:
        """The same from the last one on."""
        return Pictures(self.source, self._paths[::-1], self._resolution)

    def _open(self, path: str) -> Image.Image:
        return ImageOps.exif_transpose(read_image(path)).convert("RGB")


class _BuiltIn(Pictures):
    """The photographs of the package: too few to set any aside, so they are the same backwards."""

    def __init__(self) -> None:
        super().__init__("built-in", PHOTOGRAPHS, 0)

    def backwards(self) -> Pictures:
        return self

    def _open(self, path: str) -> Image.Image:
        return Image.fromarray(photograph(path, 512, 512))


def open_pictures(
    folder: str | os.PathLike[str] | None, resolution: int, seed: int = 0
) -> Pictures:
    """The pictures in a folder and its subfolders; without one, those of the package.

    Args:
        folder: Where to look.
        resolution: Shortest side, in pixels, that a picture must have.
        seed: What their order is drawn from; those of the package keep theirs.

    Raises:
        UserError: If there is no such folder, or it has fewer than FEWEST_PICTURES that can be
            used.
    """
    if folder is None:
        return _BuiltIn()
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"there is no folder '{folder}'")
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in READABLE and p.is_file())
    order = np.random.default_rng([seed, _ORDER]).permutation(len(found))
    pictures = Pictures(root.resolve().name, [str(found[i]) for i in order], resolution)
    usable = len(pictures.first(FEWEST_PICTURES))
    if usable < FEWEST_PICTURES:
        raise UserError(
            f"'{folder}' has {usable} usable pictures of {len(found)}, and calibration needs "
            f"{FEWEST_PICTURES} or more with {resolution} pixels a side or more"
            + (f" (one that is not: {pictures.passed_over[0]})" if pictures.passed_over else "")
        )
    return pictures


@dataclass(frozen=True)
class Sample:
    """One picture to fill.

    Attributes:
        feeds: The graph's inputs, the images of a batch all alike.
        hole: [H, W], True where the filling is judged.
    """

    feeds: dict[str, NDArray[Any]] = field(repr=False)
    hole: NDArray[np.bool_] = field(repr=False)


def draw_samples(spec: GraphSpec, pictures: Pictures, count: int, seed: int) -> list[Sample]:
    """Samples that follow from a seed alone; the first of a longer list are those of a shorter.

    Args:
        spec: What the graph takes. Where its batch is fixed a sample fills it.
        pictures: Where crops come from, one each in their order; all again if there are too few.
        count: How many samples.
        seed: What crops, masks, latents and gates are drawn from.
    """
    side = spec.config.resolution
    return [
        _sample(spec, pictures, keep, np.random.default_rng([seed, 1, i]), i, seed)
        for i, keep in enumerate(_masks(side, count, np.random.default_rng([seed, 0])))
    ]


def digest_of(samples: Iterable[Sample]) -> str:
    """SHA-256 over every input of every sample, as hex."""
    digest = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample.feeds):
            digest.update(name.encode())
            digest.update(sample.feeds[name].tobytes())
    return digest.hexdigest()


def _masks(side: int, count: int, rng: np.random.Generator) -> list[NDArray[np.bool_]]:
    """Masks, one stratum after the other, and now and then all hole or none."""
    drawn = stratified(STRATA, -(-count // len(STRATA)), side, rng).swapaxes(0, 1)
    turns = iter(drawn.reshape(-1, side, side))
    whole = {_ALL_HOLE: np.zeros((side, side), bool), _NO_HOLE: np.ones((side, side), bool)}
    places = [i % _ROUND for i in range(count)]
    return [whole[place] if place in whole else next(turns) for place in places]


def _sample(
    spec: GraphSpec,
    pictures: Pictures,
    keep: NDArray[np.bool_],
    rng: np.random.Generator,
    index: int,
    seed: int,
) -> Sample:
    number = seed * 100_003 + index
    feeds: dict[str, NDArray[Any]] = dict(draw(spec.config, [number], noise=spec.noise == "input"))
    image = _crop(pictures.read(index), spec.config.resolution, rng)[None]
    mask = keep[None].astype(np.uint8) * np.uint8(255)
    feeds["image"], feeds["mask"] = (image, mask) if spec.io == "uint8" else to_unit(image, mask)
    feeds = {name: np.repeat(values, spec.batch or 1, axis=0) for name, values in feeds.items()}
    feeds["truncation"] = np.full(1, _TRUNCATIONS[index % len(_TRUNCATIONS)], np.float32)
    return Sample(feeds, ~keep)


def _crop(picture: Image.Image, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A square of a picture, from half its shorter side up, brought to a size, or its mirror."""
    shorter = min(picture.size)
    side = int(rng.integers(max(size, shorter // 2), shorter, endpoint=True))
    left = int(rng.integers(picture.width - side, endpoint=True))
    top = int(rng.integers(picture.height - side, endpoint=True))
    box = (left, top, left + side, top + side)
    crop = picture.resize((size, size), Image.Resampling.LANCZOS, box=box)
    return np.array(ImageOps.mirror(crop) if rng.integers(2) else crop)
