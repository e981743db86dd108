"""The page on naive half precision says what was computed, and its settings change no picture."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import SMALL

from mat_export.suite import MASKS, Case, photograph
from mat_torch import Checkpoint, random_checkpoint


@pytest.fixture(scope="module")
def script() -> Any:
    """The benchmark as a module."""
    path = Path(__file__).parent.parent / "benchmarks" / "naive_half.py"
    spec = importlib.util.spec_from_file_location("naive_half", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["naive_half"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return random_checkpoint(SMALL, 0)


def suite(*names: str) -> list[Case]:
    return [
        Case(name, photograph("coffee", 128, 128), MASKS[name](128, 128), seed)
        for seed, name in enumerate(names)
    ]


def test_half_tensors_compute_in_single_and_are_stored_in_half(script: Any) -> None:
    x = torch.full((1, 2), 300.0).half()
    with torch.no_grad(), script.HalfStorage():
        kept = (x * x / 300.0).float()
        small = x * x * 0.5
    assert kept.isinf().all()  # 90000 is stored between the two
    assert small.dtype == torch.half
    weight = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).half()
    with torch.no_grad(), script.HalfStorage():
        product = torch.nn.functional.linear(x * 200.0, weight)
    assert product[0, 0].isinf()
    assert product[0, 1] == 0.0
    with pytest.raises(NotImplementedError, match="in place"), script.HalfStorage():
        x.mul_(2.0)


@pytest.mark.parametrize("name", ["styles-1e4", "weights-1e3"])
def test_a_setting_changes_weights_and_no_picture(
    name: str, script: Any, checkpoint: Checkpoint
) -> None:
    (case,) = suite("random-large")
    inputs = script._inputs(case, checkpoint)
    _, change = script.SETTINGS[name]
    tensors = change(checkpoint.tensors)
    assert any(not torch.equal(v, checkpoint.tensors[k]) for k, v in tensors.items())
    one, other = (
        script.TorchRunner(Checkpoint(SMALL, t, "", "")).run(inputs)["output"]
        for t in (checkpoint.tensors, tensors)
    )
    assert np.linalg.norm(one - other) < 1e-3 * np.linalg.norm(one)


def test_the_page_and_the_json_say_what_was_measured(script: Any, checkpoint: Checkpoint) -> None:
    options: dict[str, Any] = {"shown": ["one-window"], "device": "cpu", "threads": 1}
    found = script.measure(checkpoint, "as-is", suite("one-window", "border"), **options)
    assert [(o.case, o.form) for o in found.outcomes] == [
        (case, form) for case in ("one-window", "border") for form in script.FORMS
    ]
    by_form = {o.form: o for o in found.outcomes if o.case == "border"}
    assert by_form["typed"].broken == 0.0
    assert by_form["typed"].psnr > script.BAR
    page = script.page(checkpoint, [found], "cpu")
    assert page.count("<img") == 5
    assert "http" not in page
    assert f"{by_form['typed'].psnr:.1f} dB" in page
    figures = json.loads(script.figures(checkpoint, [found], "cpu"))
    assert len(figures["settings"][0]["outcomes"]) == 6


def test_what_is_not_finite_has_no_psnr_and_fails(script: Any) -> None:
    (case,) = suite("one-window")
    expected = np.zeros((1, 3, 128, 128), np.float32)
    actual = expected.copy()
    rows, columns = np.nonzero(~case.keep)
    actual[0, 1, rows[:64], columns[:64]] = np.nan
    outcome = script._outcome("as-is", "pytorch", case, expected, actual)
    assert outcome.psnr is None
    assert outcome.broken == pytest.approx(64 / len(rows))
    assert not outcome.passed
    assert script._in_words(outcome).startswith("not finite (")
    equal = script._outcome("as-is", "pytorch", case, expected, expected)
    assert math.isinf(equal.psnr)
    assert equal.passed
