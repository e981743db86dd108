"""What FP16 costs when it is done naively: three half forms of one network against its FP32.

- ``pytorch``: the reference model, converted with ``.half()``;
- ``converter``: the exported FP32 graph through ONNX Runtime's own FP16 converter, with its
  defaults;
- ``typed``: the file that this project writes (``mat_export.precision``).

Each fills the hard masks of the parity suite under several settings of the weights, of which all
but the first leave the function as it is in exact arithmetic: demodulation divides styles and
weights out again. A page shows the PSNR in the hole, what is not finite, and pictures.

    python benchmarks/naive_half.py OUT [--checkpoint FILE | --preset NAME --seed N]
        [--settings NAME …] [--cases NAME …] [--pictures NAME …] [--device cpu|cuda] [--threads N]

OUT is a folder: ``index.html`` and ``naive_half.json`` are written there. The default, the small
preset untrained, takes some 10 minutes on two cores.

Processors compute no half precision, so on the CPU it is what the tensors are stored in: every
operator takes half tensors, computes in FP32 and rounds its result to half, which is what a GPU's
matrix units do. That goes for all three forms. PyTorch's own CPU kernels give the same verdict and
take two minutes an image; with ``--device cuda`` the first form really runs in half.
"""

from __future__ import annotations

import argparse
import html
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mat_export.bench import machine
from mat_export.console import note
from mat_export.contract import GraphSpec
from mat_export.debugging import find_divergence, run_onnxruntime
from mat_export.export import build_model
from mat_export.files import atomic_write, require_folder
from mat_export.inlining import inline_functions
from mat_export.parity import BARS, compare
from mat_export.pixels import to_unit
from mat_export.precision import apply_precision
from mat_export.report import STYLE, figure, picture_of, with_grey_hole
from mat_export.runners import OrtRunner, TorchRunner, read_checkpoint
from mat_export.suite import MASKS, Case, cases
from mat_torch import Checkpoint, draw, preset, random_checkpoint

Arrays = Mapping[str, NDArray[Any]]

BAR = BARS["fp16"].psnr or math.inf
"""Least PSNR in the hole, in dB."""


# -- settings of the weights ----------------------------------------------------------------------


def _demodulated(tensors: Mapping[str, Tensor]) -> set[str]:
    """Weights of the layers whose styles and weights demodulation divides out again."""
    found = {n.removesuffix("affine.weight") for n in tensors if n.endswith(".affine.weight")}
    return {layer for layer in found if "toRGB" not in layer}


def _styles(factor: float) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {f"{n}affine.{p}" for n in _demodulated(tensors) for p in ("weight", "bias")}
        return {k: v * factor if k in names else v for k, v in tensors.items()}

    return change


def _weights(factor: float) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {f"{n}weight" for n in _demodulated(tensors)}
        return {k: v * factor if k in names else v for k, v in tensors.items()}

    return change


SETTINGS: dict[str, tuple[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]]] = {
    "as-is": ("the weights as they are", dict),
    "styles-1e4": ("styles × 10⁴", _styles(1e4)),
    "weights-1e3": ("weights of demodulated layers × 10³", _weights(1e3)),
}
"""Name, what it is in words, and the change to the weights."""


# -- the forms ------------------------------------------------------------------------------------


