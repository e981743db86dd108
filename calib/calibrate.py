"""From an FP32 ONNX file to one with INT8 layers: measure, decide, write.

What is measured goes into a record, what is decided into a recipe, and both lie beside the result:
the next call with the same model and pictures takes the record as it is, or goes on where that one
was interrupted, and a recipe replays a decision without a target.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from calib.candidates import Candidate, Candidates, find_candidates
from calib.equalizing import equalize, measure_powers
from calib.histograms import BINS, METHODS
from calib.placement import place
from calib.ranges import Progress, choose_ranges, count_magnitudes
from calib.recipe import Recipe, choose_layers
from calib.record import Record, load_record
from calib.samples import Sample, digest_of, draw_samples, open_pictures
from calib.sensitivity import MOST_DB, Quality, decibel, measure_costs, measure_quality
from calib.stages import StagedModel, open_session
from calib.trials import LayerTrials
from mat_export.contract import CALIBRATION_KEY, GraphSpec, UserError
from mat_export.engine_graph import spec_of
from mat_export.files import atomic_write, file_digest, require_other, require_writable
from mat_export.manifest import manifest_path, save_model
from mat_export.parity import load_onnx
from mat_export.resampling import resample_densely

__all__ = ["Calibration", "CalibrationOptions", "calibrate", "recipe_path", "record_path"]

METHOD = 1
"""Version of how things are measured; a record of another is refused."""

FEWEST_SAMPLES = 6
"""The first so many samples have every stratum and a full hole."""


@dataclass(frozen=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        images: Folder of pictures; None is the built-in set.
        samples: How many samples ranges are counted on.
        checks: On how many other samples methods, costs and the result are measured. They are of
            other pictures where there are enough; of the built-in set, of the same photographs.
        seed: What all samples are drawn from.
        target_db: What the mean PSNR in the hole has to reach against FP32.
        filters: Resampling filters and skips may be INT8 too.
        threads: CPU threads, ONNX Runtime's choice if None. Another number may give other last
            digits, and so other bytes (`calib.record`).

    Raises:
        UserError: If there are too few samples, or the seed is none.
    """

    images: Path | None = None
    samples: int = 16
    checks: int = 6
    seed: int = 0
    target_db: float = 35.0
    filters: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "checks"):
            if getattr(self, name) < FEWEST_SAMPLES:
                raise UserError(
                    f"calibration needs {FEWEST_SAMPLES} {name} or more, got {getattr(self, name)}"
                )
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"a seed is a whole number from 0 to 2**32 - 1, got {self.seed}")
        if not 0.0 <= self.target_db <= MOST_DB:
            raise UserError(f"a target is from 0 to {MOST_DB:g} dB, got {self.target_db:g}")


@dataclass(frozen=True)
class Calibration:
    """What was measured, decided and written.

    Attributes:
        candidates: What could be INT8.
        record: The measurements.
        recipe: The decision.
        quality: Of the result, on the check samples.
        equalized: Layers whose input's channels were equalized.
        reused: Whether the record was there already.
    """

    candidates: Candidates
    record: Record
    recipe: Recipe
    quality: Quality
    equalized: int
    reused: bool

    @property
    def share(self) -> float:
        """Which share of the convolutions' operations is in INT8."""
        return self.candidates.share(frozenset(self.recipe.layers))

    def to_dict(self) -> dict[str, Any]:
        """Figures of the result and of each layer, for JSON."""
        chosen = set(self.recipe.layers)
        return {
            "mean_db": self.quality.mean_db,
            "worst_db": self.quality.worst_db,
            "target_db": self.recipe.target_db,
            "int8_layers": len(chosen),
            "int8_share": self.share,
            "equalized": self.equalized,
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "int8": layer.name in chosen,
                    "noise": self.record.costs.get(layer.name, ()),
                    "flop": layer.flop,
                    "gain": layer.gain,
                    "scale": self.record.ranges[layer.tensor].scale,
                    "range": self.record.ranges[layer.tensor].method,
                }
                for layer in self.candidates.all
            ],
        }

    def rows(self) -> list[list[str]]:
        """A table of layers under COLUMNS, the costliest first; a replay measures no costs."""
        chosen = set(self.recipe.layers)

        def cost(layer: Candidate) -> float:
            noises = self.record.costs.get(layer.name, ())
            return sum(noises) / max(len(noises), 1)

        return [
            [
                layer.name,
                layer.kind,
                "INT8" if layer.name in chosen else "half",
                f"{decibel(cost(layer)):.1f}" if self.record.costs else "–",
                f"{100.0 * layer.flop / self.candidates.flop:.1f}",
                f"{100.0 * layer.gain:.2f}",
                self.record.ranges[layer.tensor].method,
            ]
            for layer in sorted(self.candidates.all, key=cost, reverse=True)
        ]


