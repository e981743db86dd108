"""FP32, TF32, BF16, FP16 and INT8 of one model, side by side, and the page that tells of them.

    python benchmarks/precision.py measure REFERENCE.onnx FORM… -o FIGURES.json
        [--photographs FOLDER] [--count 100] [--runs 50] [--pictures docs/precision]
    python benchmarks/precision.py page [--figures FILE] [--layers FILE] [--pictures FILE]

A FORM is ``NAME=FILE`` with an engine or ONNX file; or ``fp16`` or ``bf16`` alone, which is typed
here from the reference, for a machine without a GPU.
REFERENCE is the FP32 file of ``mat-export onnx``, and the first form. Measured of each: bytes,
PSNR in the hole over the suite of hard masks, with ``--runs`` the latency (of all in turns; it says
little of half precision on a CPU, which has none), and with ``--photographs`` the feature distance
between fillings and photographs. The same hole filled by each is drawn into ``--pictures``.

``page`` writes the sections of ``docs/precision.md`` anew from such files; ``--layers`` is what
``mat-export calibrate --json`` wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from model_card import ROOT, inside, rendered
from PIL import Image

from mat_export.bench import bench, machine
from mat_export.console import note, tracker
from mat_export.contract import UserError
from mat_export.engine_graph import prepare_engine_graph
from mat_export.evaluating import EvaluationSet, evaluate_all, runner_fill
from mat_export.files import atomic_write, file_digest, require_folder, require_writable
from mat_export.images import write_image
from mat_export.parity import ParityReport, check_parity, open_candidate
from mat_export.precision import PRECISIONS
from mat_export.report import picture_of, with_grey_hole
from mat_export.suite import cases

PAGE = ROOT / "docs" / "precision.md"

SHOWN = "random-large"
"""The case whose fillings are drawn."""

OPSETS = {"fp16": 20, "bf16": 22}
"""Of the graphs that are typed here."""


def measure(
    reference: Path,
    forms: Mapping[str, Path],
    *,
    photographs: Path | None = None,
    count: int = 100,
    runs: int = 0,
    pictures: Path | None = None,
) -> dict[str, Any]:
    """The figures of every form.

    Args:
        reference: The FP32 file.
        forms: Files by name, the reference not among them.
        photographs: Folder of photographs for the feature distance.
        count: Crops of them.
        runs: Timed runs of each form.
        pictures: Folder to draw fillings of one hole into.

    Raises:
        UserError: If a file cannot be opened or run, or is of other weights.
    """
    files = {"fp32": reference, **forms}
    entries: dict[str, dict[str, Any]] = {
        name: {"file": path.name, "bytes": path.stat().st_size, "sha256": file_digest(path)}
        for name, path in files.items()
    }
    with open_candidate(reference) as held:
        side, digest = held.spec.config.resolution, held.spec.checkpoint
        suite = list(cases(side, side))
        for name, path in forms.items():
            with open_candidate(path) as judged, tracker(f"parity of {name}") as progress:
                if judged.spec.checkpoint != digest:
                    raise UserError(f"'{path}' is of other weights than '{reference}'")
                report = check_parity(
                    judged, held, suite=suite, progress=progress, keep_pictures=True
                )
            entries[name] |= {"runner": report.candidate, **_quality(report)}
            if pictures is not None:
                _draw(report, name, pictures)
        entries["fp32"]["runner"] = held.name
    if runs:
        with tracker("bench") as progress:
            timed = bench(list(files.values()), runs=runs, progress=progress)
        for entry, timing in zip(entries.values(), timed.models, strict=True):
            entry |= {"p50_ms": timing.p50, "p99_ms": timing.p99, "batch": timing.batch}
    if photographs is not None:
        for name, distance in _distances(files, photographs, side, count).items():
            entries[name] |= distance
    return {
        "date": datetime.now(timezone.utc).isoformat(),
        "machine": machine(),
        "checkpoint": digest,
        "network": held.spec.config.name,
        "crops": count if photographs is not None else None,
        "runs": runs or None,
        "forms": entries,
        "pictures": None if pictures is None else _inside_docs(pictures),
    }


def _quality(report: ParityReport) -> dict[str, Any]:
    """What a parity check says of the hole."""
    values = {case.name: case.hole.psnr for case in report.cases if case.hole.psnr is not None}
    worst = min(values, key=values.__getitem__)
    return {
        "hole_db_mean": float(np.mean(list(values.values()))),
        "hole_db_worst": values[worst],
        "worst_case": worst,
        "masks_equal": all(not case.wrong_masks for case in report.cases if case.masks),
        "passed": report.passed,
        "bar": str(report.bar),
    }


def _distances(
    files: Mapping[str, Path], photographs: Path, side: int, count: int
) -> dict[str, dict[str, Any]]:
    """Feature distance of each form's fillings from the photographs."""
    crops = EvaluationSet(photographs, side, count)
    found = {}
    for name, path in files.items():
        with open_candidate(path) as runner, tracker(f"features of {name}") as progress:
            fill = {name: runner_fill(runner)}
            (result,) = evaluate_all(fill, crops, progress=progress)
        found[name] = {
            "feature_distance": result.overall.frechet,
            "feature_distance_of": result.frechet_name,
        }
    return found