class HalfStorage(TorchDispatchMode):
    """Half tensors on a processor: each operator computes in FP32 and rounds its result to half.

    What only makes, moves or looks at tensors is left alone.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = (args, dict(kwargs or {}))
        halves: list[Tensor] = []
        tree_map_only(Tensor, lambda t: halves.append(t) if t.dtype == torch.half else None, given)
        makes = any(part in func.name() for part in ("_to_copy", "::empty", "::new_", "::clone"))
        if not halves or func.is_view or makes:
            return func(*given[0], **given[1])
        if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
            raise NotImplementedError(f"{func.name()} changes a half tensor in place")
        args, kwargs = tree_map_only(
            Tensor, lambda t: t.float() if t.dtype == torch.half else t, given
        )
        results = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda t: t.half() if t.dtype == torch.float else t, results)


class HalfTorchRunner:
    """The reference model after ``.half()``.

    Attributes:
        culprit: The first module that gave what is not finite, of all runs; empty if none did.
    """

    def __init__(self, checkpoint: Checkpoint, spec: GraphSpec, device: str) -> None:
        self.name, self.spec = f"PyTorch {torch.__version__}, .half()", spec
        self.culprit = ""
        self._device = torch.device(device)
        self._model: Any = checkpoint.build().half().to(self._device)
        for name, module in self._model.named_modules():
            module.register_forward_hook(self._watch(name))

    def _watch(self, name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not self.culprit and isinstance(first, Tensor) and not first.isfinite().all():
                self.culprit = name

        return hook

    @contextmanager
    def _storage(self) -> Iterator[None]:
        if self._device.type == "cpu":
            with HalfStorage():
                yield
        else:
            yield

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """The filled image as float32, [B, 3, H, W]."""
        tensors = {k: torch.from_numpy(v.copy()).half().to(self._device) for k, v in inputs.items()}
        with torch.no_grad(), self._storage():
            output, _ = self._model(**tensors, noise={})
        return {"output": output.float().cpu().numpy()}


def converted(model: onnx.ModelProto) -> onnx.ModelProto:
    """An FP32 model through ONNX Runtime's FP16 converter, its inputs and outputs as they were."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = inline_functions(model)
    result: onnx.ModelProto = convert_float_to_float16(copy, keep_io_types=True)
    return result


def _stored(model: onnx.ModelProto, spec: GraphSpec, threads: int | None) -> OrtRunner:
    return OrtRunner(model.SerializeToString(), spec=spec, threads=threads, stored_half=True)


# -- the comparison -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One form of one setting in one case.

    Attributes:
        setting: The setting's name.
        form: The form's name.
        case: The case's name.
        psnr: Against FP32 in the hole, in dB; None where that is no number. Infinite if equal.
        broken: Share of the hole's pixels that are not finite, 0 to 1.
    """

    setting: str
    form: str
    case: str
    psnr: float | None
    broken: float

    @property
    def passed(self) -> bool:
        """Whether all is finite and within the bar."""
        return self.psnr is not None and self.psnr >= BAR


FORMS = ("pytorch", "converter", "typed")


def _outcome(
    setting: str, form: str, case: Case, expected: NDArray[Any], actual: NDArray[Any]
) -> Outcome:
    hole = ~case.keep
    broken = float((~np.isfinite(actual).all(axis=1))[:, hole].mean())
    error = compare(expected, actual, hole)
    psnr = error.psnr if error.psnr is not None and not math.isnan(error.psnr) else None
    return Outcome(setting, form, case.name, None if broken else psnr, broken)


def _inputs(case: Case, checkpoint: Checkpoint) -> dict[str, NDArray[Any]]:
    keep = case.keep[None].astype(np.uint8) * np.uint8(255)
    image, mask = to_unit(case.image[None], keep)
    truncation = np.full(1, case.truncation, np.float32)
    drawn = draw(checkpoint.config, [case.seed])
    return {"image": image, "mask": mask, "truncation": truncation, **drawn}


@dataclass
class Setting:
    """What came of one setting.

    Attributes:
        name: The setting's name.
        words: What it is.
        outcomes: Of every form and case.
        culprits: Where the first value that is not finite appears, by form; those that stay finite
            are left out.
        pictures: As HTML.
    """

    name: str
    words: str
    outcomes: list[Outcome]
    culprits: dict[str, str]
    pictures: str


def measure(
    checkpoint: Checkpoint,
    name: str,
    suite: Sequence[Case],
    *,
    shown: Sequence[str],
    device: str,
    threads: int | None,
) -> Setting:
    """Run one setting's forms over the cases that have a hole."""
    words, change = SETTINGS[name]
    changed = replace(checkpoint, tensors=change(checkpoint.tensors))
    spec = GraphSpec(checkpoint.config)
    note(f"{words}: exporting")
    model, _ = build_model(changed, spec)
    half = spec.with_changes(precision="fp16")
    naive = HalfTorchRunner(changed, half, device)
    careless = converted(model)
    runners: dict[str, Any] = {
        "pytorch": naive,
        "converter": _stored(careless, half, threads),
        "typed": _stored(apply_precision(model, "fp16").model, half, threads),
    }
    reference = TorchRunner(changed, spec=spec, threads=threads)
    outcomes, pictures, culprits = [], [], dict[str, str]()
    for case in suite:
        inputs = _inputs(case, checkpoint)
        expected = reference.run(inputs)["output"]
        filled = {form: runners[form].run(inputs)["output"] for form in FORMS}
        own = [_outcome(name, form, case, expected, filled[form]) for form in FORMS]
        outcomes += own
        note(f"  {case.name}: " + ", ".join(f"{o.form} {_in_words(o)}" for o in own))
        if case.name in shown:
            pictures.append(_row_of_pictures(case, expected[0], filled, own))
        if own[1].broken and "converter" not in culprits:
            culprits["converter"] = _first_broken(careless, model, inputs)
    if naive.culprit:
        culprits["pytorch"] = naive.culprit
    return Setting(name, words, outcomes, culprits, "".join(pictures))


