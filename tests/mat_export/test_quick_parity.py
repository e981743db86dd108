"""The short parity check: a real verdict, the reference run once for all candidates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mat_export.contract import UserError
from mat_export.engine_graph import prepare_engine_graph
from mat_export.parity import BARS, Bar, CaseResult, ParityReport, RegionError
from mat_export.quick_parity import QUICK_MASKS, check_quickly, in_words
from mat_export.runners import OrtRunner
from mat_export.suite import MASKS

SIZE = (256, 256)


@pytest.fixture(scope="module")
def plain(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an engine of the small preset is built of, in FP32."""
    path = tmp_path_factory.mktemp("quick") / "plain.onnx"
    onnx.save(prepare_engine_graph(tiny_onnx, "fp32", opset=17).model, path)
    return path


def test_the_masks_are_of_the_suite() -> None:
    assert set(QUICK_MASKS) < set(MASKS)


def test_the_reference_answers_once_and_a_wrong_weight_fails(
    tiny_onnx: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = tmp_path / "answers.npz"
    told: list[tuple[str, int, int]] = []
    report = check_quickly(
        plain,
        tiny_onnx,
        answers,
        batch=1,
        size=SIZE,
        progress=lambda *event: told.append(event),
    )
    assert report.passed
    assert report.bar == BARS["fp32"]
    assert {case.name for case in report.cases} == set(QUICK_MASKS)
    assert [done for _, done, _ in told] == [0, 1, 2, 3]
    assert "or less over 3 hard masks" in in_words(report)
    assert answers.is_file()

    model = onnx.load(plain)
    weight = next(t for t in model.graph.initializer if "second_stage" in t.name and t.dims)
    weight.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.5), weight.name)
    )
    wrong = tmp_path / "wrong.onnx"
    onnx.save(model, wrong)
    opened: list[str] = []

    class Counting(OrtRunner):
        def __init__(self, model: bytes, **options: object) -> None:
            opened.append(str(options["label"]))
            super().__init__(model, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("mat_export.parity.OrtRunner", Counting)
    report = check_quickly(wrong, tiny_onnx, answers, batch=1, size=SIZE)
    assert not report.passed
    assert "parity FAILED" in in_words(report)
    assert opened == [f"'{wrong}'"]


def test_a_reference_that_is_not_there_is_a_sentence(plain: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.npz"
    with pytest.raises(UserError, match=r"absent\.onnx"):
        check_quickly(plain, tmp_path / "absent.onnx", answers, batch=1, size=SIZE)
    assert not answers.exists()


def test_the_words_name_the_worst_region_or_what_failed() -> None:
    def case(hole: float, ring: float, *failures: str) -> CaseResult:
        errors = (RegionError(9, 1e-3, 0.1, psnr) for psnr in (hole, ring))
        return CaseResult("one-window", next(errors), next(errors), True, True, 0, (), failures)

    def report(*cases: CaseResult) -> ParityReport:
        return ParityReport("engine", "reference", "fp16", Bar(psnr=45.0), cases)

    assert in_words(report(case(60.0, 58.0), case(52.7, 59.0))) == (
        "PSNR 52.7 dB or more over 2 hard masks"
    )
    assert in_words(report(case(60.0, 58.0), case(30.0, 59.0, "hole: PSNR 30.0 dB"))) == (
        "parity FAILED, one-window: hole: PSNR 30.0 dB"
    )