def _draw(report: ParityReport, name: str, folder: Path) -> None:
    """The shown case: photograph, reference and this form."""
    case, expected, actual = report.pictures[SHOWN]
    pixels = {"hole": with_grey_hole(case), "fp32": picture_of(expected), name: picture_of(actual)}
    for own, values in pixels.items():
        write_image(Image.fromarray(values), folder / f"{own}.png")


def _inside_docs(folder: Path) -> str:
    return folder.resolve().relative_to(PAGE.parent).as_posix()


# -- the page --------------------------------------------------------------------------------------


def figures(report: Mapping[str, Any]) -> str:
    """Every form in a row."""
    where = report["machine"].get("gpu") or report["machine"]["cpu"]
    forms = report["forms"]
    base = forms["fp32"]
    head = f"{report['network']}, weights {report['checkpoint'][:12]}"
    lines = [
        f"{head}, measured {report['date'][:10]} on {where}.",
        "",
        "| | MB | latency p50 (p99), ms | hole, dB: mean (worst) | masks | feature distance |",
        "|---|--:|--:|--:|---|--:|",
    ]
    for name, form in forms.items():
        quality = "the reference"
        if "hole_db_mean" in form:
            quality = f"{form['hole_db_mean']:.1f} ({form['hole_db_worst']:.1f})"
        latency = f"{form['p50_ms']:.2f} ({form['p99_ms']:.2f})" if "p50_ms" in form else "–"
        masks = {True: "equal", False: "differ", None: ""}[form.get("masks_equal")]
        distance = form.get("feature_distance")
        features = "–" if distance is None else f"{distance:.2f}"
        if distance is not None and form is not base:
            features += f" ({100.0 * (distance / base['feature_distance'] - 1.0):+.1f} %)"
        cells = (name.upper(), f"{form['bytes'] / 1e6:.1f}", latency, quality, masks, features)
        lines.append("| " + " | ".join(cells) + " |")
    runners = sorted({form["runner"] for form in forms.values() if "runner" in form})
    notes = [f"Run by {'; '.join(runners)}."]
    if report["crops"] is not None:
        what = base["feature_distance_of"]
        notes.append(f"Feature distance: {what}, {report['crops']} crops, large masks.")
    return "\n".join([*lines, "", " ".join(notes)])