def _first_broken(half: onnx.ModelProto, single: onnx.ModelProto, inputs: Arrays) -> str:
    """The first tensor that leaves a module of the half graph and is not finite, or far off."""
    found = find_divergence(
        half,
        run_onnxruntime,
        run_onnxruntime,
        inputs,
        tolerance=0.5,
        reference=single,
        at_once=40,
    )
    return "" if found.first is None else f"{found.first.tensor}: {found.first.problem}"


# -- the page -------------------------------------------------------------------------------------


def _in_words(outcome: Outcome) -> str:
    if outcome.broken:
        share = "under 1%" if outcome.broken < 0.01 else f"{outcome.broken:.0%}"
        return f"not finite ({share})"
    if outcome.psnr is None:
        return "–"
    return "equal" if math.isinf(outcome.psnr) else f"{outcome.psnr:.1f} dB"


def _row_of_pictures(
    case: Case, expected: NDArray[Any], filled: Arrays, outcomes: Sequence[Outcome]
) -> str:
    """Input, FP32 and the three forms, the filling scaled to the range of FP32's."""
    hole = ~case.keep
    scale = max(1.0, float(np.quantile(np.abs(expected[:, hole]), 0.99)))

    def shown(image: NDArray[Any]) -> NDArray[np.uint8]:
        return picture_of(np.where(hole, image / scale, image))

    cells = [figure("input, its hole grey", with_grey_hole(case)), figure("FP32", shown(expected))]
    for outcome in outcomes:
        caption = f"{outcome.form}: {_in_words(outcome)}"
        cells.append(figure(caption, shown(filled[outcome.form][0])))
    return (
        f"<h3>{html.escape(case.name)}</h3>"
        f'<div class="row" style="grid-template-columns: repeat(5, 1fr)">{"".join(cells)}</div>'
    )


def _summary(setting: Setting) -> str:
    cells = [html.escape(setting.words)]
    for form in FORMS:
        own = [o for o in setting.outcomes if o.form == form]
        finite = [o for o in own if not o.broken]
        worst = min((o.psnr for o in finite if o.psnr is not None), default=None)
        figures = "–" if worst is None else f"{worst:.1f} dB"
        kind = "passed" if all(o.passed for o in own) else "failed"
        cells.append(
            f'<span class="{kind}">{figures}</span><br>'
            f"{len(own) - len(finite)} of {len(own)} not finite"
        )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


def _details(setting: Setting) -> str:
    rows = []
    for case in dict.fromkeys(o.case for o in setting.outcomes):
        own = [next(o for o in setting.outcomes if (o.case, o.form) == (case, f)) for f in FORMS]
        cells = "".join(
            f'<td><span class="{"passed" if o.passed else "failed"}">{_in_words(o)}</span></td>'
            for o in own
        )
        rows.append(f"<tr><td>{html.escape(case)}</td>{cells}</tr>\n")
    culprit = "".join(
        f"<p>The first that is not finite, {words}: "
        f"<code>{html.escape(setting.culprits[form])}</code>.</p>"
        for form, words in (("pytorch", "with <code>.half()</code>"), ("converter", "converted"))
        if form in setting.culprits
    )
    return (
        f"<h2>{html.escape(setting.words)}</h2>{culprit}"
        f'<div class="scroll"><table>{_HEAD}<tbody>{"".join(rows)}</tbody></table></div>'
        f"{setting.pictures}"
    )


