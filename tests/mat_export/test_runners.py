"""The runner contract: what goes in is checked, what comes out is the caller's own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from small import SMALL

from mat_export.contract import METADATA_KEY, GraphSpec, UserError, check_inputs
from mat_export.runners import OrtRunner, Runner, TorchRunner, open_runner
from mat_torch import Checkpoint, draw, random_checkpoint, save_checkpoint

Arrays = dict[str, NDArray[Any]]


@pytest.fixture(autouse=True)
def _threads_stay_as_they_were() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return random_checkpoint(SMALL, 0)


def inputs_of(
    spec: GraphSpec, seeds: tuple[int, ...] = (1,), height: int = 128, width: int = 128
) -> Arrays:
    rng = np.random.default_rng(seeds[0])
    B = len(seeds)
    if spec.io == "uint8":
        image = rng.integers(0, 256, (B, height, width, 3), dtype=np.uint8)
        mask = rng.integers(0, 2, (B, height, width), dtype=np.uint8) * np.uint8(255)
    else:
        image = rng.uniform(-1, 1, (B, 3, height, width)).astype(np.float32)
        mask = (rng.random((B, 1, height, width)) < 0.5).astype(np.float32)
    random = draw(SMALL, seeds, height, width, noise=spec.noise == "input")
    return {"image": image, "mask": mask, "truncation": np.ones(1, np.float32), **random}


def stand_in(spec: GraphSpec) -> bytes:
    """An ONNX model with this contract, whose output is ``where(mask, image, z[0, 0])``.

    Only some of the inputs reach it, which a runner must not mind.
    """
    tensors = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}

    def info(name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, tensors[name].shape)

    nodes = [
        helper.make_node("Cast", ["mask"], ["keep"], to=TensorProto.BOOL),
        helper.make_node("Gather", ["z", "first"], ["row"], axis=0),
        helper.make_node("Gather", ["row", "first"], ["fill"], axis=0),
        helper.make_node("Where", ["keep", "image", "fill"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "stand-in",
        [info(name) for name in ("image", "mask", "z")],
        [info("output")],
        [helper.make_tensor("first", TensorProto.INT64, [], [0])],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


SPEC = GraphSpec(SMALL, batch=None)

Open = Callable[[GraphSpec], Runner]


@pytest.fixture(params=["torch", "onnxruntime"])
def open_one(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Open:
    """Opens a runner of each kind for a specification."""
    if request.param == "torch":
        return lambda spec: TorchRunner(checkpoint, spec=spec, threads=1)
    return lambda spec: OrtRunner(stand_in(spec), threads=1)


# -- what goes in ----------------------------------------------------------------------------------


def test_every_missing_input_is_a_user_error_that_names_it(open_one: Open) -> None:
    with open_one(SPEC) as runner:
        for name in inputs_of(SPEC):
            others = {k: v for k, v in inputs_of(SPEC).items() if k != name}
            with pytest.raises(UserError, match=rf"'{name}' is missing; the model takes image, "):
                runner.run(others)


def test_an_unknown_input_is_a_user_error_that_names_it(open_one: Open) -> None:
    surplus = {**inputs_of(SPEC), "noise_16": np.zeros((1, 1, 16, 16), np.float32)}
    with open_one(SPEC) as runner, pytest.raises(UserError, match="no input 'noise_16'"):
        runner.run(surplus)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("image", (1, 3, 128, 64)),
        ("image", (3, 128, 128)),
        ("image", (1, 4, 128, 128)),
        ("mask", (1, 3, 128, 128)),
        ("z", (2, 4)),
        ("z", (1, 4, 1)),
        ("truncation", ()),
        ("truncation", (2,)),
        ("gate_tokens", (1, 255, 4)),
        ("gate_bottleneck", (1, 4, 16, 17)),
    ],
    ids=str,
)
def test_an_input_of_another_shape_is_a_user_error_that_names_it(
    name: str, shape: tuple[int, ...], open_one: Open
) -> None:
    misshapen = {**inputs_of(SPEC), name: np.zeros(shape, np.float32)}
    with open_one(SPEC) as runner, pytest.raises(UserError) as caught:
        runner.run(misshapen)
    assert f"input '{name}' is float32 {list(shape)}, the model takes float32 [" in str(
        caught.value
    )


def test_every_input_of_another_type_is_a_user_error_that_names_both(open_one: Open) -> None:
    inputs = inputs_of(SPEC)
    with open_one(SPEC) as runner:
        for name in inputs:
            mistyped = {**inputs, name: inputs[name].astype(np.float64)}
            with pytest.raises(UserError, match=rf"'{name}' is float64 .* takes float32 "):
                runner.run(mistyped)


def test_an_empty_batch_is_a_user_error(open_one: Open) -> None:
    empty = {k: v if k == "truncation" else v[:0] for k, v in inputs_of(SPEC).items()}
    with open_one(SPEC) as runner, pytest.raises(UserError, match=r"'image' .*\[0, 3, 128, 128\]"):
        runner.run(empty)


def test_a_fixed_batch_takes_no_other(open_one: Open) -> None:
    spec = GraphSpec(SMALL, batch=2)
    with open_one(spec) as runner, pytest.raises(UserError, match="'image'"):
        runner.run(inputs_of(spec, (1,)))


@pytest.mark.parametrize(
    "name", ["mask", "gate_tokens", "gate_bottleneck", "noise_16", "noise_128_1"]
)
def test_at_a_dynamic_size_every_input_must_fit_the_image(name: str) -> None:
    spec = GraphSpec(SMALL, dynamic_size=True, noise="input")
    inputs = inputs_of(spec, height=128, width=256)
    check_inputs(spec, inputs)
    with pytest.raises(UserError, match=f"'{name}'"):
        check_inputs(spec, {**inputs, name: inputs_of(spec)[name]})


@pytest.mark.parametrize(("height", "width"), [(64, 128), (128, 200), (0, 128)])
def test_a_size_that_is_no_multiple_is_a_user_error(height: int, width: int) -> None:
    spec = GraphSpec(SMALL, dynamic_size=True, noise="input")
    image = np.zeros((1, 3, height, width), np.float32)
    with pytest.raises(UserError, match=r"multiples of 128|'image'"):
        check_inputs(spec, {**inputs_of(spec), "image": image})


# -- what comes out --------------------------------------------------------------------------------


def test_outputs_have_the_names_shapes_and_types_of_the_specification(
    checkpoint: Checkpoint,
) -> None:
    for spec in (
        GraphSpec(SMALL, batch=None),
        GraphSpec(SMALL, batch=None, coarse=True),
        GraphSpec(SMALL, batch=2, coarse=True, io="uint8"),
        GraphSpec(SMALL, batch=2, noise="input"),
    ):
        with TorchRunner(checkpoint, spec=spec, threads=1) as runner:
            results = runner.run(inputs_of(spec, (1, 2)))
        assert list(results) == [tensor.name for tensor in spec.outputs]
        for tensor in spec.outputs:
            shape = tuple(2 if axis == "batch" else axis for axis in tensor.shape)
            assert results[tensor.name].shape == shape
            assert results[tensor.name].dtype == tensor.dtype


def test_by_default_torch_takes_any_batch_and_gives_the_coarse_image_too(
    checkpoint: Checkpoint,
) -> None:
    with TorchRunner(checkpoint, threads=1) as runner:
        assert runner.spec.batch is None
        assert runner.spec.checkpoint == checkpoint.digest
        inputs = inputs_of(runner.spec, (1, 2))
        both = runner.run(inputs)
        alone = runner.run({k: v if k == "truncation" else v[1:] for k, v in inputs.items()})
    assert list(both) == ["output", "coarse"]
    for name, result in both.items():
        assert result.shape == (2, 3, 128, 128)
        np.testing.assert_allclose(result[1:], alone[name], rtol=1e-4, atol=1e-5)


def test_results_are_the_callers_own_arrays(open_one: Open) -> None:
    inputs = inputs_of(SPEC)
    before = {k: v.copy() for k, v in inputs.items()}
    with open_one(SPEC) as runner:
        first = runner.run(inputs)["output"]
        kept = first.copy()
        first[...] = 7.0  # writable, and no one else's
        again = runner.run(inputs)["output"]
    assert np.array_equal(again, kept)
    assert np.isfinite(again).all()  # still there once the runner is closed
    assert all(np.array_equal(inputs[k], v) for k, v in before.items())
    assert not any(np.shares_memory(again, v) for v in (first, *inputs.values()))


def test_arrays_of_any_layout_give_the_same(open_one: Open) -> None:
    inputs = inputs_of(SPEC)
    odd = {k: np.asfortranarray(v) for k, v in inputs.items()}
    odd["image"] = np.ascontiguousarray(inputs["image"][..., ::-1])[..., ::-1]
    odd["z"].flags.writeable = False
    assert odd["image"].strides[-1] < 0
    with open_one(SPEC) as runner:
        expected, result = runner.run(inputs), runner.run(odd)
    assert np.array_equal(result["output"], expected["output"])


# -- opening and closing ---------------------------------------------------------------------------


def test_a_closed_runner_does_not_run(open_one: Open) -> None:
    runner = open_one(SPEC)
    with runner as entered:
        assert entered is runner
        runner.run(inputs_of(SPEC))
    with pytest.raises(RuntimeError, match="closed"):
        runner.run(inputs_of(SPEC))
    runner.close()  # twice is once


def test_an_error_inside_the_context_closes_it_and_goes_on(open_one: Open) -> None:
    runner = open_one(SPEC)
    with pytest.raises(ZeroDivisionError), runner:
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="closed"):
        runner.run(inputs_of(SPEC))


def test_an_exported_file_brings_its_own_contract(tmp_path: Path) -> None:
    path = tmp_path / "mat.onnx"
    path.write_bytes(stand_in(SPEC))
    with OrtRunner(path) as runner:
        assert runner.spec == SPEC
        assert runner.name == f"ONNX Runtime {ort.__version__}, CPU"
        assert runner.providers == ["CPUExecutionProvider"]


def test_another_contract_may_be_given(checkpoint: Checkpoint) -> None:
    other = SPEC.with_changes(source="elsewhere")
    with OrtRunner(stand_in(SPEC), spec=other) as runner:
        assert runner.spec == other


def foreign() -> bytes:
    """Somebody else's model."""
    model = onnx.ModelProto.FromString(stand_in(SPEC))
    del model.metadata_props[:]
    data: bytes = model.SerializeToString()
    return data


