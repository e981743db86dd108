"""How good is the model that ships? One table on held-out photographs, and the bars it has to meet.

    python benchmarks/quality.py PHOTOGRAPHS -o OUT [--model FILE] [--count 1500] [--answers 4]
        [--device cpu|cuda] [--batch N] [--masks large|small] [--share LOW:HIGH] [--seed 0]
    python benchmarks/quality.py PHOTOGRAPHS -o OUT --curve SNAPSHOT… [--count 500]

Four methods fill the same holes in the same seeded crops: the model, its network with untrained
weights, and OpenCV's two classical methods; below them stand yardsticks, the photograph itself
blurred in the hole. The features are EfficientNet-Lite0's, so that the distance is no FID. OUT is a
folder: ``quality.json`` and ``quality.md`` are written there, and ``rows/`` keeps what was
measured, so that a run that was cut goes on, on another machine too. Exit code 1 if a bar is
missed.

With ``--curve`` the averaged generators of a training run are measured instead (checkpoints of
``mat-export train`` or exports of them, the images they had seen in their names) and ``curve.json``
is written, for ``training_curves.py``.

A crop costs about a second and a half on two cores (four answers) and some 30 ms on a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mat_export.bench import machine
from mat_export.console import note, tracker
from mat_export.contract import UserError
from mat_export.evaluating import EvaluationSet, runner_fill
from mat_export.files import atomic_path, atomic_write, require_folder
from mat_export.runners import TorchRunner, read_checkpoint
from mat_export.shipped import shipped_model
from mat_torch import Checkpoint, random_checkpoint
from mat_torch.evaluation import Array, Fill, answer_seed, measure, opencv_fill
from mat_torch.features import EfficientNetLite0Features, FeatureError
from mat_torch.scores import Evaluation, EvaluationError, Rows, comparison_table, summarise

BLURS = (1.0, 3.0)
"""Of the yardsticks: σ in pixels."""

CHUNK = 64
"""Crops measured between two saves."""

UNTRAINED, TELEA, STOKES = "untrained", "Telea", "Navier-Stokes"


@dataclass(frozen=True)
class Bar:
    """One thing that is asked of the model.

    Attributes:
        what: In words.
        value: What was found.
        limit: What is allowed.
        at_least: Whether `limit` is the least allowed value; else it is the largest.
    """

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def bars(model: Evaluation, untrained: Evaluation, classical: Sequence[Evaluation]) -> list[Bar]:
    """What is asked: nearer to photographs than others by these factors, and not less exact.

    Args:
        model: The one to judge.
        untrained: The same network without training.
        classical: Telea's method, then others.
    """
    asked = [(other, 0.5) for other in classical] + [(untrained, 0.1)]
    found = [
        Bar(
            f"feature distance, as a share of {other.name}'s",
            _distance(model) / _distance(other),
            limit,
        )
        for other, limit in asked
    ]
    telea = classical[0]
    above = model.overall.psnr - telea.overall.psnr
    return [*found, Bar(f"hole PSNR above {telea.name}'s, dB", above, -1.0, at_least=True)]


def _distance(evaluation: Evaluation) -> float:
    """The Fréchet distance, which any two pictures have."""
    assert evaluation.overall.frechet is not None, "there are two crops or more"
    return evaluation.overall.frechet


# -- measuring, and keeping what was measured ------------------------------------------------------


class Bench:
    """The crops, the feature network, and the folder of rows.

    Args:
        arguments: Of the command line.
        resolution: Side of the crops.

    Raises:
        UserError: If the photographs cannot be read, or the folder holds rows of other crops.
    """

    def __init__(self, arguments: argparse.Namespace, resolution: int) -> None:
        self.arguments = arguments
        self.data = EvaluationSet(
            arguments.photographs,
            resolution,
            arguments.count,
            masks=arguments.masks,
            seed=arguments.seed,
            share=arguments.share,
        )
        note(f"cutting {len(self.data)} crops of {len(self.data.photographs)} photographs")
        self.data.hold(arguments.workers)
        self.features = EfficientNetLite0Features.load().to(arguments.device)
        self.rows = arguments.output / "rows"
        require_folder(self.rows)
        self._check_settings()

    def settings(self) -> dict[str, Any]:
        """What all rows have in common."""
        crops = hashlib.sha256()
        for i in range(min(len(self.data), 32)):
            crops.update(self.data.picture(i).tobytes())
            crops.update(self.data.mask(i).tobytes())
        arguments = self.arguments
        return {
            "count": len(self.data),
            "masks": arguments.masks,
            "share": list(arguments.share),
            "seed": arguments.seed,
            "truncation": arguments.truncation,
            "crops": crops.hexdigest(),
            "features": self.features.digest,
        }

    def _check_settings(self) -> None:
        path, settings = self.rows / "settings.json", self.settings()
        if not path.exists():
            atomic_write(path, json.dumps(settings, indent=1) + "\n")
            return
        held = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in settings if held.get(name) != settings[name]]
        if changed:
            raise UserError(
                f"'{self.rows}' holds what was measured with another {' and '.join(changed)}: "
                "name another folder, or remove it"
            )

    def model_fill(self, checkpoint: Checkpoint) -> Fill:
        """A checkpoint in PyTorch, FP32, as a method."""
        runner = TorchRunner(checkpoint, device=self.arguments.device)
        return runner_fill(runner, truncation=self.arguments.truncation)

    def blurred_fill(self, sigma: float) -> Fill:
        """No method: the photograph under the hole, blurred. It says what a distance means."""
        import cv2

        seed = self.arguments.seed
        numbers = {answer_seed(seed, i): i for i in range(len(self.data))}

        def fill(image: Array, _mask: Array, seeds: Sequence[int]) -> Array:
            blurred = np.empty_like(image)
            for i, number in enumerate(numbers[key] for key in seeds):
                for plane, truth in zip(blurred[i], self.data.picture(number), strict=True):
                    cv2.GaussianBlur(truth, (0, 0), sigma, dst=plane)
            return blurred

        return fill

    def measured(
        self,
        name: str,
        fill: Fill,
        answers: int,
        digest: str,
        progress: Callable[[str, int, int], None],
    ) -> Rows:
        """Rows of a method over all crops; those that are kept are taken from their files.

        Args:
            name: The method.
            fill: The method.
            answers: How many of each hole.
            digest: Of its weights, if it has some: part of the files' names.
            progress: Called with the method, crops done and their number.
        """
        parts = []
        stem = f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{digest[:12]}-{answers}"
        for first in range(0, len(self.data), CHUNK):
            progress(name, first, len(self.data))
            path = self.rows / f"{stem}-{first:06}.npz"
            if not path.exists():
                numbers = range(first, min(first + CHUNK, len(self.data)))
                rows = measure(
                    fill,
                    self.data.pictures(numbers),
                    self.data.masks(numbers),
                    self.features,
                    perceptual=self.features,
                    batch=self.arguments.batch,
                    seed=self.arguments.seed,
                    answers=answers,
                    first=first,
                )
                with atomic_path(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, **rows)
            with np.load(path) as held:
                parts.append({key: held[key] for key in held.files})
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def summary(self, name: str, rows: Rows, answers: int) -> Evaluation:
        """The scores of a method."""
        return summarise(
            rows,
            self.features,
            name=name,
            perceptual=self.features,
            seed=self.arguments.seed,
            answers=answers,
        )


# -- the table -------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the four methods: what ``quality.json`` says."""
    checkpoint = read_checkpoint(arguments.model or shipped_model())
    name = checkpoint.config.name
    untrained = random_checkpoint(checkpoint.config, 0)
    bench = Bench(arguments, checkpoint.config.resolution)
    methods: dict[str, tuple[Callable[[], Fill], int, str]] = {
        TELEA: (lambda: opencv_fill("telea"), 1, ""),
        STOKES: (lambda: opencv_fill("navier-stokes"), 1, ""),
        name: (lambda: bench.model_fill(checkpoint), arguments.answers, checkpoint.digest),
        UNTRAINED: (lambda: bench.model_fill(untrained), 1, untrained.digest),
    }
    for sigma in BLURS:
        methods[f"photograph, blurred {sigma:g}"] = (partial(bench.blurred_fill, sigma), 1, "")
    rows, found = {}, {}
    with tracker("quality") as progress:
        for method, (fill, answers, digest) in methods.items():
            rows[method] = bench.measured(method, fill(), answers, digest, progress)
            found[method] = bench.summary(method, rows[method], answers)
        progress("done", len(bench.data), len(bench.data))
    asked = bars(found[name], found[UNTRAINED], [found[TELEA], found[STOKES]])
    yardsticks = [method for method in methods if method not in (name, UNTRAINED, TELEA, STOKES)]
    order = (name, UNTRAINED, TELEA, STOKES, *yardsticks)
    return {
        "model": {"name": name, "digest": checkpoint.digest},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine() | _gpu(arguments.device),
        "settings": bench.settings(),
        "photographs": list(bench.data.photographs),
        "bars": [{**asdict(bar), "passed": bar.passed} for bar in asked],
        "passed": all(bar.passed for bar in asked),
        "methods": [found[method].to_dict() for method in order],
        "crops": {
            key: [round(float(value), 5) for value in rows[name][key]]
            for key in ("hole_ratio", "psnr", "perceptual")
        },
    }


