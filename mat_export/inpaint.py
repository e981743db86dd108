"""A picture of any size and mode with holes in, the same picture with the holes filled out.

NumPy, Pillow and a runner; no torch. The way of a picture:

1. The mask says which pixels are kept (`mat_export.masks`); the holes are gathered in regions, each
   seen in a square window with context (`mat_export.regions`). Beyond the picture it is mirrored.
2. A window larger than the network's side is scaled down; a coarse pixel counts as kept only if it
   covers kept pixels alone (`mat_export.resample`). What lies under a hole is never looked at.
3. The model fills the window; the fill is shaded to meet the kept pixels (`mat_export.feather`),
   scaled up, and painted into the hole alone (`mat_export.canvas`): kept pixels keep their bits.
4. Later windows see what earlier ones filled.

A seed names a picture: region k, counted from 0 in the order of filling, draws the model's random
inputs from ``(seed + k · 0x9E3779B97F4A7C15) mod 2⁶⁴``: the first draws them from the seed itself.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mat_export.canvas import Canvas, Picture
from mat_export.contract import UserError
from mat_export.feather import feathered
from mat_export.images import read_image
from mat_export.masks import MaskSource, hole_notes, read_mask
from mat_export.pixels import to_unit
from mat_export.regions import Region, plan_regions, reflected
from mat_export.resample import enlarged_strips, shrunk
from mat_export.runners import Runner
from mat_torch.sampling import draw

__all__ = ["ImageSource", "InpaintResult", "Inpainter", "check_seeds", "region_seed"]

ImageSource = Image.Image | NDArray[Any] | str | os.PathLike[str]
"""An image, an array [H, W] or [H, W, 1 to 4] of bool or numbers, or the path of a picture file."""

_SEEDS = 2**64
_GOLDEN = 0x9E3779B97F4A7C15
"""2⁶⁴ over the golden ratio, odd: its multiples visit every 64-bit number once, far apart."""

_AT_ONCE = 4
"""Answers in one run of a model with a dynamic batch."""

_LARGE = 1 << 24
"""Pictures of more pixels than this are answered one at a time, to bound the memory."""


@dataclass(frozen=True)
class InpaintResult:
    """One answer.

    Attributes:
        image: The filled picture: an array of the same type and shape for an array, else an image
            of the same mode and size, with its colour profile and EXIF data in ``info``.
        seed: What names this answer.
        runs: How many windows the model filled for it.
        keep: [H, W] the mask as the picture is displayed: True kept, False hole.
        notes: Sentences on anything about picture and mask that the user may want to know.
    """

    image: Image.Image | NDArray[Any]
    seed: int
    runs: int
    keep: NDArray[np.bool_]
    notes: tuple[str, ...] = ()


class Inpainter:
    """Fills holes with a model.

    Pictures are worked on upright, by their EXIF orientation, and come back as they were stored.
    The mask is laid on the picture as displayed or, if its size fits only that, as stored.

    Args:
        runner: The model.
        context: Side of the window around a compact hole, relative to the hole's; from 1 to 8.
            More context knows more of the picture, but fills large holes with less detail.
        feather: Pixels at the network's scale over which a fill fades into its own colours from
            those around it, from 0 (not at all) to a quarter of the network's side.
        max_windows: Coarser windows are taken where a mask would need more than this. What a mask
            needs are few, unless thin or scattered holes spread over a large picture.

    Raises:
        UserError: For an argument out of its range.
    """

    def __init__(
        self, runner: Runner, *, context: float = 2.0, feather: int = 8, max_windows: int = 64
    ) -> None:
        native = runner.spec.config.resolution
        if not 1.0 <= context <= 8.0:
            raise UserError(f"context is from 1 to 8 times the hole, got {context}")
        if not 0 <= feather <= native // 4:
            raise UserError(f"feather is from 0 to {native // 4} pixels here, got {feather}")
        if max_windows < 1:
            raise UserError(f"max_windows is at least 1, got {max_windows}")
        self.runner = runner
        self.context = context
        self.feather = feather
        self.max_windows = max_windows

    @overload
    def __call__(
        self,
        image: NDArray[Any],
        mask: MaskSource,
        *,
        seed: int = 0,
        truncation: float = 1.0,
        hole: str = "black",
    ) -> NDArray[Any]: ...

    @overload
    def __call__(
        self,
        image: Image.Image | str | os.PathLike[str],
        mask: MaskSource,
        *,
        seed: int = 0,
        truncation: float = 1.0,
        hole: str = "black",
    ) -> Image.Image: ...

    def __call__(
        self,
        image: ImageSource,
        mask: MaskSource,
        *,
        seed: int = 0,
        truncation: float = 1.0,
        hole: str = "black",
    ) -> Image.Image | NDArray[Any]:
        """The filled picture alone; everything else as `fill`."""
        return self.fill(image, mask, seed=seed, truncation=truncation, hole=hole).image

    def fill(
        self,
        image: ImageSource,
        mask: MaskSource,
        *,
        seed: int = 0,
        truncation: float = 1.0,
        hole: str = "black",
    ) -> InpaintResult:
        """Fill the holes of one picture.

        Args:
            image: The picture, from 1×1 to 8192×8192 pixels, of any mode `mat_export.canvas` lists.
            mask: What to keep; see `mat_export.masks`.
            seed: In [0, 2⁶⁴); the same seed gives the same picture.
            truncation: ψ in [0, 2]: 0 the mean style, 1 the model's own range.
            hole: The holes' colour in the mask, ``black`` or ``white``.

        Raises:
            UserError: For an unreadable file, a picture or mask that cannot be taken, sizes that
                differ, an argument out of range, or a model that gives numbers that are not finite.
        """
        return next(self.answers(image, mask, seed=seed, truncation=truncation, hole=hole))

    def answers(
        self,
        image: ImageSource,
        mask: MaskSource,
        *,
        seed: int = 0,
        count: int = 1,
        truncation: float = 1.0,
        hole: str = "black",
    ) -> Iterator[InpaintResult]:
        """Several answers, of the seeds seed … seed + count - 1, each the one `fill` gives.

        Bad input raises at once, not when the first answer is asked for. A model that takes a batch
        works on several answers at a time.

        Args:
            image, mask, seed, truncation, hole: As `fill`.
            count: How many, 1 or more.

        Raises:
            UserError: As `fill`.
        """
        seed, count = operator.index(seed), operator.index(count)
        check_seeds(seed, count)
        if not 0.0 <= truncation <= 2.0:
            raise UserError(f"truncation is from 0 to 2, got {truncation}")
        notes: list[str] = []
        if isinstance(image, str | os.PathLike):
            image = read_image(image, notes)
        picture = Picture(image)
        keep = picture.aligned(read_mask(mask, hole=hole, notes=notes))
        notes += hole_notes(keep)
        return self._answers(picture, keep, seed, count, truncation, tuple(notes))

    def _answers(
        self,
        picture: Picture,
        keep: NDArray[np.bool_],
        seed: int,
        count: int,
        truncation: float,
        notes: tuple[str, ...],
    ) -> Iterator[InpaintResult]:
        native = self.runner.spec.config.resolution
        regions = plan_regions(keep, native, context=self.context, max_windows=self.max_windows)
        at_once = 1 if keep.size > _LARGE else self.runner.spec.batch or _AT_ONCE
        for first in range(seed, seed + count, at_once):
            seeds = range(first, min(first + at_once, seed + count))
            canvases = [picture.canvas(keep) for _ in seeds]
            runs = self._paint(canvases, keep, regions, seeds, truncation)
            for answer, canvas in zip(seeds, canvases, strict=True):
                yield InpaintResult(canvas.picture(), answer, runs, keep, notes)

    def _paint(
        self,
        canvases: Sequence[Canvas],
        keep: NDArray[np.bool_],
        regions: Sequence[Region],
        seeds: Sequence[int],
        truncation: float,
    ) -> int:
        """Fill every region of every canvas, one canvas a seed; how many windows it took."""
        known = keep.copy()
        runs = 0
        for region in regions:
            box = region.box
            todo = ~known[box.top : box.bottom, box.left : box.right]
            if not todo.any():
                continue
            fills = self._fills(
                canvases, known, region, [region_seed(seed, runs) for seed in seeds], truncation
            )
            for canvas, fill in zip(canvases, fills, strict=True):
                for top, strip in enlarged_strips(fill, region.window, box):
                    rows = slice(top - box.top, top - box.top + strip.shape[0])
                    canvas.paint(top, box.left, todo[rows], strip)
            known[box.top : box.bottom, box.left : box.right] = True
            runs += 1
        return runs

    def _fills(
        self,
        canvases: Sequence[Canvas],
        known: NDArray[np.bool_],
        region: Region,
        seeds: Sequence[int],
        truncation: float,
    ) -> list[NDArray[np.float32]]:
        """The feathered fill of a region's window for each canvas: [n, n, 3], 0 to 255."""
        window, native = region.window, self.runner.spec.config.resolution
        rows = reflected(window.top, window.side, known.shape[0])
        columns = reflected(window.left, window.side, known.shape[1])
        seen = [shrunk(canvas, known, rows, columns, native, native) for canvas in canvases]
        rgb = np.stack([colours for colours, _ in seen])
        keep = np.stack([kept for _, kept in seen])
        fills = _run(self.runner, rgb, keep, seeds, truncation)
        return [feathered(*parts, self.feather) for parts in zip(fills, rgb, keep, strict=True)]


