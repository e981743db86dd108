"""One self-contained HTML page of a parity check: the pictures side by side, the errors plotted.

Its parts (`STYLE`, `figure`, `picture_of`) serve other pages too.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mat_export.files import atomic_write, require_folder
from mat_export.parity import CaseResult, ParityReport, RegionError
from mat_export.suite import Case

__all__ = ["STYLE", "figure", "picture_of", "render", "with_grey_hole", "write_report"]

_SHOWN = 256
"""Largest side of a picture on the page, in pixels."""


def write_report(report: ParityReport, folder: str | os.PathLike[str]) -> Path:
    """Write ``index.html`` and ``parity.json`` into a folder, which is made if there is none.

    Raises:
        UserError: If it cannot be written.
    """
    target = Path(folder)
    require_folder(target)
    atomic_write(target / "parity.json", report.to_json())
    atomic_write(target / "index.html", render(report))
    return target / "index.html"


def render(report: ParityReport) -> str:
    """The page as text."""
    verdict = "passed" if report.passed else "failed"
    rows = "".join(_row(case) for case in report.cases)
    pictures = "".join(_pictures(report, case) for case in report.cases)
    return _PAGE.format(
        style=STYLE,
        verdict=verdict,
        candidate=html.escape(report.candidate),
        reference=html.escape(report.reference),
        precision=html.escape(report.precision),
        bar=html.escape(str(report.bar)),
        unchecked=_unchecked(report),
        rows=rows,
        plot=_plot(report),
        pictures=pictures,
    )


def _unchecked(report: ParityReport) -> str:
    """What the verdict does not cover, or nothing."""
    if not report.unchecked:
        return ""
    return f'<p class="failed">Not checked: {html.escape("; ".join(report.unchecked))}.</p>'


def _row(case: CaseResult) -> str:
    cells = [
        html.escape(case.name),
        *(_figure(error, name) for error in (case.hole, case.ring) for name in _FIGURES),
        "equal" if case.kept_exact else "differ",
        case.masks_in_words,
        "passed" if case.passed else html.escape("; ".join(case.failures)),
    ]
    kind = "good" if case.passed else "bad"
    return f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


_FIGURES = ("relative", "largest", "psnr")


def _figure(error: RegionError, name: str) -> str:
    value = getattr(error, name)
    if value is None:
        return "–"
    if name == "psnr":
        return "∞" if math.isinf(value) else f"{value:.1f}"
    return f"{value:.1e}"


# -- plot -------------------------------------------------------------------------------------


def _plot(report: ParityReport) -> str:
    """Relative errors of hole and ring on a logarithmic axis, one line a case, as SVG."""
    shown = [case for case in report.cases if case.hole.pixels]
    low, high = -8.0, 0.0
    left, width, step = 190, 520, 24
    height = step * len(shown) + 50

    def x(value: float | None) -> float:
        exponent = low if not value else math.log10(value) if math.isfinite(value) else high
        return left + width * (min(max(exponent, low), high) - low) / (high - low)

    label = "Relative error of each case"
    parts = [f'<svg viewBox="0 0 {left + width + 30} {height}" role="img" aria-label="{label}">']
    for exponent in range(int(low), int(high) + 1, 2):
        at = x(10.0**exponent)
        parts.append(
            f'<line class="grid" x1="{at}" x2="{at}" y1="10" y2="{height - 34}"/>'
            f'<text x="{at}" y="{height - 16}" text-anchor="middle">10<tspan dy="-5" '
            f'font-size="9">{exponent}</tspan></text>'
        )
    if report.bar.relative is not None:
        at = x(report.bar.relative)
        parts.append(
            f'<line class="bar" x1="{at}" x2="{at}" y1="10" y2="{height - 34}">'
            f"<title>bar: {report.bar.relative:g}</title></line>"
        )
    for i, case in enumerate(shown):
        y = 22 + step * i
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{case.name}</text>')
        for error, kind in ((case.ring, "ring"), (case.hole, "hole")):
            if error.pixels:
                title = f"{kind}: {_figure(error, 'relative')}"
                parts.append(
                    f'<circle class="{kind}" cx="{x(error.relative):.1f}" cy="{y}" r="5">'
                    f"<title>{title}</title></circle>"
                )
    parts.append("</svg>")
    return "".join(parts)


# -- pictures ---------------------------------------------------------------------------------


def _pictures(report: ParityReport, case: CaseResult) -> str:
    """Input with its hole, reference, candidate and amplified difference of one case."""
    if case.name not in report.pictures:
        return ""
    source, expected, actual = report.pictures[case.name]
    difference = np.abs(actual.astype(np.float64) - expected)
    finite = difference[np.isfinite(difference)]
    largest = float(finite.max()) if finite.size else 0.0
    gain = 1.0 / largest if largest > 0 else 1.0
    amplified = np.nan_to_num(difference * gain, nan=1.0, posinf=1.0) * 2.0 - 1.0
    figures = (
        figure("input, its hole grey", with_grey_hole(source)),
        figure("reference", picture_of(expected)),
        figure("candidate", picture_of(actual)),
        figure(f"difference ×{gain:.2g}" if largest else "difference: none", picture_of(amplified)),
    )
    cells = "".join(figures)
    return f"<h3>{html.escape(case.name)}</h3><div class='row'>{cells}</div>\n"


_HOLE_GREY = np.uint8(128)


def with_grey_hole(case: Case) -> NDArray[np.uint8]:
    """A case's photograph [H, W, 3], its hole in grey."""
    shown: NDArray[np.uint8] = np.where(case.keep[..., None], case.image, _HOLE_GREY)
    return shown


