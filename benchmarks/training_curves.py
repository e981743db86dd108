"""A training run in one picture: losses, gradients and quality over the images seen.

    python benchmarks/training_curves.py RUN -o curves.svg [--quality curve.json]
        [--json run.json --command 'mat-export train …']

RUN is the folder of ``mat-export train``; its ``log.jsonl`` is plotted, each point a mean over a
two-hundredth of the run. ``curve.json`` is what ``quality.py --curve`` wrote for the run's
snapshots. With ``--json`` the run's settings and figures are written too, for ``model_card.py``:
options and counters from its newest checkpoint, speed and time from the log, and the commands that
were given.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mat_export.contract import UserError
from mat_export.files import atomic_write
from mat_torch.training_state import latest_checkpoint

POINTS = 200
"""Of a line, at most."""

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 450, 240, 62, 24, 34, 36
COLOURS = ("#1d4ed8", "#d97706", "#157347", "#b42318")

Line = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title: Stands above it.
        names: Of its lines in the log, and what the legend calls each.
        log: Whether the upright axis is logarithmic.
        lines: Points (images, value) by what the legend says.
    """

    title: str
    names: Mapping[str, str]
    log: bool = False
    lines: dict[str, Line] = field(default_factory=dict)


def panels() -> list[Panel]:
    """What is shown of a log."""
    return [
        Panel(
            "adversarial losses",
            {"loss_generator": "generator", "loss_discriminator": "discriminator"},
        ),
        Panel(
            "distance from the photographs",
            {"perceptual": "perceptual loss", "reconstruction": "reconstruction loss"},
        ),
        Panel(
            "gradients (norm) and R1",
            {
                "gradient_generator": "generator",
                "gradient_discriminator": "discriminator",
                "r1": "R1",
            },
            log=True,
        ),
    ]


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log.

    Raises:
        UserError: If there is no log, or it is empty or damaged.
    """
    try:
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as a log of 'mat-export train'") from error
    if not lines:
        raise UserError(f"'{path}' has no lines: the run is too short to plot")
    return lines


def filled(shown: Sequence[Panel], log: Sequence[Mapping[str, float]]) -> list[Panel]:
    """The panels with their lines; those that the log has nothing for are left out."""
    for panel in shown:
        for name, label in panel.names.items():
            points = [(line["images"], line[name]) for line in log if name in line]
            if points:
                panel.lines[label] = thinned(points)
    return [panel for panel in shown if panel.lines]


def thinned(points: Line) -> Line:
    """Means of neighbours, so that no more points are left than are shown."""
    step = math.ceil(len(points) / POINTS)
    parts = [points[i : i + step] for i in range(0, len(points), step)]
    return [(part[-1][0], statistics.fmean(value for _, value in part)) for part in parts]


def quality_panels(path: Path) -> list[Panel]:
    """What the snapshots' average generators reach on held-out photographs.

    Raises:
        UserError: If the file is no curve.
    """
    try:
        curve = json.loads(path.read_text(encoding="utf-8"))
        titles = {
            "frechet": curve["frechet"],
            "perceptual": "perceptual distance in the hole",
            "psnr": "PSNR in the hole, dB",
        }
        lines = {
            name: [(point["images"], point[name]) for point in curve["points"]] for name in titles
        }
        label = curve["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is no curve that 'quality.py --curve' wrote") from error
    return [
        Panel(f"held out: {title}", {}, lines={label: lines[name]})
        for name, title in titles.items()
    ]


# -- drawing ---------------------------------------------------------------------------------------


def svg(shown: Sequence[Panel]) -> str:
    """The panels in two columns, as one SVG that needs nothing else."""
    rows = math.ceil(len(shown) / 2)
    size = f"{2 * WIDTH} {rows * HEIGHT}"
    font = 'font-size="12" font-family="system-ui, sans-serif" fill="#1c2430"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" {font}>',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    longest = max(x for panel in shown for line in panel.lines.values() for x, _ in line)
    for i, panel in enumerate(shown):
        parts.append(f'<g transform="translate({i % 2 * WIDTH} {i // 2 * HEIGHT})">')
        parts += [_axes(panel, longest), _curves(panel, longest), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _place(panel: Panel, longest: float, x: float, y: float) -> tuple[float, float]:
    """Pixels of a point within its panel."""
    low, high = _range(panel)
    value = _scaled(panel, y)
    across = LEFT + (WIDTH - LEFT - RIGHT) * x / longest
    return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)


def _scaled(panel: Panel, value: float) -> float:
    return math.log10(max(value, 1e-12)) if panel.log else value


def _range(panel: Panel) -> tuple[float, float]:
    """Lowest and highest value of the upright axis, scaled."""
    values = [_scaled(panel, y) for line in panel.lines.values() for _, y in line]
    low, high = min(values), max(values)
    if panel.log:
        return math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers in a range, four to eight of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(f for f in (5, 2, 1) if (high - low) / (f * step) >= 4 or f == 1)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _axes(panel: Panel, longest: float) -> str:
    """Title, legend, grid and numbers."""
    low, high = _range(panel)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<text x="{LEFT}" y="14" font-weight="600">{html.escape(panel.title)}</text>']
    marks = range(int(low), int(high) + 1) if panel.log else _ticks(low, high)
    for mark in marks:
        value = 10.0**mark if panel.log else mark
        y = _place(panel, longest, 0, value)[1]
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d5dae1"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        )
    for images in _ticks(0, longest):
        x = _place(panel, longest, images, 1.0)[0]
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{images / 1e3:g}</text>'
        )
    parts.append(f'<text x="{right}" y="{HEIGHT - 6}" text-anchor="end">thousand images</text>')
    x = LEFT
    for label, colour in zip(panel.lines, COLOURS, strict=False):
        parts.append(
            f'<rect x="{x}" y="20" width="14" height="3" fill="{colour}"/>'
            f'<text x="{x + 18}" y="26" font-size="11">{html.escape(label)}</text>'
        )
        x += 30 + 7 * len(label)
    return "\n".join(parts)


def _curves(panel: Panel, longest: float) -> str:
    parts = []
    for line, colour in zip(panel.lines.values(), COLOURS, strict=False):
        places = (_place(panel, longest, x, y) for x, y in line)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
    return "\n".join(parts)


# -- figures ---------------------------------------------------------------------------------------


def figures(
    run: Path, log: Sequence[Mapping[str, float]], commands: Sequence[str]
) -> dict[str, Any]:
    """What a model card says of the run.

    Raises:
        UserError: If the run has no checkpoint that can be read.
    """
    newest = latest_checkpoint(run / "checkpoints")
    if newest is None:
        raise UserError(f"'{run}' has no checkpoint, which says what its options were")
    try:
        # Mapped, not read: of hundreds of megabytes a few plain values are wanted.
        held = torch.load(newest, map_location="cpu", weights_only=True, mmap=True)
        options, counters = held["options"], held["counters"]
    except Exception as error:  # torch.load raises whatever its readers do
        raise UserError(f"'{newest}' cannot be read as a checkpoint of a run") from error
    images = [line["images"] for line in log]
    spans = [later - earlier for earlier, later in zip([0, *images], images, strict=False)]
    seconds = sum(
        span / line["images_per_second"] for span, line in zip(spans, log, strict=True) if span
    )
    return {
        "commands": list(commands),
        "options": options,
        "counters": counters,
        "hours": seconds / 3600,
        "images_per_second": statistics.median(line["images_per_second"] for line in log),
        "waiting_share": statistics.median(line["waiting_share"] for line in log),
    }


def main(words: Sequence[str] | None = None) -> int:
    """Plot and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .svg to write")
    parser.add_argument("--quality", type=Path, help="what quality.py --curve wrote")
    parser.add_argument("--json", type=Path, help="write the run's settings and figures here")
    parser.add_argument("--command", action="append", default=[], help="that was given, in order")
    arguments = parser.parse_args(words)
    try:
        log = read_log(arguments.run / "log.jsonl")
        shown = filled(panels(), log)
        if arguments.quality is not None:
            shown += quality_panels(arguments.quality)
        atomic_write(arguments.output, svg(shown))
        if arguments.json is not None:
            found = figures(arguments.run, log, arguments.command)
            atomic_write(arguments.json, json.dumps(found, indent=1) + "\n")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