def check_seeds(seed: int, count: int) -> None:
    """Raise UserError unless there is at least one answer and all seeds lie in [0, 2⁶⁴)."""
    if count < 1:
        raise UserError(f"at least one answer has to be asked for, got a count of {count}")
    if seed < 0 or seed + count > _SEEDS:
        raise UserError(
            f"seeds are from 0 to 2**64 - 1, got {seed}"
            + (f" to {seed + count - 1}" if count > 1 else "")
        )


def region_seed(seed: int, k: int) -> int:
    """Seed of the random inputs of region k (from 0) of the picture that `seed` names."""
    return (seed + k * _GOLDEN) % _SEEDS


def _run(
    runner: Runner,
    rgb: NDArray[np.uint8],
    keep: NDArray[np.bool_],
    seeds: Sequence[int],
    truncation: float,
) -> NDArray[np.float32]:
    """One run of the model, whatever its batch and number format.

    Args:
        runner: The model.
        rgb: [B, n, n, 3], no more than its batch.
        keep: [B, n, n].
        seeds: One an image.
        truncation: ψ.

    Returns:
        [B, n, n, 3], 0 to 255, not rounded where the model gives floats.

    Raises:
        UserError: If the model gives numbers that are not finite.
    """
    spec, wanted = runner.spec, len(seeds)
    batch = spec.batch or wanted
    chosen = np.minimum(np.arange(batch), wanted - 1)  # the last image again fills a fixed batch
    image = rgb[chosen]
    mask = np.where(keep[chosen], np.uint8(255), np.uint8(0))
    pictures: dict[str, NDArray[Any]] = {"image": image, "mask": mask}
    if spec.io == "float":
        pictures["image"], pictures["mask"] = to_unit(image, mask)
    random = draw(spec.config, [seeds[i] for i in chosen], noise=spec.noise == "input")
    psi = np.array([truncation], dtype=np.float32)
    output = runner.run({**pictures, **random, "truncation": psi})["output"][:wanted]
    if spec.io == "uint8":
        return output.astype(np.float32)
    broken = int(np.count_nonzero(~np.isfinite(output)))
    if broken:
        raise UserError(
            f"the model gave {broken} of {output.size} numbers that are not finite (NaN or "
            "infinite): its weights or its precision are at fault, try the fp32 model"
        )
    levels = (output.transpose(0, 2, 3, 1).astype(np.float32) + 1.0) * 127.5
    return np.asarray(np.clip(levels, 0.0, 255.0), dtype=np.float32)