COLUMNS = ("layer", "kind", "type", "alone, dB", "work %", "saved %", "range")
"""Headings of ``Calibration.rows``: PSNR in the hole when the layer alone is INT8, its share of the
convolutions' operations, and how much of their least time INT8 saves there."""


def record_path(output: str | os.PathLike[str]) -> Path:
    """Where the record of a calibrated file lies, unless it is named."""
    return Path(output).with_suffix(".calibration.json")


def recipe_path(output: str | os.PathLike[str]) -> Path:
    """Where the recipe of a calibrated file lies."""
    return Path(output).with_suffix(".recipe.json")


def calibrate(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: CalibrationOptions,
    *,
    record: str | os.PathLike[str] | None = None,
    recipe: str | os.PathLike[str] | None = None,
    progress: Progress = lambda name, done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Write the INT8 form of a model, its manifest, its record and its recipe.

    Args:
        model: A file of ``mat-export onnx``, in FP32. Ranges are those of the native size.
        output: The ONNX file to write.
        options: How to calibrate.
        record: The record to take, or to write; by default beside the output.
        recipe: A decision to replay, whatever it costs; with `filters` if it was made with them.
        progress: Called on the way.
        note: Called with sentences for the user.

    Raises:
        UserError: If the model, the pictures, the record or the recipe will not do, no layer meets
            the target, or something cannot be written.
    """
    record = record_path(output) if record is None else record
    _require_other_recipe(output, recipe)
    for path in (output, manifest_path(output), record, recipe_path(output)):
        require_other(path, model, manifest_path(model), recipe)
        require_writable(path)
    loaded = load_onnx(model)
    spec = _require_fp32(loaded, model)
    replayed = None if recipe is None else Recipe.from_file(recipe, spec.config.name)
    if replayed is not None:
        options = replace(options, filters=options.filters or replayed.filters)
    work = _Work.of(loaded, spec, options, progress, note)
    if replayed is not None:
        for name in replayed.layers:
            work.candidates.named(name)  # an unknown one is the first thing to hear of
    key = work.key(file_digest(model))
    found = load_record(record, key)
    if found is not None:
        note(f"took the record {record}")
        measured = found
    else:
        measured = work.measure(key)
        measured.save(record)
    exact, equalized = equalize(work.model, work.candidates.all, measured.powers)
    if replayed is None:
        for more in work.costs(exact, measured):
            more.save(record)  # so that an interruption loses no more than a sample
            measured = more
    if measured is not found:
        note(f"wrote the record {record}")
    layers, quality = work.decide(exact, measured, replayed)
    decision = Recipe(
        spec.config.name,
        tuple(c.name for c in work.candidates.all if c.name in layers),
        None if replayed is not None else options.target_db,
        options.filters,
    )
    result = Calibration(work.candidates, measured, decision, quality, equalized, found is not None)
    facts = {
        "record": {"path": Path(record).name, "sha256": file_digest(record)},
        "layers": len(layers),
        "share": result.share,
        "target_db": decision.target_db,
        "mean_db": quality.mean_db,
        "worst_db": quality.worst_db,
    }
    quantized = place(exact, [c for c in work.candidates.all if c.name in layers], measured.scales)
    written = spec.with_changes(precision="int8")
    written.write_to(quantized)
    quantized.metadata_props.add(key=CALIBRATION_KEY, value=json.dumps(facts, sort_keys=True))
    source = {"path": Path(model).name, "sha256": file_digest(model)}
    save_model(quantized, output, {"graph": written, "onnx": source, "calibration": facts})
    atomic_write(recipe_path(output), decision.to_json())
    return result


def _require_other_recipe(
    output: str | os.PathLike[str], recipe: str | os.PathLike[str] | None
) -> None:
    """Raise UserError if the output's recipe would replace the one to replay."""
    try:
        require_other(recipe_path(output), recipe)
    except UserError as error:
        raise UserError(
            f"'{recipe}' is where the recipe of '{output}' is written: name another output with -o"
        ) from error


def _require_fp32(model: onnx.ModelProto, path: str | os.PathLike[str]) -> GraphSpec:
    """The contract of a model that can be calibrated.

    Raises:
        UserError: If it is not ours or in another precision.
    """
    spec = spec_of(model, f"'{path}'")
    if spec.precision == "int8":
        raise UserError(f"'{path}' is quantized already: start from the FP32 file")
    if spec.precision != "fp32":
        raise UserError(f"'{path}' is in {spec.precision} already: start from the FP32 file")
    return spec


@dataclass(frozen=True)
class _Work:
    """What measuring takes.

    Attributes:
        model: The FP32 graph, resampling said densely.
        candidates: What of it may be INT8.
        options: How to calibrate.
        source: Where pictures come from.
        counted: Samples that ranges are counted on.
        checks: Other samples, all with a hole.
        progress: Called on the way.
    """

    model: onnx.ModelProto
    candidates: Candidates
    options: CalibrationOptions
    source: str
    counted: Sequence[Sample]
    checks: Sequence[Sample]
    progress: Progress

    @classmethod
    def of(
        cls,
        model: onnx.ModelProto,
        spec: GraphSpec,
        options: CalibrationOptions,
        progress: Progress,
        note: Callable[[str], None],
    ) -> _Work:
        """Draw the samples for a model."""
        front = open_pictures(options.images, spec.config.resolution, options.seed)
        back = front.backwards()
        counted = draw_samples(spec, front, options.samples, 2 * options.seed)
        checks = draw_samples(spec, back, options.checks, 2 * options.seed + 1)
        for reason in dict.fromkeys([*front.passed_over, *back.passed_over]):
            note(f"passed over: {reason}")
        shared = {*front.first(options.samples)} & {*back.first(options.checks)}
        if shared and options.images is not None:
            note(
                f"{len(shared)} pictures are in the samples and the checks: with "
                f"{options.samples + options.checks} pictures or more none is"
            )
        dense, _ = resample_densely(model)
        return cls(
            model=dense,
            candidates=find_candidates(dense, spec, filters=options.filters),
            options=options,
            source=front.source,
            counted=counted,
            checks=[sample for sample in checks if sample.hole.any()],
            progress=progress,
        )

    def key(self, model_digest: str) -> dict[str, Any]:
        """What a record of this work is of."""
        return {
            "model": model_digest,
            "pictures": self.source,
            "seed": self.options.seed,
            "samples": {"count": len(self.counted), "sha256": digest_of(self.counted)},
            "checks": {"count": len(self.checks), "sha256": digest_of(self.checks)},
            "filters": self.options.filters,
            "method": {"version": METHOD, "bins": BINS, "ranges": list(METHODS)},
        }

    def measure(self, key: Mapping[str, Any]) -> Record:
        """Equalize channels and find ranges."""
        threads, progress = self.options.threads, self.progress
        staged = StagedModel(self.model, self.candidates.all, threads)
        powers = measure_powers(staged, self.counted[:FEWEST_SAMPLES], progress)
        model, _ = equalize(self.model, self.candidates.all, powers)
        staged = StagedModel(model, self.candidates.all, threads)
        trials = LayerTrials(model, threads)
        histograms = count_magnitudes(staged, self.counted, progress)
        ranges = choose_ranges(histograms, staged, trials, self.checks, progress)
        return Record(key, powers, ranges, {})

    def costs(self, model: onnx.ModelProto, record: Record) -> Iterator[Record]:
        """The record with what each layer of the equalized model costs in one more sample, until
        it has all of them."""
        done, total = record.samples_done(c.name for c in self.candidates.all), len(self.checks)
        if done >= total:
            return
        staged = StagedModel(model, self.candidates.all, self.options.threads)
        trials = LayerTrials(model, self.options.threads)
        for i in range(done, total):

            def progress(layer: str, i: int = i) -> None:
                self.progress(f"costs in sample {i + 1}, {layer}", i, total)

            noises = measure_costs(staged, trials, record.ranges, self.checks[i], progress)
            record = record.with_costs(i, noises)
            yield record

    def decide(
        self, model: onnx.ModelProto, record: Record, replayed: Recipe | None
    ) -> tuple[frozenset[str], Quality]:
        """The INT8 layers of the equalized model, and what they give on the check samples."""
        session = open_session(model, self.options.threads)
        expected = [session.run(["output"], dict(s.feeds))[0] for s in self.checks]
        tries = 0

        def quality(names: frozenset[str]) -> Quality:
            nonlocal tries
            tries += 1
            self.progress(f"measuring {len(names)} layers", tries - 1, tries)
            layers = [c for c in self.candidates.all if c.name in names]
            tried = place(model, layers, record.scales, fold=True)
            return measure_quality(tried, expected, self.checks, self.options.threads)

        if replayed is not None:
            layers = frozenset(replayed.layers)
            return layers, quality(layers)
        return choose_layers(self.candidates, record.costs, self.options.target_db, quality)
