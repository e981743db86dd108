"""A sheet of held-out samples, good and bad: photograph, hole, and what the model put there.

    python benchmarks/samples.py QUALITY.json PHOTOGRAPHS -o samples.jpg [--model FILE]
        [--cell 160] [--limit-kb 500] [--device cpu|cuda]

QUALITY.json is what ``quality.py`` wrote for the model, PHOTOGRAPHS the folder it was given. Its
crops whose hole is a fifth or more are sorted by the perceptual distance in the hole: the four best
and the four worst are shown with four answers each, and 24 evenly from between. Nothing is chosen
by hand.

For a look at full size: ``--cell 256 -o samples.png``. A minute on two cores.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mat_export.console import note, tracker
from mat_export.contract import UserError
from mat_export.evaluating import EvaluationSet, runner_fill
from mat_export.files import atomic_write, require_writable
from mat_export.report import picture_of
from mat_export.runners import TorchRunner, read_checkpoint
from mat_export.shipped import shipped_model
from mat_torch.evaluation import Fill, answer_seed

ENDS, BETWEEN, ANSWERS = 4, 24, 4
"""Crops at either end, crops between, and answers to those at the ends."""

LEAST_HOLE = 0.2
"""Share of the picture; thin strokes would be the best of all, and show little."""

COLUMNS = 12
"""Pictures side by side: four samples of one answer, or two of four."""

GAP, LINE = 4, 16
PAPER, INK, HOLE = (255, 255, 255), (60, 60, 60), 128

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Sample:
    """One crop.

    Attributes:
        caption: What is written below it.
        pictures: Photograph, photograph with its hole, answers: each [R, R, 3].
    """

    caption: str
    pictures: list[Pixels]


def chosen(
    distances: Sequence[float], ratios: Sequence[float]
) -> tuple[list[int], list[int], list[int]]:
    """Numbers of the best crops, of those evenly from between, and of the worst, each in order.

    Args:
        distances: Of each crop, from the photograph.
        ratios: Of each crop, the hole's share.

    Raises:
        UserError: If there are fewer crops than a sheet shows.
    """
    large = np.flatnonzero(np.asarray(ratios) >= LEAST_HOLE)
    total = 2 * ENDS + BETWEEN
    if len(large) < total:
        raise UserError(
            f"a sheet shows {total} crops with holes of {LEAST_HOLE:.0%} or more, and "
            f"{len(large)} were measured: measure more"
        )
    order = large[np.argsort(np.asarray(distances)[large], kind="stable")]
    between = np.linspace(ENDS, len(order) - ENDS - 1, BETWEEN).round().astype(int)
    return order[:ENDS].tolist(), order[between].tolist(), order[-ENDS:].tolist()


def sample(
    report: Mapping[str, Any], data: EvaluationSet, fill: Fill, number: int, answers: int
) -> Sample:
    """One crop, filled as it was when it was measured."""
    image, mask = data.picture(number)[None], data.mask(number)[None]
    photograph, keep = picture_of(image[0]), mask[0, 0, :, :, None] > 0.5
    pictures = [photograph, np.where(keep, photograph, np.uint8(HOLE))]
    for answer in range(answers):
        seed = answer_seed(report["settings"]["seed"], number, answer)
        filled = picture_of(fill(image * mask, mask, [seed])[0])
        pictures.append(np.where(keep, photograph, filled))
    crops = report["crops"]
    ratio, distance = crops["hole_ratio"][number], crops["perceptual"][number]
    return Sample(f"{number}: {distance:.2f}, {100 * ratio:.0f} % hole", pictures)


def sheet(sections: Mapping[str, Sequence[Sample]], cell: int) -> Image.Image:
    """Samples under their headings, each picture scaled to a side of `cell` pixels."""
    rows = list(_rows(sections))
    height = sum(LINE + GAP if isinstance(row, str) else cell + LINE + GAP for row in rows)
    page = Image.new("RGB", (COLUMNS * (cell + GAP) + GAP, height + GAP), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(LINE - 5)
    top = GAP
    for row in rows:
        if isinstance(row, str):
            pen.text((GAP, top), row, INK, font)
            top += LINE + GAP
            continue
        left = GAP
        for one in row:
            pen.text((left, top + cell), one.caption, INK, font)
            for pixels in one.pictures:
                small = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.LANCZOS)
                page.paste(small, (left, top))
                left += cell + GAP
        top += cell + LINE + GAP
    return page


def _rows(sections: Mapping[str, Sequence[Sample]]) -> Iterator[str | Sequence[Sample]]:
    """A heading, then its samples, as many in a row as fit."""
    for heading, samples in sections.items():
        yield heading
        step = COLUMNS // len(samples[0].pictures)
        for i in range(0, len(samples), step):
            yield samples[i : i + step]


def encoded(page: Image.Image, suffix: str, limit: int) -> bytes:
    """The file's bytes: a PNG, or the best JPEG within the limit.

    Raises:
        UserError: If the suffix is neither, or no quality gets a JPEG below the limit.
    """
    if suffix == ".png":
        return _saved(page, "PNG", optimize=True)
    if suffix not in (".jpg", ".jpeg"):
        raise UserError(f"a sheet is a .jpg or a .png, got '{suffix}'")
    for quality in range(90, 49, -5):
        content = _saved(page, "JPEG", quality=quality, optimize=True)
        if len(content) <= limit:
            return content
    raise UserError(f"the sheet takes {len(content) / 1e3:.0f} kB: make --cell smaller")


def _saved(page: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    page.save(buffer, kind, **options)
    return buffer.getvalue()


def draw(arguments: argparse.Namespace) -> Image.Image:
    """The whole sheet."""
    report = json.loads(arguments.quality.read_text(encoding="utf-8"))
    checkpoint = read_checkpoint(arguments.model or shipped_model())
    if checkpoint.digest != report["model"]["digest"]:
        raise UserError(
            f"'{arguments.quality}' is of other weights ({report['model']['digest'][:12]}) than "
            f"'{checkpoint.source}' ({checkpoint.digest[:12]}): name theirs with --model"
        )
    settings = report["settings"]
    data = EvaluationSet(
        arguments.photographs,
        checkpoint.config.resolution,
        settings["count"],
        masks=settings["masks"],
        seed=settings["seed"],
        share=tuple(settings["share"]),
    )
    if list(data.photographs) != report["photographs"]:
        raise UserError(f"'{arguments.photographs}' holds other photographs than were measured")
    runner = TorchRunner(checkpoint, device=arguments.device)
    fill = runner_fill(runner, truncation=settings["truncation"])
    crops = report["crops"]
    best, between, worst = chosen(crops["perceptual"], crops["hole_ratio"])
    headings = {
        f"The {ENDS} best of {settings['count']} crops with holes of {LEAST_HOLE:.0%} or more, "
        f"{ANSWERS} answers each (number: perceptual distance in the hole, its size)": (
            best,
            ANSWERS,
        ),
        f"{BETWEEN} evenly from between": (between, 1),
        f"The {ENDS} worst": (worst, ANSWERS),
    }
    sections: dict[str, list[Sample]] = {}
    with tracker("samples") as progress:
        for heading, (numbers, answers) in headings.items():
            sections[heading] = []
            for number in numbers:
                done = sum(map(len, sections.values()))
                progress(f"crop {number}", done, 2 * ENDS + BETWEEN)
                sections[heading].append(sample(report, data, fill, number, answers))
    return sheet(sections, arguments.cell)


def main(words: Sequence[str] | None = None) -> int:
    """Draw and write the sheet; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("quality", type=Path, help="what quality.py wrote")
    parser.add_argument("photographs", type=Path, help="the photographs it was given")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .jpg or .png")
    parser.add_argument("--model", type=Path, help="a checkpoint; by default the shipped model")
    parser.add_argument("--cell", type=int, default=160, help="pixels a side of a picture")
    parser.add_argument("--limit-kb", type=int, default=500, help="of a JPEG")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args(words)
    try:
        require_writable(arguments.output)
        page = draw(arguments)
        suffix = arguments.output.suffix.lower()
        content = encoded(page, suffix, 1000 * arguments.limit_kb)
        atomic_write(arguments.output, content)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    note(f"wrote {arguments.output}: {page.width}×{page.height}, {len(content) / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