def figure(caption: str, pixels: NDArray[np.uint8]) -> str:
    """A picture [H, W, 3] and what is written under it, as HTML; the caption is plain text."""
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="{_data_uri(pixels)}"><figcaption>{text}</figcaption>'
        "</figure>"
    )


def picture_of(x: NDArray[Any]) -> NDArray[np.uint8]:
    """[3, H, W] in [-1, 1] → [H, W, 3] uint8; what is not finite is a black and white check."""
    bad = ~np.isfinite(x).all(axis=0)
    values = np.clip(np.nan_to_num(x, posinf=1.0, neginf=-1.0) * 127.5 + 127.5, 0, 255)
    pixels: NDArray[np.uint8] = np.rint(values).astype(np.uint8).transpose(1, 2, 0).copy()
    rows, columns = np.indices(bad.shape) // 8
    pixels[bad] = np.where((rows + columns) % 2, 255, 0)[bad][:, None]
    return pixels


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((_SHOWN, _SHOWN))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


STYLE = """:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --line: #d5dae1;
  --good: #157347; --bad: #b42318; --hole: #1d4ed8; --ring: #d97706; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --paper: #14181e; --line: #38414d;
  --good: #4ade80; --bad: #f87171; --hole: #7aa2ff; --ring: #fbbf24; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
.passed { color: var(--good); } .failed { color: var(--bad); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, td:last-child, th:last-child { text-align: left; }
tr.good td:last-child { color: var(--good); } tr.bad td:last-child { color: var(--bad); }
.scroll { overflow-x: auto; }
svg { width: 100%; max-width: 760px; } svg text { fill: var(--ink); font-size: 12px; }
.grid { stroke: var(--line); } .bar { stroke: var(--bad); stroke-dasharray: 5 4; }
 .hole { fill: var(--hole); } .ring { fill: var(--ring); }
.row { display: grid; grid-template-columns: repeat(4, 1fr); gap: .6rem; }
figure { margin: 0; } img { width: 100%; image-rendering: auto; }
figcaption { font-size: 13px; } .key b { font-size: 18px; }
"""
"""The style sheet of our pages, for light and dark screens."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Parity: {verdict}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
{style}</style></head><body>
<h1>Parity <span class="{verdict}">{verdict}</span></h1>
<p>Candidate: {candidate} ({precision}). Reference: {reference}.<br>
Bar in the hole and in the ring of 8 pixels around its edge: {bar}. Kept pixels and every
mask that reaches the output must be equal.</p>
{unchecked}
<div class="scroll"><table>
<thead><tr><th rowspan="2">case</th><th colspan="3">hole</th><th colspan="3">ring</th>
<th rowspan="2">kept</th><th rowspan="2">masks equal</th><th rowspan="2">verdict</th></tr>
<tr><th>relative</th><th>largest</th><th>PSNR dB</th><th>relative</th><th>largest</th>
<th>PSNR dB</th></tr></thead>
<tbody>
{rows}</tbody></table></div>
<h2>Relative error of each case</h2>
<p class="key"><svg viewBox="0 0 14 14" style="width:14px"><circle class="hole" cx="7" cy="7"
r="5"/></svg> hole &nbsp; <svg viewBox="0 0 14 14" style="width:14px"><circle class="ring" cx="7"
cy="7" r="5"/></svg> ring. The dashed line is the bar.
Errors below 10⁻⁸, and equality, stand at the left edge.</p>
{plot}
<h2>Pictures</h2>
<p>The difference is scaled so that its largest value is white; its factor is below it. What is
not finite shows as a check of black and white.</p>
{pictures}</body></html>
"""