def _gpu(device: str) -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}


def markdown(report: Mapping[str, Any]) -> str:
    """What a report says, as Markdown: the bars, the methods side by side, and by size of hole.

    Raises:
        EvaluationError: If it is no report of `compare`.
    """
    methods = [Evaluation.from_dict(entry) for entry in report["methods"]]
    settings = report["settings"]
    low, high = settings["share"]
    compared = (
        f"{settings['count']} crops of {len(report['photographs'])} held-out photographs "
        f"(side {low:g} to {high:g} of the photograph's shorter one, seed {settings['seed']}), "
        f"{settings['masks']} masks, FP32, ψ = {settings['truncation']:g}. What features are "
        "compared with are the same crops before their holes were cut. "
        f"'{UNTRAINED}' is the same network with random weights (seed 0). Diversity is the mean "
        f"perceptual distance in the hole between {methods[0].answers} answers. The last two are "
        "yardsticks: the photograph itself, blurred in the hole, σ in pixels."
    )
    lines = ["| bar | found | asked | |", "|---|--:|--:|---|"]
    for bar in report["bars"]:
        sign, verdict = "≥" if bar["at_least"] else "≤", "passed" if bar["passed"] else "MISSED"
        lines.append(
            f"| {bar['what']} | {bar['value']:.3f} | {sign} {bar['limit']:g} | {verdict} |"
        )
    return "\n\n".join(
        (
            compared,
            "\n".join(lines),
            comparison_table(methods),
            "By size of the hole:",
            comparison_table(methods, by_bin=True).split("\n\n")[0],
        )
    )


