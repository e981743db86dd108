"""Is the candidate the same picture as the reference? Measured where it matters.

Compositing hides errors: kept pixels are equal by construction. So errors count inside the hole and
in a ring around its edge, the masks of every layer are compared exactly, and the cases are hard
masks on real photographs.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mat_export import shipped
from mat_export.contract import STATE_PREFIX, GraphSpec, UserError, mask_state_names
from mat_export.files import file_digest
from mat_export.openers import opener_of
from mat_export.pixels import from_unit, to_unit
from mat_export.recording import SUFFIX, RecordedRunner, RecordingRunner
from mat_export.runners import OrtRunner, Runner, TorchRunner, open_runner, read_checkpoint
from mat_export.suite import Case, cases
from mat_torch.sampling import draw

__all__ = [
    "BARS",
    "EIGHT_BIT_BAR",
    "RING",
    "Bar",
    "CaseResult",
    "ParityReport",
    "RegionError",
    "bar_of",
    "check_parity",
    "compare",
    "load_onnx",
    "open_candidate",
    "open_reference",
    "with_mask_states",
]

Array = NDArray[Any]

RING = 8
"""Width of the ring around the hole's edge, in pixels to either side."""


@dataclass(frozen=True)
class Bar:
    """What a candidate of one precision must reach in the hole and in the ring.

    Attributes:
        relative: Largest ‖c − r‖₂ / ‖r‖₂, or None.
        psnr: Least peak signal-to-noise ratio in dB, or None.
        largest: Largest |c − r| of any value, or None.
    """

    relative: float | None = None
    psnr: float | None = None
    largest: float | None = None

    def __str__(self) -> str:
        parts = {
            "relative error ≤ {:g}": self.relative,
            "PSNR ≥ {:g} dB": self.psnr,
            "no value off by more than {:.4f}": self.largest,
        }
        return ", ".join(text.format(v) for text, v in parts.items() if v is not None)


BARS: dict[str, Bar] = {
    "fp32": Bar(relative=1e-4),
    "tf32": Bar(relative=1e-3),
    "bf16": Bar(psnr=30.0),
    "fp16": Bar(psnr=45.0),
    "int8": Bar(psnr=30.0),
}
"""The bar of each precision."""

EIGHT_BIT_BAR = Bar(psnr=70.0, largest=1.001 / 127.5)
"""The FP32 bar of a graph that gives bytes: rounding turns the smallest difference into one level,
so what counts is that no value is off by more, and that fewer than 1 in 150 are off at all."""


def bar_of(spec: GraphSpec) -> Bar:
    """The bar for a candidate.

    Raises:
        UserError: If its precision has none.
    """
    if spec.precision not in BARS:
        raise UserError(
            f"there is no bar for precision '{spec.precision}', only for {', '.join(BARS)}"
        )
    if spec.io == "uint8" and spec.precision in ("fp32", "tf32"):
        return EIGHT_BIT_BAR
    return BARS[spec.precision]


@dataclass(frozen=True)
class RegionError:
    """Error over one region of an image.

    Attributes:
        pixels: How many pixels the region has; the figures are None where it has none.
        relative: ‖c − r‖₂ / ‖r‖₂.
        largest: max |c − r|.
        psnr: 10·log₁₀(range² / mean squared error) in dB, infinite for equality.
    """

    pixels: int
    relative: float | None
    largest: float | None
    psnr: float | None


@dataclass(frozen=True)
class CaseResult:
    """What came of one case.

    Attributes:
        name: The case.
        hole: Error inside the hole.
        ring: Error within RING pixels of the hole's edge, on both sides.
        kept_exact: Whether kept pixels are equal to the last bit.
        finite: Whether the candidate gave no NaN and no infinity.
        masks: Number of mask states compared; 0 means that they were not checked.
        wrong_masks: Those that differ or are missing, by layer.
        failures: Why the case failed, in words; empty if it passed.
    """

    name: str
    hole: RegionError
    ring: RegionError
    kept_exact: bool
    finite: bool
    masks: int
    wrong_masks: tuple[str, ...]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def masks_in_words(self) -> str:
        """How many mask states are equal, or that they were not checked, for a table."""
        if not self.masks:
            return "not checked"
        return f"{self.masks - len(self.wrong_masks)} of {self.masks}"


