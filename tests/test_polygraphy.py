"""NVIDIA Polygraphy, which shares no code with us, runs our files to our own outputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from mat_export.bench import example_inputs
from mat_export.engine_graph import prepare_engine_graph
from mat_export.inlining import inline_functions
from mat_export.runners import OrtRunner

WHY = "Polygraphy is not installed: pip install polygraphy"
comparator: Any = pytest.importorskip("polygraphy.comparator", reason=WHY)
onnxrt: Any = pytest.importorskip("polygraphy.backend.onnxrt", reason=WHY)
json: Any = pytest.importorskip("polygraphy.json", reason=WHY)

Arrays = dict[str, NDArray[Any]]

RELATIVE = 1e-5
"""Largest difference of a value, of itself or of the largest value of the image."""


@pytest.fixture(scope="module")
def ours(tiny_onnx: Path) -> tuple[Arrays, Arrays]:
    """A photograph with a hole, and what our runner makes of it."""
    with OrtRunner(tiny_onnx) as runner:
        inputs = example_inputs(runner.spec, 1)
        return inputs, runner.run(inputs)


@pytest.fixture(scope="module", params=["with functions", "inlined"])
def file(
    request: pytest.FixtureRequest, tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The export as it is, and as runtimes without functions read it."""
    if request.param == "with functions":
        return tiny_onnx
    path: Path = tmp_path_factory.mktemp("inlined") / "inlined.onnx"
    onnx.save(inline_functions(onnx.load(tiny_onnx)), path)
    return path


def absolute(outputs: Arrays) -> float:
    return RELATIVE * float(np.abs(outputs["output"]).max())


def ours_as_theirs(outputs: Arrays) -> Any:
    """Our outputs as Polygraphy keeps those of one run."""
    result = comparator.IterationResult(outputs, runner_name="mat-export")
    return comparator.RunResults([("mat-export", [result])])


def polygraphy_run(
    file: Path, inputs: Arrays, outputs: Arrays, folder: Path
) -> subprocess.CompletedProcess[str]:
    """``polygraphy run``: its ONNX Runtime against saved outputs. Exit code 1 if they differ."""
    json.save_json([inputs], str(folder / "inputs.json"))
    ours_as_theirs(outputs).save(str(folder / "outputs.json"))
    tool = "import sys; from polygraphy.tools import main; sys.exit(main())"
    return subprocess.run(
        [
            *(sys.executable, "-c", tool, "run", str(file), "--onnxrt"),
            *("--providers", "cpu", "--validate"),
            *("--load-inputs", "inputs.json", "--load-outputs", "outputs.json"),
            *("--rtol", str(RELATIVE), "--atol", str(absolute(outputs))),
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )


def test_the_command_line_finds_our_outputs_equal(
    file: Path, ours: tuple[Arrays, Arrays], tmp_path: Path
) -> None:
    done = polygraphy_run(file, *ours, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED | Output: 'output'" in done.stdout


def test_the_command_line_finds_one_changed_value(
    tiny_onnx: Path, ours: tuple[Arrays, Arrays], tmp_path: Path
) -> None:
    inputs, outputs = ours
    changed = outputs["output"].copy()
    changed[0, 1, 128, 128] += 3e-5 * np.abs(changed).max()
    done = polygraphy_run(tiny_onnx, inputs, {"output": changed}, tmp_path)
    assert done.returncode == 1
    assert "FAILED | Output: 'output'" in done.stdout


def test_its_comparator_agrees_and_sees_a_changed_input(
    file: Path, ours: tuple[Arrays, Arrays]
) -> None:
    inputs, outputs = ours
    other = {**inputs, "z": -inputs["z"]}
    session = onnxrt.SessionFromOnnx(str(file), providers=["cpu"])
    theirs = comparator.Comparator.run(
        [onnxrt.OnnxrtRunner(session, name="polygraphy")], data_loader=[inputs, other]
    )
    assert comparator.Comparator.validate(theirs)
    (_, results) = theirs[0]
    compare = comparator.CompareFunc.simple(rtol=RELATIVE, atol=absolute(outputs))
    for result, equal in zip(results, (True, False), strict=True):
        assert list(result) == ["output"]
        both = comparator.RunResults([("theirs", [result]), *ours_as_theirs(outputs)])
        found = comparator.Comparator.compare_accuracy(both, compare_func=compare)
        assert bool(found) is equal


def test_the_command_line_runs_the_file_that_engines_are_built_of(
    tiny_onnx: Path, ours: tuple[Arrays, Arrays], tmp_path: Path
) -> None:
    lowered = tmp_path / "fp16.onnx"
    onnx.save(prepare_engine_graph(tiny_onnx, "fp16", opset=20).model, lowered)
    inputs, fp32 = ours
    with OrtRunner(lowered) as runner:
        outputs = runner.run(inputs)
    done = polygraphy_run(lowered, inputs, outputs, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED | Output: 'output'" in done.stdout
    done = polygraphy_run(lowered, inputs, fp32, tmp_path)
    assert done.returncode == 1, "FP16 and FP32 are told apart"