# -- the curve -------------------------------------------------------------------------------------


def curve(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure snapshots of a training run: what ``curve.json`` says."""
    snapshots = sorted((images_of(path), path) for path in arguments.curve)
    first = read_checkpoint(snapshots[0][1])
    bench = Bench(arguments, first.config.resolution)
    points = []
    with tracker("curve") as progress:
        for images, path in snapshots:
            checkpoint = read_checkpoint(path)
            fill = bench.model_fill(checkpoint)
            rows = bench.measured(f"after {images}", fill, 1, checkpoint.digest, progress)
            scores = bench.summary(path.name, rows, 1).overall
            points.append({"images": images, **asdict(scores)})
        progress("done", len(bench.data), len(bench.data))
    return {
        "model": first.config.name,
        "frechet": bench.features.frechet_name,
        "settings": bench.settings(),
        "points": points,
    }


def images_of(path: Path) -> int:
    """How many images a snapshot had seen, by its name.

    Raises:
        UserError: If the name does not say.
    """
    numbers = re.findall(r"\d{3,}", path.stem)
    if not numbers:
        raise UserError(
            f"the name of '{path}' does not say how many images it had seen: call it like "
            "checkpoint-000000200000.pt or ema-200000.safetensors"
        )
    return int(numbers[-1])


# -- the command line ------------------------------------------------------------------------------


def share(text: str) -> tuple[float, float]:
    low, high = (float(part) for part in text.split(":"))
    return low, high


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("photographs", type=Path, help="held-out ones: a folder or a .tar")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("--model", type=Path, help="a checkpoint; by default the shipped model")
    parser.add_argument("--curve", type=Path, nargs="+", metavar="SNAPSHOT")
    parser.add_argument("--count", type=int, help="crops (1500, or 500 for a curve)")
    parser.add_argument("--answers", type=int, default=4, help="of the model, for diversity")
    parser.add_argument("--masks", choices=["large", "small"], default="large")
    parser.add_argument("--share", type=share, default=(0.25, 1.0), metavar="LOW:HIGH")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--truncation", type=float, default=1.0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, help="crops filled at once (8, or 32 on a GPU)")
    parser.add_argument("--workers", type=int, default=2, help="processes that cut crops")
    arguments = parser.parse_args(words)
    arguments.count = arguments.count or (500 if arguments.curve else 1500)
    arguments.batch = arguments.batch or (32 if arguments.device == "cuda" else 8)
    if min(arguments.count, arguments.answers) < 2:
        parser.error("--count and --answers are 2 or more")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Measure, write, and return the exit code."""
    arguments = parsed(words)
    try:
        if arguments.device == "cuda":
            if not torch.cuda.is_available():
                raise UserError("there is no GPU that PyTorch sees: leave out --device cuda")
            torch.backends.cudnn.conv.fp32_precision = "ieee"
        require_folder(arguments.output)
        if arguments.curve:
            path = arguments.output / "curve.json"
            atomic_write(path, json.dumps(curve(arguments), indent=1) + "\n")
            note(f"wrote {path}")
            return 0
        report = compare(arguments)
        page = markdown(report)
        atomic_write(arguments.output / "quality.json", json.dumps(report, indent=1) + "\n")
        atomic_write(arguments.output / "quality.md", page + "\n")
    except (UserError, EvaluationError, FeatureError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