_HEAD = (
    "<thead><tr><th></th><th>PyTorch <code>.half()</code></th>"
    "<th>ONNX Runtime's converter</th><th>typed graph</th></tr></thead>"
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Naive half precision</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
{style}td:last-child, th:last-child {{ text-align: right; }}</style></head><body>
<h1>Naive half precision</h1>
<p>{source}. Three FP16 forms against FP32 in PyTorch, over {cases} hard masks: the lowest PSNR in
the hole of the cases that are finite, and how many are not. The bar is {bar:g} dB; green reaches it
in every case. The settings after the first are the same function in exact arithmetic, since
demodulation divides styles and weights out again.</p>
<p>{how} The reference model already takes the mask ratio from counts; the published
<code>9/(u + 1e-8)</code> alone is NaN in half.</p>
<div class="scroll"><table>{head}<tbody>
{summary}</tbody></table></div>
{details}
<p>Pictures: the filling is divided by the 99th percentile of FP32's magnitude where that exceeds 1,
as untrained weights make it; what is not finite shows as a check of black and white.
{machine}</p>
</body></html>
"""

_HOW = {
    "cpu": "On a processor half is what tensors are stored in: every operator takes half tensors, "
    "computes in FP32 and rounds its result to half. So do all three forms here.",
    "cuda": "PyTorch ran on a GPU, in half; the other two on the processor, where every operator "
    "takes half tensors, computes in FP32 and rounds its result to half.",
}


def page(checkpoint: Checkpoint, settings: Sequence[Setting], device: str) -> str:
    """The HTML page."""
    here = machine()
    versions = ", ".join(f"{k} {v}" for k, v in here["versions"].items())
    return _PAGE.format(
        style=STYLE,
        source=html.escape(f"Weights: {checkpoint.source}"),
        cases=len({o.case for o in settings[0].outcomes}),
        bar=BAR,
        how=_HOW[device],
        head=_HEAD,
        summary="".join(_summary(setting) for setting in settings),
        details="".join(_details(setting) for setting in settings),
        machine=html.escape(f"Taken with {versions} on {here['cpu']}."),
    )


def figures(checkpoint: Checkpoint, settings: Sequence[Setting], device: str) -> str:
    """Everything but the pictures as JSON; a PSNR is null where it is no finite number."""
    entries = [
        {
            "setting": setting.name,
            "words": setting.words,
            "culprits": setting.culprits,
            "outcomes": [
                {
                    **asdict(o),
                    "psnr": o.psnr if math.isfinite(o.psnr or 0.0) else None,
                    "passed": o.passed,
                }
                for o in setting.outcomes
            ],
        }
        for setting in settings
    ]
    facts = {"source": checkpoint.source, "bar": BAR, "device": device, "machine": machine()}
    return json.dumps({**facts, "settings": entries}, indent=2, allow_nan=False) + "\n"


def main() -> None:
    """Parse the options, measure and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the page")
    parser.add_argument("--checkpoint", type=Path, help="any checkpoint that mat-export reads")
    parser.add_argument("--preset", default="mat-tiny-256", help="an untrained network instead")
    parser.add_argument("--seed", type=int, default=0, help="of the untrained weights")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    holes = [name for name in MASKS if name != "no-hole"]
    parser.add_argument("--cases", nargs="+", choices=holes, default=holes)
    parser.add_argument(
        "--pictures", nargs="*", choices=holes, default=["all-hole", "random-large"]
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of .half()")
    parser.add_argument("--threads", type=int, help="CPU threads [default: all]")
    options = parser.parse_args()
    require_folder(options.out)
    if options.checkpoint is not None:
        checkpoint = read_checkpoint(options.checkpoint)
    else:
        checkpoint = random_checkpoint(preset(options.preset), options.seed)
    side = checkpoint.config.resolution
    suite = [case for case in cases(side, side) if case.name in options.cases]
    settings = [
        measure(
            checkpoint,
            name,
            suite,
            shown=options.pictures,
            device=options.device,
            threads=options.threads,
        )
        for name in options.settings
    ]
    results = figures(checkpoint, settings, options.device)
    atomic_write(options.out / "naive_half.json", results)
    atomic_write(options.out / "index.html", page(checkpoint, settings, options.device))
    note(f"the page is {options.out / 'index.html'}")


if __name__ == "__main__":
    main()