def stale() -> bytes:
    """A model of another version of the contract."""
    model = onnx.ModelProto.FromString(stand_in(SPEC))
    model.metadata_props[0].value = SPEC.to_json().replace('"format": 1', '"format": 99')
    data: bytes = model.SerializeToString()
    return data


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "foreign": (foreign(), "not one that mat-export wrote: export it with 'mat-export onnx'"),
    "stale": (stale(), "version 99 of the graph contract"),
    "truncated": (stand_in(SPEC)[:-40], "ONNX Runtime cannot load"),
    "empty": (b"", "cannot load|not one that mat-export wrote"),
    "a_picture": (b"\x89PNG\r\n\x1a\n" + bytes(64), "ONNX Runtime cannot load"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_model_of_ours_is_a_user_error(name: str, tmp_path: Path) -> None:
    data, said = BAD_FILES[name]
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    with pytest.raises(UserError, match=said) as caught:
        open_runner(path)
    assert "\n" not in str(caught.value)
    if data:  # no bytes are a path to nowhere
        with pytest.raises(UserError, match=said):
            OrtRunner(data)


@pytest.mark.parametrize("name", ["no.onnx", "no.safetensors", "n" * 300 + ".onnx", "nul\0.onnx"])
def test_a_missing_file_is_a_user_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        open_runner(tmp_path / name)


@pytest.mark.parametrize("name", ["folder.onnx", "folder"])
def test_a_folder_is_no_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="there is no file"):
        open_runner(tmp_path / name)


