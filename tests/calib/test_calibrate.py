"""From an FP32 file to one that TensorRT builds in INT8."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from PIL import Image
from rtx_plan import convolution_work, read_plan
from small_calibration import NETWORK, OPTIONS
from typer.testing import CliRunner

import cli
from calib.calibrate import (
    COLUMNS,
    Calibration,
    CalibrationOptions,
    calibrate,
    recipe_path,
    record_path,
)
from calib.candidates import find_candidates
from calib.recipe import Recipe
from calib.samples import Pictures, Sample
from mat_export.contract import GraphSpec, UserError
from mat_export.engine_graph import calibration_of, prepare_engine_graph
from mat_export.inspection import describe
from mat_export.manifest import manifest_path, read_manifest
from mat_export.parity import RegionError, check_parity, open_candidate
from mat_export.resampling import resample_densely
from mat_export.suite import cases

Quantized = tuple[Path, Calibration]


def test_the_target_is_met_with_most_of_the_work(small_calibration: Quantized) -> None:
    _, done = small_calibration
    assert done.quality.mean_db >= OPTIONS.target_db
    assert 0 < len(done.recipe.layers) < len(done.candidates.all)
    assert done.share > 0.7
    assert done.equalized > 5
    assert not done.reused


def test_the_file_says_what_it_is(small_calibration: Quantized, small_fp32: Path) -> None:
    path, done = small_calibration
    model = onnx.load(path)
    spec, before = GraphSpec.of_model(model), GraphSpec.of_model(onnx.load(small_fp32))
    assert before is not None
    assert spec == before.with_changes(precision="int8")
    facts = calibration_of(model)
    manifest = read_manifest(path)
    assert manifest is not None
    assert manifest["calibration"] == facts
    assert facts is not None
    assert facts["layers"] == len(done.recipe.layers)
    assert facts["mean_db"] == done.quality.mean_db
    assert Recipe.from_file(recipe_path(path), NETWORK.name) == done.recipe
    shown = describe(path)
    assert shown["precision"] == "int8"
    assert shown["calibration"].startswith(f"{len(done.recipe.layers)} layers in INT8, ")


def test_onnx_runtime_is_near_fp32_on_hard_masks(
    small_calibration: Quantized, small_fp32: Path
) -> None:
    """Untrained weights: ψ = 2 and holes of nearly everything are beyond what they are held to."""
    suite = [case for case in cases(128, 128) if case.truncation <= 1.0]
    with (
        open_candidate(small_calibration[0], threads=1) as candidate,
        open_candidate(small_fp32, threads=1) as reference,
    ):
        report = check_parity(candidate, reference, suite=suite)

    def psnr(error: RegionError) -> float:
        return np.inf if error.psnr is None else error.psnr

    values = [psnr(case.hole) for case in report.cases if case.hole.pixels]
    assert report.precision == "int8"
    assert all(case.kept_exact and case.masks and not case.wrong_masks for case in report.cases)
    assert np.mean(values) >= 32.0
    assert min(values) >= 27.0


def test_the_same_inputs_give_the_same_bytes(
    small_calibration: Quantized, small_fp32: Path, tmp_path: Path
) -> None:
    path, done = small_calibration
    again = tmp_path / path.name
    notes: list[str] = []
    result = calibrate(small_fp32, again, OPTIONS, note=notes.append)
    assert any("wrote the record" in text for text in notes)
    for one in (path, record_path(path), recipe_path(path)):
        assert (tmp_path / one.name).read_bytes() == one.read_bytes(), one.name
    assert result.to_dict() == done.to_dict()


def test_the_default_number_of_threads_gives_the_same_bytes(
    small_calibration: Quantized, small_fp32: Path, tmp_path: Path
) -> None:
    """Of this network any number does; of others as many alone (`calib.record`)."""
    path, _ = small_calibration
    calibrate(small_fp32, tmp_path / path.name, replace(OPTIONS, threads=None))
    for one in (path, record_path(path), recipe_path(path)):
        assert (tmp_path / one.name).read_bytes() == one.read_bytes(), one.name


def test_an_interrupted_calibration_goes_on_to_the_same_bytes(
    small_calibration: Quantized, small_fp32: Path, tmp_path: Path
) -> None:
    path, _ = small_calibration
    output, told = tmp_path / path.name, list[str]()

    def interrupted(what: str, done: int, total: int) -> None:
        if what.startswith("costs in sample 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(small_fp32, output, OPTIONS, progress=interrupted)
    assert list(tmp_path.iterdir()) == [record_path(output)]
    kept = json.loads(record_path(output).read_text())["costs"]
    assert {len(noises) for noises in kept.values()} == {2}
    calibrate(small_fp32, output, OPTIONS, progress=lambda what, *_: told.append(what))
    assert told[0].startswith("costs in sample 3"), "ranges and two samples are there"
    for one in (path, record_path(path), recipe_path(path)):
        assert (tmp_path / one.name).read_bytes() == one.read_bytes(), one.name


@pytest.mark.parametrize(("pictures", "shared"), [(12, 0), (8, 4)])
def test_checks_are_of_other_pictures_where_there_are_enough(
    small_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: int, shared: int
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(pictures):
        Image.new("RGB", (128, 128), (i, i, i)).save(images / f"{i}.png")
    drawn: list[set[str]] = []
    notes: list[str] = []

    def draw(spec: GraphSpec, pictures: Pictures, count: int, seed: int) -> list[Sample]:
        drawn.append({*pictures.first(count)})
        return []

    def stop(model: onnx.ModelProto) -> None:
        raise UserError("drawn")

    monkeypatch.setattr("calib.calibrate.draw_samples", draw)
    monkeypatch.setattr("calib.calibrate.resample_densely", stop)
    options = replace(OPTIONS, images=images)
    with pytest.raises(UserError, match="drawn"):
        calibrate(small_fp32, tmp_path / "out.onnx", options, note=notes.append)
    counted, checks = drawn
    assert len(counted) == len(checks) == 6
    assert len(counted & checks) == shared
    said = ["4 pictures are in the samples and the checks: with 12 pictures or more none is"]
    assert notes == (said if shared else [])


def test_a_record_is_reused_and_a_recipe_replayed(
    small_calibration: Quantized, small_fp32: Path, tmp_path: Path
) -> None:
    path, done = small_calibration
    told: list[str] = []
    result = calibrate(
        small_fp32,
        tmp_path / path.name,
        OPTIONS,
        record=record_path(path),
        recipe=recipe_path(path),
        progress=lambda what, *_: told.append(what),
    )
    assert result.reused
    assert result.recipe == replace(done.recipe, target_db=None)
    assert result.quality == done.quality
    assert told == [f"measuring {len(done.recipe.layers)} layers"]
    nodes = [[n.name for n in onnx.load(p).graph.node] for p in (path, tmp_path / path.name)]
    assert nodes[0] == nodes[1]


def test_a_replay_alone_measures_no_costs(
    small_calibration: Quantized, small_fp32: Path, tmp_path: Path
) -> None:
    path, done = small_calibration
    told: list[str] = []
    output = tmp_path / "other.onnx"
    result = calibrate(
        small_fp32,
        output,
        OPTIONS,
        recipe=recipe_path(path),
        progress=lambda what, *_: told.append(what),
    )
    assert not any("costs" in what for what in told)
    assert result.quality == done.quality
    assert all(row[3] == "–" for row in result.rows())
    assert not json.loads(record_path(output).read_text())["costs"]


def test_a_record_of_another_seed_is_refused(
    small_calibration: Quantized, small_fp32: Path, tmp_path: Path
) -> None:
    path, _ = small_calibration
    with pytest.raises(UserError, match=r"record of another calibration .*seed: 0, now 1"):
        calibrate(
            small_fp32, tmp_path / "x.onnx", replace(OPTIONS, seed=1), record=record_path(path)
        )
    assert not list(tmp_path.iterdir())


def test_the_table_has_every_layer_the_costliest_first(small_calibration: Quantized) -> None:
    _, done = small_calibration
    rows = done.rows()
    assert len(rows) == len(done.candidates.all)
    assert all(len(row) == len(COLUMNS) for row in rows)
    costs = [float(row[3]) for row in rows]
    assert costs == sorted(costs)
    assert {row[2] for row in rows} == {"INT8", "half"}
    assert sum(float(row[4]) for row in rows) == pytest.approx(98, abs=2.5)


# -- as TensorRT gets it ---------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [17, 22])
def test_the_graph_of_an_engine_is_typed(small_calibration: Quantized, opset: int) -> None:
    """8.6 parses opset 17 and gets FP32 alone (`free_types`); later ones take half as it comes."""
    path, done = small_calibration
    prepared = prepare_engine_graph(path, "int8", opset=opset, weakly_typed=opset == 17)
    graph = onnx.shape_inference.infer_shapes(
        prepared.model, check_type=True, strict_mode=True
    ).graph
    assert prepared.spec.precision == "int8"
    assert not prepared.model.functions
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    makers = {name: node for node in graph.node for name in node.output}
    inner = {t.name: t.data_type for t in graph.initializer}
    for name in done.recipe.layers:
        node = next(n for n in graph.node if n.name == name)
        assert {makers[read].op_type for read in node.input[:2]} == {"DequantizeLinear"}
        wanted = TensorProto.FLOAT if opset < 19 else TensorProto.FLOAT16
        assert types[node.output[0]] == wanted
        scales = {inner[makers[read].input[1]] for read in node.input[:2]}
        assert scales == {wanted}
    names = {n.name for n in graph.node if n.op_type == "QuantizeLinear"}
    forbidden = ("mapping", "styles", "Attention", "MaskPropagation", "toRGB", "to_style", "pool")
    assert names
    assert not any(word in name for name in names for word in forbidden)


def test_tensorrt_8_gets_no_weights_in_int8(small_calibration: Quantized) -> None:
    """It has no such constants; the numbers that they stand for become the same integers again."""
    graph = prepare_engine_graph(
        small_calibration[0], "int8", opset=17, weakly_typed=True
    ).model.graph
    newer = prepare_engine_graph(small_calibration[0], "int8", opset=22).model.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    given = {t.name: numpy_helper.to_array(t) for t in newer.initializer}
    assert not any(v.any() for v in constants.values() if v.dtype == np.int8), "but zero points"
    pairs = [n for n in graph.node if n.name.endswith("/int8/rounded")]
    assert len(pairs) == sum(v.dtype == np.int8 and v.any() for v in given.values()) > 0
    evaluate = ReferenceEvaluator(_alone(pairs, graph))
    for name, rounded in zip([n.output[0] for n in pairs], evaluate.run(None, {}), strict=True):
        assert np.array_equal(rounded, given[name.removesuffix("/rounded")])


def _alone(nodes: list[onnx.NodeProto], graph: onnx.GraphProto) -> onnx.ModelProto:
    """A model of nodes that read constants alone."""
    outputs = [helper.make_tensor_value_info(n.output[0], TensorProto.INT8, None) for n in nodes]
    read = {name for node in nodes for name in node.input}
    held = [tensor for tensor in graph.initializer if tensor.name in read]
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(
        helper.make_graph(nodes, "pairs", [], outputs, held), opset_imports=opset
    )


def test_the_rest_in_half_costs_little(
    small_calibration: Quantized, small_fp32: Path, tmp_path: Path
) -> None:
    """Half tensors stored in half, as a GPU does."""
    graph = prepare_engine_graph(small_calibration[0], "int8", opset=20).model
    typed = tmp_path / "typed.onnx"
    onnx.save(graph, typed)
    suite = [case for case in cases(128, 128) if case.name in ("random-large", "random-small")]
    with (
        open_candidate(typed, threads=1) as candidate,
        open_candidate(small_fp32, threads=1) as reference,
    ):
        report = check_parity(candidate, reference, suite=suite)
    assert "stored in half" in report.candidate
    assert report.passed
    assert min(case.hole.psnr or 0.0 for case in report.cases) > 35.0


def test_tensorrt_rtx_computes_the_layers_in_int8(
    small_calibration: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, done = small_calibration
    plan = tmp_path / "model.plan"
    arguments = ["trt", path, "--int8", "--target", "sm_89", "-o", plan]
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    manifest = json.loads(manifest_path(plan).read_text())
    assert manifest["graph"]["precision"] == "int8"
    assert manifest["sources"]["calibration"]["layers"] == len(done.recipe.layers)
    graph = prepare_engine_graph(path, "int8", opset=22).model
    work, listing = convolution_work(graph), read_plan(plan.read_bytes())
    assert set(listing.convolutions) == set(work), "the plan's listing has another form"
    assert listing.int8 == set(done.recipe.layers)
    assert sum(work[name] for name in listing.int8) >= 0.8 * sum(work.values())
    # Rounding goes along with what makes a value, but for what comes out of a convolution bare.
    alone = [
        layers for layers in listing.kernels if layers and all("Linear" in name for name in layers)
    ]
    bare = {
        n.name for n in graph.graph.node if n.op_type == "Conv" and n.name.endswith("blur/Conv")
    }
    assert all(name.rpartition("/")[0] in bare for layers in alone for name in layers)


# -- what cannot be --------------------------------------------------------------------------------


def test_what_cannot_be_calibrated_is_refused(
    small_calibration: Quantized, small_fp32: Path, tmp_path: Path
) -> None:
    path, _ = small_calibration
    output = tmp_path / "out.onnx"
    with pytest.raises(UserError, match="is quantized already: start from the FP32 file"):
        calibrate(path, output, OPTIONS)
    half = tmp_path / "half.onnx"
    onnx.save(prepare_engine_graph(small_fp32, "fp16", opset=20).model, half)
    with pytest.raises(UserError, match="is in fp16 already"):
        calibrate(half, output, OPTIONS)
    foreign = tmp_path / "foreign.onnx"
    model = onnx.load(small_fp32)
    del model.metadata_props[:]
    onnx.save(model, foreign)
    with pytest.raises(UserError, match="not one that mat-export wrote"):
        calibrate(foreign, output, OPTIONS)
    with pytest.raises(UserError, match="there is no file"):
        calibrate(tmp_path / "none.onnx", output, OPTIONS)
    with pytest.raises(UserError, match="is an input"):
        calibrate(small_fp32, small_fp32, OPTIONS)
    with pytest.raises(UserError, match="there is no folder"):
        calibrate(small_fp32, output, replace(OPTIONS, images=tmp_path / "nowhere"))
    assert not output.exists()


def test_an_engine_takes_just_the_file_it_is_of(
    small_calibration: Quantized, small_fp32: Path
) -> None:
    with pytest.raises(UserError, match="quantize it first, with 'mat-export calibrate'"):
        prepare_engine_graph(small_fp32, "int8", opset=20)
    with pytest.raises(UserError, match="in int8: build it with --int8"):
        prepare_engine_graph(small_calibration[0], "fp16", opset=20)


def test_a_recipe_with_a_layer_the_model_lacks_is_refused(small_fp32: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(Recipe(NETWORK.name, ("nowhere/Conv",)).to_json())
    with pytest.raises(UserError, match="no layer 'nowhere/Conv'"):
        calibrate(small_fp32, tmp_path / "out.onnx", OPTIONS, recipe=recipe)


def test_a_recipe_says_that_filters_were_allowed(small_fp32: Path, tmp_path: Path) -> None:
    dense, _ = resample_densely(onnx.load(small_fp32))
    spec = GraphSpec.of_model(dense)
    assert spec is not None
    found = find_candidates(dense, spec, filters=True).all
    layers = next(c.name for c in found if c.kind == "filter"), found[0].name
    recipe, output = tmp_path / "recipe.json", tmp_path / "out.onnx"
    recipe.write_text(Recipe(NETWORK.name, layers).to_json())
    with pytest.raises(UserError, match=r"no layer .* \(resampling filters .* with --filters"):
        calibrate(small_fp32, output, OPTIONS, recipe=recipe)
    recipe.write_text(Recipe(NETWORK.name, layers, filters=True).to_json())
    done = calibrate(small_fp32, output, OPTIONS, recipe=recipe)
    assert {*done.recipe.layers} == {*layers}
    assert Recipe.from_file(recipe_path(output), NETWORK.name).filters


def test_a_recipe_is_not_replaced_by_its_replay(small_fp32: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mat-int8.recipe.json"
    recipe.write_text(Recipe(NETWORK.name, ("any/Conv",)).to_json())
    words = r"is where the recipe of '.*mat-int8\.onnx' is written: name another output with -o"
    with pytest.raises(UserError, match=words):
        calibrate(small_fp32, tmp_path / "mat-int8.onnx", OPTIONS, recipe=recipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 5}, "needs 6 samples or more, got 5"),
        ({"checks": 0}, "needs 6 checks or more, got 0"),
        ({"seed": -1}, "a seed is a whole number"),
        ({"target_db": float("nan")}, "a target is from 0 to 100 dB"),
    ],
)
def test_options_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CalibrationOptions(**options)  # type: ignore[arg-type]


# -- the command -----------------------------------------------------------------------------------


def test_the_command_prints_the_table_and_writes_the_figures(
    small_calibration: Quantized, small_fp32: Path, tmp_path: Path
) -> None:
    path, done = small_calibration
    output, figures = tmp_path / "out.onnx", tmp_path / "figures.json"
    arguments = [small_fp32, "-o", output, "--record", record_path(path), "--json", figures]
    arguments += ["--samples", 6, "--checks", 6, "--threads", 1, "--target-db", OPTIONS.target_db]
    result = CliRunner().invoke(cli.app, ["calibrate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert all(c.name[:30] in result.output for c in done.candidates.all)
    assert f"{len(done.recipe.layers)} of {len(done.candidates.all)} layers" in result.output
    assert f"mat-export trt {output} --int8" in result.output.replace("\n", "")
    assert json.loads(figures.read_text()) == json.loads(json.dumps(done.to_dict()))
    assert onnx.load(output).graph == onnx.load(path).graph


def test_trt_says_which_file_it_needs(small_calibration: Quantized, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    arguments = [small_calibration[0], "-o", tmp_path / "x.plan", "--target", "sm_89"]
    result = CliRunner().invoke(cli.app, ["trt", *map(str, arguments)])
    assert isinstance(result.exception, UserError)
    assert "build it with --int8" in str(result.exception)


def test_debug_says_that_an_int8_file_has_no_fp32_form(small_calibration: Quantized) -> None:
    arguments = ["debug", str(small_calibration[0]), "--precision", "int8"]
    result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, UserError)
    assert "has none" in str(result.exception)
