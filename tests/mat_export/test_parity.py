"""Parity accepts what is equal and refuses what is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_runner import FakeRunner
from numpy.typing import NDArray
from onnx import numpy_helper

from mat_export.contract import GraphSpec, UserError, mask_state_names
from mat_export.export import build_model
from mat_export.parity import (
    BARS,
    EIGHT_BIT_BAR,
    ParityReport,
    bar_of,
    check_parity,
    compare,
    open_candidate,
    open_reference,
    with_mask_states,
)
from mat_export.pixels import to_unit
from mat_export.report import render, write_report
from mat_export.runners import OrtRunner, Runner
from mat_export.suite import MASKS, Case, cases, photograph
from mat_torch import Checkpoint, preset, random_checkpoint, save_checkpoint

NAMES = ("random-large", "one-window")


def small_suite(*names: str) -> list[Case]:
    return [
        Case(name, photograph("coffee", 256, 256), MASKS[name](256, 256), seed, 1.0 - seed / 2)
        for seed, name in enumerate(names)
    ]


@pytest.fixture(scope="module")
def reference(tiny_onnx: Path) -> Runner:
    spec = OrtRunner(tiny_onnx).spec
    return open_reference(spec, near=tiny_onnx)


def judged(model: onnx.ModelProto, folder: Path, reference: Runner) -> ParityReport:
    path = folder / "changed.onnx"
    onnx.save(model, path)
    with open_candidate(path) as candidate:
        return check_parity(candidate, reference, suite=small_suite(*NAMES))


def change(model: onnx.ModelProto, name: str, edit: Callable[[NDArray[Any]], None]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    edit(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


# -- what passes --------------------------------------------------------------------------------


def test_the_export_passes_every_hard_mask(tiny_onnx: Path, reference: Runner) -> None:
    with open_candidate(tiny_onnx) as candidate:
        report = check_parity(candidate, reference, keep_pictures=True)
    assert report.passed, [case.failures for case in report.cases]
    assert {case.name for case in report.cases} == set(MASKS)
    assert all(case.masks == 10 for case in report.cases)
    worst = max(case.hole.relative or 0.0 for case in report.cases)
    assert 0.0 < worst <= 1e-4  # equal to the last bit would mean that both sides are one model


def test_a_model_is_its_own_equal(tiny_onnx: Path) -> None:
    with open_candidate(tiny_onnx) as one, open_candidate(tiny_onnx) as other:
        report = check_parity(one, other, suite=small_suite("random-small"))
    assert report.passed
    assert report.cases[0].hole.largest == 0.0


# -- what fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "second_stage.conv0.weight",
        "first_stage.tran.2.blocks.3.attn.value_weight",
        "mapping.w_avg",
    ],
)
def test_one_weight_changed_fails(
    name: str, tiny_onnx: Path, reference: Runner, tmp_path: Path
) -> None:
    model = onnx.load(tiny_onnx)

    def edit(values: NDArray[Any]) -> None:
        values.flat[values.size // 2] += 20 * values.std()

    # The mean style shows only where truncation is not 1, so the suite varies it.

    change(model, name, edit)
    report = judged(model, tmp_path, reference)
    assert not report.passed
    assert any("relative error" in text for case in report.cases for text in case.failures)


def test_one_operator_swapped_fails(tiny_onnx: Path, reference: Runner, tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx)
    node = next(
        n
        for n in model.graph.node
        if n.op_type == "LeakyRelu" and n.name.startswith("second_stage.dec.Dec_64x64.conv1")
    )
    node.op_type = "Relu"
    del node.attribute[:]
    assert not judged(model, tmp_path, reference).passed


def test_nan_fails_and_says_so(tiny_onnx: Path, reference: Runner, tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx)

    def edit(values: NDArray[Any]) -> None:
        values.flat[0] = np.nan

    change(model, "second_stage.dec.Dec_256x256.conv1.weight", edit)
    report = judged(model, tmp_path, reference)
    assert not report.passed
    assert all("NaN" in " ".join(case.failures) for case in report.cases)
    assert "not finite" in render(report)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_value_that_is_not_finite_fails_and_can_be_shown(value: float) -> None:
    class Broken(Engine):
        def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            results = super().run(inputs)
            results["output"][:, 1][inputs["mask"][:, 0] == 0] = value
            return results

    suite = small_suite("random-small")
    report = check_parity(Broken(10), Engine(10), suite=suite, keep_pictures=True)
    assert not report.passed
    assert "the candidate gave NaN or infinity" in report.cases[0].failures
    assert any("relative error" in text for text in report.cases[0].failures)
    assert report.cases[0].hole.psnr is not None
    assert np.isnan(report.cases[0].hole.psnr)
    assert json.loads(report.to_json())["cases"][0]["finite"] is False
    assert "<td>nan</td>" in render(report)
    half = check_parity(Broken(10, precision="fp16"), Engine(10), suite=suite)
    assert any("PSNR nan dB is under 45 dB" in text for text in half.cases[0].failures)


def test_kept_pixels_that_differ_fail_with_how_many_and_by_how_much() -> None:
    class Rounding(Engine):
        """Composites in half precision, as an engine of TensorRT 8.6 was seen to."""

        def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            results = super().run(inputs)
            rounded = results["output"].astype(np.float16).astype(np.float32)
            results["output"] = np.where(inputs["mask"] == 1, rounded, results["output"])
            return results

    suite = small_suite("random-small")
    report = check_parity(Rounding(10, precision="fp16"), Engine(10), suite=suite, batch=1)
    case = suite[0]
    image, _ = to_unit(case.image[None], case.keep[None].astype(np.uint8) * np.uint8(255))
    kept = image[..., case.keep]
    rounding = np.abs(kept.astype(np.float16).astype(np.float32) - kept)
    counted = f"{np.count_nonzero(rounding)} of {kept.size} values"
    (failure,) = report.cases[0].failures
    assert failure == f"kept pixels differ: {counted}, by {rounding.max():.1e} or less"
    assert not report.cases[0].kept_exact


def test_a_wrong_mask_fails_even_where_the_picture_is_equal(
    tiny_onnx: Path, reference: Runner
) -> None:
    class Liar:
        """A runner that reports one mask state upside down."""

        def __init__(self, inner: Runner) -> None:
            self.inner, self.name, self.spec = inner, inner.name, inner.spec

        def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            results = self.inner.run(inputs)
            results["mask_state/tran.0.conv"] = ~(results["mask_state/tran.0.conv"] > 0.5)
            return results

    with open_candidate(tiny_onnx) as candidate:
        report = check_parity(
            Liar(candidate),  # type: ignore[arg-type]
            reference,
            suite=small_suite("random-small"),
        )
    assert report.cases[0].wrong_masks == ("tran.0.conv",)
    assert not report.passed


def test_a_model_without_mask_states_fails(tiny_onnx: Path, reference: Runner) -> None:
    with OrtRunner(tiny_onnx) as candidate:
        report = check_parity(candidate, reference, suite=small_suite("random-small"))
    assert not report.passed
    assert len(report.cases[0].wrong_masks) == 10


class Engine(FakeRunner):
    """A stand-in for a built engine, which gives the mask states that it was built with."""

    image_shapes: tuple[tuple[int, ...], ...] | None = None

    def __init__(self, masks: int, coarse: bool = False, **fields: Any) -> None:
        super().__init__(coarse=coarse, **fields)
        self.masks = mask_state_names(self.spec.config)[:masks]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        results = super().run(inputs)
        if self.spec.coarse:
            results["coarse"] = results["output"]
        mask = inputs["mask"]  # [B, 1, H, W], or bytes [B, H, W]
        valid = mask.reshape(len(mask), 1, *mask.shape[-2:])[:, :, ::4, ::4]
        return {**results, **{f"mask_state/{name}": valid for name in self.masks}}


def test_an_engine_without_mask_states_is_judged_and_its_masks_are_not_checked(
    tmp_path: Path,
) -> None:
    suite = small_suite("random-small")
    report = check_parity(Engine(0), Engine(10), suite=suite, keep_pictures=True)
    assert report.passed
    assert report.unchecked == ("mask states: the candidate gives none",)
    assert report.cases[0].masks_in_words == "not checked"
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    assert "Not checked: mask states: the candidate gives none." in page
    assert "<td>not checked</td>" in page
    figures = json.loads((tmp_path / "parity.json").read_text())
    assert figures["unchecked"] == ["mask states: the candidate gives none"]
    assert figures["cases"][0]["masks_checked"] is False


@pytest.mark.parametrize(
    ("io", "low", "high", "batch"),
    [("float", 1, 1, 1), ("float", 4, 8, 4), ("uint8", 1, 8, 2)],
)
def test_an_engine_is_judged_within_its_profile(
    io: str, low: int, high: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mat_export.parity.cases", _two_cases)
    candidate = Engine(10, io=io, dynamic_size=True, noise="input")
    candidate.image_shapes = tuple(
        (n, 256, 256, 3) if io == "uint8" else (n, 3, 256, 256) for n in (low, low, high)
    )
    report = check_parity(candidate, Engine(10, dynamic_size=True, noise="input"))
    assert report.passed
    assert set(candidate.batches) == {batch}
    assert [case.name for case in report.cases] == ["shift-seams", "random-large"]
    assert report.unchecked == ("other sizes: 256×256 alone fits what the engine was built for",)


def test_an_engine_of_another_size_alone_is_judged_at_that_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mat_export.parity.cases", _two_cases)
    candidate = Engine(10, dynamic_size=True, noise="input")
    candidate.image_shapes = ((1, 3, 512, 256),) * 3
    report = check_parity(candidate, Engine(10, dynamic_size=True, noise="input"))
    assert report.passed
    assert {inputs["image"].shape for inputs in candidate.seen} == {(1, 3, 512, 256)}
    # One that takes both sizes has both checked.
    candidate.image_shapes = ((1, 3, 256, 256), (1, 3, 256, 256), (2, 3, 256, 512))
    report = check_parity(candidate, Engine(10, dynamic_size=True, noise="input"))
    assert report.unchecked == ()
    assert len(report.cases) == 4


def _two_cases(height: int, width: int) -> list[Case]:
    names = ("shift-seams", "random-large")
    return [case for case in cases(height, width) if case.name in names]


def test_an_engine_with_mask_states_has_all_of_them_checked() -> None:
    suite = small_suite("random-small")
    report = check_parity(Engine(10), Engine(10), suite=suite)
    assert report.passed
    assert report.unchecked == ()
    assert report.cases[0].masks_in_words == "10 of 10"
    assert json.loads(report.to_json())["cases"][0]["masks_checked"] is True
    assert "Not checked" not in render(report)
    some = check_parity(Engine(9), Engine(10), suite=suite)
    assert some.cases[0].wrong_masks == mask_state_names(preset("mat-tiny-256"))[9:]
    assert not some.passed
    assert not check_parity(Engine(10), Engine(0), suite=suite).passed


@pytest.mark.parametrize(("fixed", "batch"), [(None, 4), (1, 1)])
def test_a_dynamic_batch_is_compared_at_the_batch_asked_for(fixed: int | None, batch: int) -> None:
    candidate = Engine(10, batch=fixed)
    suite = small_suite("random-small")
    assert check_parity(candidate, Engine(10), suite=suite, batch=4).passed
    assert candidate.batches == [batch]


def test_a_coarse_image_that_the_reference_lacks_is_not_checked() -> None:
    suite = small_suite("random-small")
    report = check_parity(Engine(10, coarse=True), Engine(10), suite=suite)
    assert report.unchecked == ("coarse: the reference gives none",)
    assert check_parity(Engine(10), Engine(10, coarse=True), suite=suite).unchecked == ()


def test_the_bar_is_that_of_the_engines_own_precision() -> None:
    suite = small_suite("random-small")
    for precision, passed in (("fp32", False), ("tf32", True)):
        candidate = Engine(10, precision=precision, shade=2e-4)
        report = check_parity(candidate, Engine(10), suite=suite)
        assert report.passed is passed
        assert report.precision == precision
    with pytest.raises(UserError, match="no bar for precision 'fp8', only for fp32, "):
        check_parity(Engine(10, precision="fp8"), Engine(10), suite=suite)


def test_a_wrong_coarse_image_fails(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    spec = GraphSpec(tiny_checkpoint.config, coarse=True)
    model, _ = build_model(
        tiny_checkpoint,
        replace(spec, checkpoint=tiny_checkpoint.digest, source=tiny_checkpoint.source),
    )
    path = tmp_path / "coarse.onnx"
    for wrong in (False, True):
        if wrong:  # half of the picture: the other output stays as it is
            node = next(n for n in model.graph.node if "coarse" in n.output)
            node.output[0] = "right"
            half = numpy_helper.from_array(np.float32(0.5), "half")
            model.graph.initializer.append(half)
            model.graph.node.append(onnx.helper.make_node("Mul", ["right", "half"], ["coarse"]))
            for other in model.graph.node[:-1]:
                for i, name in enumerate(other.input):
                    other.input[i] = "right" if name == "coarse" else name
        onnx.save(model, path)
        with open_candidate(path) as candidate, open_reference(candidate.spec) as held:
            report = check_parity(candidate, held, suite=small_suite("random-small"))
        assert report.passed is not wrong
    assert any("coarse" in text for text in report.cases[0].failures)


def test_nothing_compared_is_no_success(tiny_onnx: Path, reference: Runner) -> None:
    with open_candidate(tiny_onnx) as candidate:
        assert not check_parity(candidate, reference, suite=[]).passed
        assert not check_parity(candidate, reference, suite=small_suite("no-hole")).passed


def test_other_weights_fail(tiny_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_checkpoint(random_checkpoint(preset("mat-tiny-256"), 1), path)
    with open_candidate(tiny_onnx) as candidate, open_candidate(path) as other:
        assert not check_parity(candidate, other, suite=small_suite("random-small")).passed


@pytest.mark.parametrize("fault", ["precision", "weights"])
def test_an_onnx_file_that_proves_nothing_is_refused_as_reference(
    tiny_onnx: Path, tmp_path: Path, fault: str
) -> None:
    model = onnx.load(tiny_onnx)
    spec = GraphSpec.of_model(model)
    assert spec is not None
    candidate = spec
    if fault == "precision":
        spec.with_changes(precision="fp16").write_to(model)
        words = "is fp16 and a reference is FP32"
    else:
        candidate = spec.with_changes(checkpoint="0" * 64)
        words = "does not hold the candidate's weights"
    path = tmp_path / "other.onnx"
    onnx.save(model, path)
    with pytest.raises(UserError, match=words):
        open_reference(candidate, path)
    if fault == "precision":
        with open_reference(candidate, path, any_precision=True) as found:
            assert found.spec.precision == "fp16"


# -- the reference ------------------------------------------------------------------------------


def test_a_checkpoint_with_other_weights_is_refused_as_reference(
    tiny_onnx: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    save_checkpoint(random_checkpoint(preset("mat-tiny-256"), 1), path)
    spec = OrtRunner(tiny_onnx).spec
    with pytest.raises(UserError, match="does not hold the candidate's weights"):
        open_reference(spec, path)


def test_the_checkpoint_beside_the_candidate_is_found(
    tiny_checkpoint: Checkpoint, tiny_onnx: Path, tmp_path: Path
) -> None:
    spec = replace(OrtRunner(tiny_onnx).spec, source="weights.safetensors")
    with pytest.raises(UserError, match="--reference"):
        open_reference(spec, near=tmp_path / "mat.onnx")
    save_checkpoint(tiny_checkpoint, tmp_path / "weights.safetensors")
    with open_reference(spec, near=tmp_path / "mat.onnx") as found:
        assert found.spec.checkpoint == tiny_checkpoint.digest


def test_a_model_cannot_prove_itself(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_checkpoint(tiny_checkpoint, path)
    with open_candidate(path) as candidate:
        with pytest.raises(UserError, match="no proof of itself"):
            open_reference(candidate.spec, near=path)
        with pytest.raises(UserError, match="candidate and reference"):
            open_reference(candidate.spec, path, near=path)


def test_different_networks_cannot_be_compared(tiny_onnx: Path) -> None:
    class Other:
        name, spec = "other", GraphSpec(preset("mat-256"))

    with (
        open_candidate(tiny_onnx) as candidate,
        pytest.raises(UserError, match="different networks"),
    ):
        check_parity(candidate, Other())  # type: ignore[arg-type]


def test_mask_states_that_are_outputs_already_stay_so(tiny_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "with-states.onnx"
    path.write_bytes(with_mask_states(tiny_onnx))
    assert with_mask_states(path) == path.read_bytes()
    with open_candidate(path) as candidate:
        assert candidate.spec.batch == 1


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.onnx"):
        open_candidate(tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x09 not a model")
    with pytest.raises(UserError, match=r"broken\.onnx"):
        open_candidate(tmp_path / "broken.onnx")


# -- figures ------------------------------------------------------------------------------------


def test_errors_are_those_of_their_definition() -> None:
    region = np.array([[True, False], [True, False]])
    expected = np.array([[[[3.0, 9.0], [4.0, 9.0]]]])
    actual = np.array([[[[3.0, 0.0], [4.5, 0.0]]]])
    error = compare(expected, actual, region)
    assert error.pixels == 2
    assert error.relative == pytest.approx(0.5 / 5.0)
    assert error.largest == pytest.approx(0.5)
    assert error.psnr == pytest.approx(10 * np.log10(4.0 / 0.125))


def test_psnr_takes_the_references_own_range_where_it_exceeds_two() -> None:
    region = np.ones((1, 2), bool)
    expected, actual = np.array([[[[0.0, 20.0]]]]), np.array([[[[0.0, 21.0]]]])
    assert compare(expected, actual, region).psnr == pytest.approx(10 * np.log10(400 / 0.5))


def test_an_empty_region_has_no_error() -> None:
    error = compare(np.ones((1, 3, 2, 2)), np.zeros((1, 3, 2, 2)), np.zeros((2, 2), bool))
    assert error.relative is None


def test_bars_are_those_of_the_design() -> None:
    spec = GraphSpec(preset("mat-256"))
    assert bar_of(spec).relative == 1e-4
    assert BARS["fp16"].psnr == 45.0
    assert BARS["int8"].psnr == 30.0
    assert bar_of(replace(spec, io="uint8")) is EIGHT_BIT_BAR


# -- the page -----------------------------------------------------------------------------------


def test_the_report_is_one_self_contained_page(
    tiny_onnx: Path, reference: Runner, tmp_path: Path
) -> None:
    with open_candidate(tiny_onnx) as candidate:
        suite = small_suite("random-small", "no-hole")
        report = check_parity(candidate, reference, suite=suite, keep_pictures=True)
    page = write_report(report, tmp_path / "report")
    text = page.read_text(encoding="utf-8")
    assert text.count("<img") == 8
    assert text.count("data:image/png;base64,") == 8
    assert "http://" not in text
    assert "https://" not in text
    assert '<span class="passed">passed</span>' in text
    figures = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert figures["passed"] is True
    assert figures["cases"][0]["hole"]["relative"] <= 1e-4