def layers(report: Mapping[str, Any]) -> str:
    """What each layer costs, the dearest first, of `mat-export calibrate --json`."""
    head = (
        f"{report['int8_layers']} of {len(report['layers'])} layers in INT8, "
        f"{100.0 * report['int8_share']:.0f} % of the convolutions' work; target "
        f"{report['target_db']:g} dB, measured {report['mean_db']:.1f} dB "
        f"(worst {report['worst_db']:.1f})."
    )
    lines = [
        head,
        "",
        "| layer | type | alone, dB | range |",
        "|---|---|--:|---|",
    ]

    def cost(layer: Mapping[str, Any]) -> float:
        return float(np.mean(layer["noise"]))

    for layer in sorted(report["layers"], key=cost, reverse=True):
        alone = f"{-10.0 * np.log10(cost(layer)):.1f}" if cost(layer) else "∞"
        kind = "INT8" if layer["int8"] else "half"
        lines.append(f"| `{layer['name']}` | {kind} | {alone} | {layer['range']} |")
    return "\n".join(lines)


def pictures(report: Mapping[str, Any]) -> str:
    """The same hole filled by every form."""
    names = ["hole", *report["forms"]]
    shown = [f"![{name}]({report['pictures']}/{name}.png)" for name in names]
    return "\n".join(
        [
            "| " + " | ".join(name if name == "hole" else name.upper() for name in names) + " |",
            "|" + "---|" * len(names),
            "| " + " | ".join(shown) + " |",
        ]
    )


SECTIONS = {"figures": figures, "layers": layers, "pictures": pictures}


# -- the command -----------------------------------------------------------------------------------


def _forms(words: Sequence[str], reference: Path, folder: Path) -> dict[str, Path]:
    """Files by name; those of a name alone are written into a folder."""
    result = {}
    for word in words:
        name, _, file = word.partition("=")
        if not file and name not in OPSETS:
            raise UserError(
                f"a form is NAME=FILE, or one of {', '.join(OPSETS)} alone, got '{word}'"
            )
        if name not in (*PRECISIONS, "tf32"):
            raise UserError(f"a form is one of tf32, {', '.join(PRECISIONS)}, got '{name}'")
        result[name] = Path(file) if file else folder / f"{name}.onnx"
        if not file:
            note(f"typing {name}")
            onnx.save(prepare_engine_graph(reference, name, opset=OPSETS[name]).model, result[name])
        elif not result[name].is_file():
            raise UserError(f"there is no file '{file}'")
    return result


def _measure(arguments: argparse.Namespace) -> None:
    require_writable(arguments.output)
    if arguments.pictures is not None:
        require_folder(arguments.pictures)
    with tempfile.TemporaryDirectory() as folder:
        forms = _forms(arguments.forms, arguments.reference, Path(folder))
        report = measure(
            arguments.reference,
            forms,
            photographs=arguments.photographs,
            count=arguments.count,
            runs=arguments.runs,
            pictures=arguments.pictures,
        )
    atomic_write(arguments.output, json.dumps(report, indent=2) + "\n")
    note(f"wrote {arguments.output}")


def _page(arguments: argparse.Namespace) -> None:
    given = {name: getattr(arguments, name) for name in SECTIONS}
    files = {name: inside(path) for name, path in given.items() if path is not None}
    atomic_write(PAGE, rendered(PAGE.read_text(encoding="utf-8"), files, SECTIONS))
    note(f"wrote {PAGE.relative_to(ROOT)}")


def main(words: Sequence[str] | None = None) -> int:
    """Measure, or write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("reference", type=Path)
    measuring.add_argument("forms", nargs="+")
    measuring.add_argument("-o", "--output", type=Path, required=True)
    measuring.add_argument("--photographs", type=Path)
    measuring.add_argument("--count", type=int, default=100)
    measuring.add_argument("--runs", type=int, default=0)
    measuring.add_argument("--pictures", type=Path)
    writing = commands.add_parser("page")
    for name in SECTIONS:
        writing.add_argument(f"--{name}", type=Path)
    arguments = parser.parse_args(words)
    try:
        _measure(arguments) if arguments.command == "measure" else _page(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