@dataclass(frozen=True)
class ParityReport:
    """The verdict on a candidate, with its evidence.

    Attributes:
        candidate: What was judged.
        reference: What it was held against.
        precision: The candidate's precision, which sets the bar.
        bar: What it had to reach.
        cases: What came of each case.
        unchecked: What was not compared and so is not proven, with the reason, in words.
        pictures: Case, reference and candidate [3, H, W] by the case's name, if they were kept.
    """

    candidate: str
    reference: str
    precision: str
    bar: Bar
    cases: tuple[CaseResult, ...]
    unchecked: tuple[str, ...] = ()
    pictures: Mapping[str, tuple[Case, Array, Array]] = field(repr=False, default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every case passed, and something was compared at all.

        It says nothing of what is ``unchecked``.
        """
        compared = any(case.hole.pixels for case in self.cases)
        return compared and all(case.passed for case in self.cases)

    def to_json(self) -> str:
        """The whole report but the pictures."""
        entries = asdict(replace(self, pictures={}))
        del entries["pictures"]
        entries["passed"] = self.passed
        for case in entries["cases"]:
            case["masks_checked"] = case["masks"] > 0
            for region in ("hole", "ring"):
                if case[region]["psnr"] is not None and math.isinf(case[region]["psnr"]):
                    case[region]["psnr"] = "inf"
        return json.dumps(entries, indent=2, allow_nan=True) + "\n"


def check_parity(
    candidate: Runner,
    reference: Runner,
    *,
    suite: Sequence[Case] | None = None,
    batch: int = 2,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    keep_pictures: bool = False,
) -> ParityReport:
    """Run candidate and reference over the suite and compare.

    A candidate in ONNX Runtime or PyTorch has to give its mask states. One of another kind may give
    none, since they cannot be added to a built engine; they then count as unchecked. Some of them
    missing is a failure in any case.

    Args:
        candidate: What is judged, by the bar of its own precision.
        reference: What it is held against, in FP32 with float images.
        suite: The cases; by default the hard masks at the native size, and two of them at twice
            the width, where the candidate takes that: of an engine its profile decides.
        batch: Images at once, where both take any number; of an engine the nearest that it takes.
        progress: Called with the next case's name, its number and how many there are.
        keep_pictures: Keep each case, its reference [3, H, W] and its candidate in the report.

    Raises:
        UserError: If the two are models of different networks or weights that cannot be compared.
    """
    config = candidate.spec.config
    if reference.spec.config != config:
        raise UserError(
            f"candidate and reference are different networks: {config} and {reference.spec.config}"
        )
    bar = bar_of(candidate.spec)
    built = _built_for(candidate)
    batch = candidate.spec.batch or reference.spec.batch or batch
    if built is not None:
        batch = min(max(batch, built[0][0]), built[2][0])
    masks_due = isinstance(candidate, OrtRunner | TorchRunner)
    results, pictures, unchecked = [], {}, dict[str, None]()
    if suite is not None:
        chosen = list(suite)
    else:
        chosen = _default_suite(candidate.spec, built)
        if candidate.spec.dynamic_size and len({case.keep.shape for case in chosen}) == 1:
            height, width = chosen[0].keep.shape
            unchecked[f"other sizes: {height}×{width} alone fits what the engine was built for"] = (
                None
            )
    for i, case in enumerate(chosen):
        progress(case.name, i, len(chosen))
        expected, states = _run(reference, case, candidate.spec, batch)
        actual, seen = _run(candidate, case, candidate.spec, batch)
        masks_checked = masks_due or bool(seen)
        if not masks_checked:
            unchecked["mask states: the candidate gives none"] = None
        for name in actual.keys() - expected.keys():
            unchecked[f"{name}: the reference gives none"] = None
        results.append(_judge(case, expected, actual, states if masks_checked else None, seen, bar))
        if keep_pictures:
            pictures[case.name] = (case, expected["output"][0], actual["output"][0])
    progress("done", len(chosen), len(chosen))
    return ParityReport(
        candidate=candidate.name,
        reference=reference.name,
        precision=candidate.spec.precision,
        bar=bar,
        cases=tuple(results),
        unchecked=tuple(unchecked),
        pictures=pictures,
    )


_Sides: TypeAlias = tuple[int, int, int]
"""Images at once, height, width."""


def _built_for(candidate: Runner) -> tuple[_Sides, _Sides, _Sides] | None:
    """What an engine takes, smallest, best and largest; None: whatever its spec says."""
    shapes = getattr(candidate, "image_shapes", None)
    if shapes is None:
        return None
    height = 1 if candidate.spec.io == "uint8" else 2
    low, best, high = ((shape[0], shape[height], shape[height + 1]) for shape in shapes)
    return low, best, high


def _default_suite(
    spec: GraphSpec, built: tuple[_Sides, _Sides, _Sides] | None = None
) -> list[Case]:
    side = spec.config.resolution

    def takes(height: int, width: int) -> bool:
        if built is None:
            return spec.dynamic_size or (height, width) == (side, side)
        low, _, high = built
        return low[1] <= height <= high[1] and low[2] <= width <= high[2]

    native = (side, side) if built is None or takes(side, side) else built[1][1:]
    suite = list(cases(*native))
    if takes(side, 2 * side):
        suite += [
            replace(case, name=f"{case.name}-wide")
            for case in cases(side, 2 * side)
            if case.name in ("random-large", "shift-seams")
        ]
    return suite


# -- running a case -----------------------------------------------------------------------------


def _run(
    runner: Runner, case: Case, judged: GraphSpec, batch: int
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The runner's images [B, 3, H, W] in [-1, 1], by name, and its mask states.

    Images after the first are the photograph mirrored, with seeds of their own, so that samples
    cannot be mixed up unseen. Noise maps are drawn where the judged model takes them, so that both
    sides get the same.
    """
    spec = runner.spec
    noise = judged.noise == "input"
    height, width = case.keep.shape
    seeds = [case.seed + 1000 * i for i in range(batch)]
    inputs = draw(spec.config, seeds, height, width, noise=noise)
    inputs["truncation"] = np.full(1, case.truncation, np.float32)
    image = np.stack([case.image[:, :: -1 if i else 1] for i in range(batch)])
    mask = np.repeat(case.keep[None], batch, axis=0).astype(np.uint8) * np.uint8(255)
    if spec.io == "uint8":
        inputs["image"], inputs["mask"] = image, mask  # type: ignore[assignment]
    else:
        inputs["image"], inputs["mask"] = to_unit(image, mask)
    results = runner.run(inputs)
    images: dict[str, Array] = {k: v for k, v in results.items() if k in ("output", "coarse")}
    if spec.io == "uint8" or judged.io == "uint8":
        for name, values in images.items():
            pixels = values if spec.io == "uint8" else from_unit(values)
            images[name] = pixels.astype(np.float32).transpose(0, 3, 1, 2) / np.float32(127.5) - 1
    states = {
        name.removeprefix(STATE_PREFIX): np.asarray(value) > 0.5
        for name, value in results.items()
        if name.startswith(STATE_PREFIX)
    }
    return images, states


def _judge(
    case: Case,
    expected: Mapping[str, Array],
    actual: Mapping[str, Array],
    states: Mapping[str, Array] | None,
    seen: Mapping[str, Array],
    bar: Bar,
) -> CaseResult:
    """Compare one case's results; no `states` means that masks are not checked."""
    hole, ring = ~case.keep, _ring(case.keep)
    compared = [name for name in actual if name in expected]
    finite = all(bool(np.isfinite(actual[name]).all()) for name in compared)
    changed = [
        f"kept pixels differ: {wrong}"
        for name in compared
        if (wrong := _changed(expected[name][..., case.keep], actual[name][..., case.keep]))
    ]
    errors = {
        region: compare(expected["output"], actual["output"], pixels)
        for region, pixels in (("hole", hole), ("ring", ring))
    }
    judged = dict(errors)
    if "coarse" in compared:
        judged["coarse, hole"] = compare(expected["coarse"], actual["coarse"], hole)
    wrong_masks = tuple(
        name
        for name, state in (states or {}).items()
        if name not in seen or not np.array_equal(state, seen[name])
    )
    failures = [] if finite else ["the candidate gave NaN or infinity"]
    failures += changed[:1]
    failures += [
        f"{region}: {text}"
        for region, error in judged.items()
        if (text := _missed(error, bar)) is not None
    ]
    if wrong_masks:
        failures.append(f"mask states differ or are missing: {', '.join(wrong_masks)}")
    if states is not None and not states:
        failures.append("the reference gave no mask states to compare")
    return CaseResult(
        name=case.name,
        hole=errors["hole"],
        ring=errors["ring"],
        kept_exact=not changed,
        finite=finite,
        masks=len(states or ()),
        wrong_masks=wrong_masks,
        failures=tuple(failures),
    )


def _changed(expected: Array, actual: Array) -> str:
    """How many values differ and by how much; empty if none does. NaN differs."""
    wrong = expected != actual
    count = int(np.count_nonzero(wrong))
    if not count:
        return ""
    largest = float(np.abs(actual[wrong].astype(np.float64) - expected[wrong]).max())
    size = f", by {largest:.1e} or less" if math.isfinite(largest) else ""
    return f"{count} of {wrong.size} values{size}"


def _missed(error: RegionError, bar: Bar) -> str | None:
    """How an error misses the bar, or None. NaN misses every bar."""
    if error.pixels == 0:
        return None
    if bar.relative is not None and not (error.relative or 0.0) <= bar.relative:
        return f"relative error {error.relative:.2e} is over {bar.relative:g}"
    if bar.psnr is not None and error.psnr is not None and not error.psnr >= bar.psnr:
        return f"PSNR {error.psnr:.1f} dB is under {bar.psnr:g} dB"
    if bar.largest is not None and not (error.largest or 0.0) <= bar.largest:
        return f"a value is off by {error.largest:.4f}, more than {bar.largest:.4f}"
    return None


def compare(expected: Array, actual: Array, region: Array) -> RegionError:
    """The error of `actual` over a region.

    Args:
        expected: [B, 3, H, W].
        actual: Likewise.
        region: Bool [H, W].

    The PSNR's range is 2, that of [-1, 1], or the peak-to-peak of the expected values where
    untrained weights exceed it; it is NaN where a value is not finite.
    """
    pixels = int(region.sum())
    if pixels == 0:
        return RegionError(0, None, None, None)
    r = expected[..., region].astype(np.float64)
    difference = actual[..., region].astype(np.float64) - r
    norm = float(np.linalg.norm(r))
    error = float(np.linalg.norm(difference))
    mse = float(np.square(difference).mean())
    if mse == 0.0:
        psnr = math.inf
    elif math.isfinite(mse):
        psnr = 10.0 * math.log10(max(2.0, float(np.ptp(r))) ** 2 / mse)
    else:
        psnr = math.nan
    return RegionError(
        pixels=pixels,
        relative=error / norm if norm else (0.0 if error == 0.0 else math.inf),
        largest=float(np.abs(difference).max()),
        psnr=psnr,
    )


def _ring(keep: Array) -> Array:
    """Pixels within RING of the hole's edge, on both sides. Bool [H, W]."""
    grey = Image.fromarray(keep.astype(np.uint8) * 255)
    size = 2 * RING + 1
    grown = np.asarray(grey.filter(ImageFilter.MaxFilter(size))) > 0
    shrunk = np.asarray(grey.filter(ImageFilter.MinFilter(size))) > 0
    ring: Array = grown & ~shrunk
    return ring


# -- opening both sides -------------------------------------------------------------------------


class _TorchReference(TorchRunner):
    """The reference model, with the masks of every layer that reaches the output."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        results = super().run(inputs)
        states = self._model.mask_states(torch.from_numpy(inputs["mask"]).to(self._device))
        results.update(
            {
                f"{STATE_PREFIX}{name}": states[name].cpu().numpy()
                for name in mask_state_names(self.spec.config)
            }
        )
        return results


def open_candidate(path: str | os.PathLike[str], *, threads: int | None = None) -> Runner:
    """The runner of a model under judgement, its mask states among the outputs.

    A file type of ``openers`` gives those that it was built with.

    Raises:
        UserError: If there is no such file or no runner reads it.
    """
    if Path(path).suffix.lower() == ".onnx":
        return _open_onnx(path, threads)
    if opener_of(path) is not None:
        return open_runner(path, threads=threads)
    return _open_checkpoint(path, None, threads)


def _open_onnx_reference(
    path: str | os.PathLike[str], threads: int | None, candidate: GraphSpec, any_precision: bool
) -> Runner:
    runner = _open_onnx(path, threads)
    try:
        if runner.spec.precision != "fp32" and not any_precision:
            raise UserError(
                f"'{path}' is {runner.spec.precision} and a reference is FP32: name the file of "
                "'mat-export onnx', or the checkpoint"
            )
        _require_weights(path, runner.spec.checkpoint, candidate)
    except UserError:
        runner.close()
        raise
    return runner


def _open_onnx(path: str | os.PathLike[str], threads: int | None) -> Runner:
    """An ONNX file with its mask states among the outputs, half tensors stored as on a GPU."""
    model = with_mask_states(path)
    return OrtRunner(model, threads=threads, label=f"'{path}'", stored_half=True)


def load_onnx(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """An ONNX model.

    Raises:
        UserError: If the file is missing, unreadable or empty.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file '{path}'")
    try:
        model = onnx.load(path)
    except Exception as error:
        raise UserError(f"'{path}' is not a readable ONNX model: {error}") from error
    if not model.ir_version or not model.graph.node:
        raise UserError(f"'{path}' is not a readable ONNX model: it is empty")
    return model


def with_mask_states(path: str | os.PathLike[str]) -> bytes:
    """An ONNX model's bytes with its mask states added to the outputs.

    Raises:
        UserError: If the file is missing or no ONNX model.
    """
    model = load_onnx(path)
    made = {output for node in model.graph.node for output in node.output}
    given = {output.name for output in model.graph.output}
    known = {info.name: info for info in model.graph.value_info}
    for name in sorted(made - given):
        if name.startswith(STATE_PREFIX):
            model.graph.output.append(known.get(name) or onnx.ValueInfoProto(name=name))
    data: bytes = model.SerializeToString()
    return data


def open_reference(
    candidate: GraphSpec,
    path: str | os.PathLike[str] | None = None,
    *,
    near: str | os.PathLike[str] | None = None,
    record: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    any_precision: bool = False,
) -> Runner:
    """What to hold a candidate against.

    Args:
        candidate: The candidate's specification.
        path: A checkpoint, ONNX file or recording; by default the weights that the candidate was
            made of, drawn again if they were random, else looked for by their file's name, beside
            it and among what ships.
        near: The candidate's own path.
        record: An ``.npz`` to write the reference's answers to, when the runner is closed.
        threads: CPU threads.
        any_precision: Take an ONNX file that is not FP32 too, so that engines made of it can be
            compared with each other; proof it is none.

    Raises:
        UserError: If there is no reference, it is not FP32, it has other weights than the candidate
            names, or the recording cannot be written.
    """
    found = _find_reference(candidate, path, near, threads, any_precision)
    if record is None:
        return found
    digest = file_digest(path) if path is not None else ""
    try:
        return RecordingRunner(found, record, digest=digest)
    except UserError:
        found.close()
        raise


def _find_reference(
    candidate: GraphSpec,
    path: str | os.PathLike[str] | None,
    near: str | os.PathLike[str] | None,
    threads: int | None,
    any_precision: bool,
) -> Runner:
    spec = candidate.with_changes(io="float", batch=None, precision="fp32")
    if path is not None and near is not None and _same(path, near):
        raise UserError(f"'{path}' is candidate and reference: name another reference")
    if path is not None and Path(path).suffix.lower() == ".onnx":
        return _open_onnx_reference(path, threads, candidate, any_precision)
    if path is not None and Path(path).suffix.lower() == SUFFIX:
        return _open_recording(path, candidate)
    if path is not None:
        return _open_checkpoint(path, spec, threads)
    drawn = re.fullmatch(r"(\S+), random weights, seed (\d+)", candidate.source)
    if drawn:
        from mat_torch.checkpoint import random_checkpoint
        from mat_torch.config import preset

        checkpoint = random_checkpoint(preset(drawn[1]), int(drawn[2]))
        return _TorchReference(checkpoint, spec=spec, threads=threads)
    beside = Path(near or ".").parent / Path(candidate.source).name
    if near is not None and beside.is_file() and _same(beside, near):
        raise UserError(
            f"'{near}' is a checkpoint, which is no proof of itself: name what to hold it "
            "against with --reference"
        )
    if not beside.is_file() and beside.name == shipped.SHIPPED.name:
        beside = shipped.shipped_model()
    if not beside.is_file():
        raise UserError(
            f"the candidate was made of '{candidate.source}', which is not beside it: "
            "name the checkpoint with --reference"
        )
    return _open_checkpoint(beside, spec, threads)


def _same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


def _open_checkpoint(
    path: str | os.PathLike[str], spec: GraphSpec | None, threads: int | None
) -> Runner:
    checkpoint = read_checkpoint(path)
    if spec is not None:
        _require_weights(path, checkpoint.digest, spec)
    return _TorchReference(checkpoint, spec=spec, threads=threads)


def _open_recording(path: str | os.PathLike[str], candidate: GraphSpec) -> Runner:
    recorded = RecordedRunner(path)
    try:
        _require_weights(path, recorded.spec.checkpoint, candidate)
        if recorded.spec.noise != candidate.noise:
            raise UserError(
                f"'{path}' was recorded with --noise {recorded.spec.noise} and the candidate has "
                f"--noise {candidate.noise}: record the reference for this candidate"
            )
    except UserError:
        recorded.close()
        raise
    return recorded


def _require_weights(path: str | os.PathLike[str], digest: str, candidate: GraphSpec) -> None:
    """Raise UserError if a reference is of other weights than the candidate names."""
    if candidate.checkpoint and digest != candidate.checkpoint:
        raise UserError(
            f"'{path}' does not hold the candidate's weights: digest {digest[:12]} "
            f"against {candidate.checkpoint[:12]}; name the right one with --reference"
        )