# -- providers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "asked", "chosen"),
    [
        (["CPUExecutionProvider"], None, ["CPUExecutionProvider"]),
        (
            ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
            None,
            ["CUDAExecutionProvider", "CPUExecutionProvider"],
        ),
        (["AzureExecutionProvider", "CPUExecutionProvider"], None, ["CPUExecutionProvider"]),
        (
            ["CUDAExecutionProvider", "CPUExecutionProvider"],
            ["CPUExecutionProvider"],
            ["CPUExecutionProvider"],
        ),
    ],
    ids=["cpu_only", "cuda_first", "no_service", "as_asked"],
)
def test_cuda_is_chosen_where_it_is_offered_and_the_caller_may_choose(
    available: list[str],
    asked: list[str] | None,
    chosen: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session, wanted = ort.InferenceSession, list[list[str]]()

    def record(model: bytes, options: Any, providers: list[str]) -> Any:
        wanted.append(providers)
        return session(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    monkeypatch.setattr(ort, "InferenceSession", record)
    with OrtRunner(stand_in(SPEC), providers=asked):
        assert wanted == [chosen]


# -- any file --------------------------------------------------------------------------------------


def test_the_kind_of_file_decides_what_runs_it(tmp_path: Path, checkpoint: Checkpoint) -> None:
    graph, weights = tmp_path / "mat.ONNX", tmp_path / "mat.safetensors"
    graph.write_bytes(stand_in(SPEC))
    save_checkpoint(checkpoint, weights)
    with open_runner(graph) as runner:
        assert isinstance(runner, OrtRunner)
    with open_runner(weights, threads=1) as runner:
        assert isinstance(runner, TorchRunner)
        assert runner.spec.checkpoint == checkpoint.digest


def test_a_file_that_is_no_checkpoint_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "mat.safetensors"
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="no checkpoint"):
        open_runner(path)


def test_a_checkpoint_without_torch_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mat.safetensors"
    path.write_bytes(b"weights")
    monkeypatch.setitem(sys.modules, "mat_torch.checkpoint", None)
    with pytest.raises(UserError, match=r"needs torch: install mat-export\[export\]"):
        open_runner(path)
