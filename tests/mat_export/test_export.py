"""The exported file: what it computes, what it says about itself, that it is whole or absent."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mat_export import export, functions
from mat_export.contract import OPERATOR_DOMAIN, GraphSpec, UserError, mask_state_names
from mat_export.engine_graph import prepare_engine_graph
from mat_export.export import ExportReport, count_nodes, export_onnx
from mat_export.files import file_digest
from mat_export.inference import REWRITES, InferenceGenerator
from mat_export.lowering import lower_opset
from mat_export.manifest import manifest_path, read_manifest
from mat_export.pixels import to_unit
from mat_export.runners import OrtRunner, TorchRunner
from mat_torch import Checkpoint, draw, preset, random_checkpoint

TINY = preset("mat-tiny-256")
BAR = 1e-5
"""Largest ‖a − b‖ / ‖b‖ between ONNX Runtime and PyTorch."""

EXPORTS: dict[str, tuple[dict[str, Any], int]] = {
    "fixed": ({}, 20),
    "bytes_opset_17": ({"batch": None, "io": "uint8", "coarse": True}, 17),
    "any_size": ({"dynamic_size": True, "noise": "input"}, 20),
}
"""Options and opset of each export that the tests share."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Exported:
    path: Path
    spec: GraphSpec
    opset: int
    report: ExportReport
    progress: list[str]
    model: onnx.ModelProto

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """Those of the graph and of every function."""
        return [*self.model.graph.node, *(n for f in self.model.functions for n in f.node)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """A second thread gains little here, and waits for the first where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return random_checkpoint(TINY, 0)


Export = Callable[[str], Exported]


@pytest.fixture(scope="module")
def exports(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Each export by its name, made once."""
    made: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in made:
            options, opset = EXPORTS[name]
            path = tmp_path_factory.mktemp(name) / "mat.onnx"
            spec, lines = GraphSpec(TINY, **options), list[str]()
            report = export_onnx(checkpoint, path, spec, opset=opset, progress=lines.append)
            made[name] = Exported(path, spec, opset, report, lines, onnx.load(path))
        return made[name]

    return get


@pytest.fixture(scope="module", params=EXPORTS)
def exported(request: pytest.FixtureRequest, exports: Export) -> Exported:
    return exports(request.param)


def inputs_of(spec: GraphSpec, seeds: list[int], height: int = 256, width: int = 256) -> Arrays:
    """Random ones; half of the picture is a hole, in blocks of 16 pixels."""
    rng = np.random.default_rng(seeds[0])
    image = rng.integers(0, 256, (len(seeds), height, width, 3), dtype=np.uint8)
    blocks = rng.integers(0, 2, (len(seeds), height // 16, width // 16), dtype=np.uint8) * 255
    mask = blocks.repeat(16, axis=1).repeat(16, axis=2)
    random = draw(TINY, seeds, height, width, noise=spec.noise == "input")
    shown = (image, mask) if spec.io == "uint8" else to_unit(image, mask)
    return {
        "image": shown[0],
        "mask": shown[1],
        "truncation": np.array([0.8], np.float32),
        **random,
    }


def shape_of(spec: GraphSpec) -> tuple[list[int], int, int]:
    """Seeds, height and width that make use of what is dynamic."""
    return ([3] if spec.batch == 1 else [3, 4]), 256, 512 if spec.dynamic_size else 256


# -- what it computes ------------------------------------------------------------------------------


def test_onnx_runtime_gives_what_pytorch_gives(exported: Exported, checkpoint: Checkpoint) -> None:
    inputs = inputs_of(exported.spec, *shape_of(exported.spec))
    with TorchRunner(checkpoint, spec=exported.spec, threads=1) as reference:
        expected = reference.run(inputs)
    with OrtRunner(exported.path, threads=1) as runner:
        results = runner.run(inputs)
    assert list(results) == list(expected) == [tensor.name for tensor in exported.spec.outputs]
    for name, result in results.items():
        assert result.dtype == expected[name].dtype
        assert result.shape == expected[name].shape
        a, b = result.astype(np.float64), expected[name].astype(np.float64)
        if exported.spec.io == "uint8":
            assert np.abs(a - b).max() <= 1
            assert (a != b).mean() < 1e-3  # rounding of the last bit, here and there
        else:
            assert np.linalg.norm(a - b) <= BAR * np.linalg.norm(b)


def masks() -> dict[str, NDArray[np.uint8]]:
    """Masks [1, 256, 256] that take every layer through its cases."""
    rng = np.random.default_rng(0)
    sparse = (rng.random((1, 256, 256)) < 1e-3).astype(np.uint8) * 255
    pixel = np.zeros((1, 256, 256), np.uint8)
    pixel[0, 255, 0] = 255
    corner = np.zeros((1, 256, 256), np.uint8)
    corner[0, :20, 200:] = 255
    return {"sparse": sparse, "one pixel": pixel, "corner": corner, "hole": np.zeros_like(pixel)}


def test_the_mask_of_every_layer_is_exactly_the_training_forms(
    exported: Exported, checkpoint: Checkpoint
) -> None:
    names = mask_state_names(TINY)
    model = onnx.ModelProto.FromString(exported.model.SerializeToString())
    for name in names:
        kind = TensorProto.BOOL if "blocks" in name else TensorProto.FLOAT
        model.graph.output.append(helper.make_tensor_value_info(f"mask_state/{name}", kind, None))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    generator = checkpoint.build()
    inputs = inputs_of(exported.spec, [0])
    states: dict[str, int] = {}
    for case, mask in masks().items():
        _, unit = to_unit(np.zeros((1, 256, 256, 3), np.uint8), mask)
        inputs["mask"] = mask if exported.spec.io == "uint8" else unit
        results = session.run([f"mask_state/{name}" for name in names], inputs)
        expected = generator.mask_states(torch.from_numpy(unit))
        for name, result in zip(names, results, strict=True):
            reference = expected[name].numpy()
            assert result.shape == reference.shape, (case, name)
            assert np.array_equal(result.astype(np.float32), reference), (case, name)
            states[name] = states.get(name, 0) | (1 if reference.any() else 2)
    assert set(states.values()) == {3}, "each layer's mask was seen with and without kept tokens"


def test_the_contract_names_every_mask_that_reaches_the_output(checkpoint: Checkpoint) -> None:
    states = checkpoint.build().mask_states(torch.ones(1, 1, 256, 256))
    assert [*mask_state_names(TINY), "tran.1.conv"] == list(states)


# -- what it is ------------------------------------------------------------------------------------


def test_the_checker_accepts_the_file_with_full_shape_inference(exported: Exported) -> None:
    onnx.checker.check_model(str(exported.path), full_check=True)
    versions = {o.domain: o.version for o in exported.model.opset_import}
    assert versions == {"": exported.opset, OPERATOR_DOMAIN: 1}


def test_inputs_and_outputs_are_those_of_the_specification(exported: Exported) -> None:
    graph = exported.model.graph

    def declared(info: onnx.ValueInfoProto) -> tuple[str, tuple[int | str, ...], str]:
        kind = info.type.tensor_type
        shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
        return info.name, shape, str(helper.tensor_dtype_to_np_dtype(kind.elem_type))

    spec = exported.spec
    assert [*map(declared, graph.input)] == [(t.name, t.shape, t.dtype) for t in spec.inputs]
    assert [*map(declared, graph.output)] == [(t.name, t.shape, t.dtype) for t in spec.outputs]
    assert all(info.doc_string for info in (*graph.input, *graph.output))


def test_no_transposed_convolution_and_no_randomness_is_in_it(exported: Exported) -> None:
    types = {node.op_type for node in exported.nodes}
    assert "Conv" in types
    banned = {"ConvTranspose", "Multinomial", "Dropout", "Bernoulli"}
    assert not {t for t in types if t in banned or t.startswith("Random")}


def test_every_operator_of_ours_has_its_function_in_the_file(exported: Exported) -> None:
    defined = {(function.domain, function.name) for function in exported.model.functions}
    ours = {(node.domain, node.op_type) for node in exported.nodes if node.domain}
    assert ours == defined
    assert {domain for domain, _ in ours} == {OPERATOR_DOMAIN}
    used = {node.op_type for node in exported.model.graph.node}
    assert used >= {functions.ATTENTION, functions.UNMASKED_ATTENTION, functions.PROPAGATION}


def test_no_function_passes_an_attribute_of_its_own_on_to_another(exported: Exported) -> None:
    # TensorRT's parser inlines one level at a time and reads such an attribute as 0.
    calls = [n for f in exported.model.functions for n in f.node if n.domain == OPERATOR_DOMAIN]
    assert calls
    assert not [a.name for call in calls for a in call.attribute]


NEWER_THAN_17 = {
    "allowzero",
    "antialias",
    "keep_aspect_ratio_policy",
    "noop_with_empty_axes",
    "num_outputs",
}


def test_as_opset_17_it_has_nothing_that_came_later(exported: Exported) -> None:
    model = onnx.ModelProto.FromString(exported.model.SerializeToString())
    if exported.opset > 17:  # as the exporter does it
        lower_opset(model, 17)
        del model.functions[:]
        model.functions.extend(functions.function_library(17, dynamic=exported.spec.dynamic_size))
    onnx.checker.check_model(model, full_check=True)
    nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    assert model.ir_version <= 8
    assert {o.version for f in model.functions for o in f.opset_import if not o.domain} == {17}
    assert not {a.name for node in nodes for a in node.attribute} & NEWER_THAN_17
    reductions = [node for node in nodes if node.op_type.startswith("Reduce")]
    assert {"ReduceMean", "ReduceMax", "ReduceL2"} <= {node.op_type for node in reductions}
    # ReduceSum has its axes as an input since opset 13.
    assert all(len(n.input) == 1 for n in reductions if n.op_type != "ReduceSum")


@pytest.mark.parametrize("opset", [18, 19])
def test_the_opsets_between_pass_the_checker_too(exports: Export, opset: int) -> None:
    model = onnx.ModelProto.FromString(exports("fixed").model.SerializeToString())
    assert lower_opset(model, opset)
    del model.functions[:]
    model.functions.extend(functions.function_library(opset, dynamic=False))
    onnx.checker.check_model(model, full_check=True)


def test_it_is_one_file_without_anything_unread(exported: Exported) -> None:
    assert sorted(p.name for p in exported.path.parent.iterdir()) == ["mat.onnx", "mat.onnx.json"]
    graph = exported.model.graph
    assert not [t.name for t in graph.initializer if t.external_data]
    read = {name for node in graph.node for name in node.input}
    assert {t.name for t in graph.initializer} <= read
    read |= {info.name for info in graph.output}
    assert all(read.intersection(node.output) for node in graph.node)


# -- how it reads ----------------------------------------------------------------------------------


def test_nodes_and_tensors_are_named_after_modules(
    exported: Exported, checkpoint: Checkpoint
) -> None:
    inference = InferenceGenerator(checkpoint.build(), exported.spec)
    modules = {name for name, _ in inference.named_modules()}
    graph = exported.model.graph
    outputs = {info.name for info in graph.output}
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    for node in graph.node:
        module, _, operator = node.name.rpartition("/")
        assert module in modules, node.name
        assert re.fullmatch(rf"{node.op_type}(_\d+)?", operator), node.name
        for i, tensor in enumerate(node.output):
            own = tensor in (node.name, f"{node.name}:{i}")
            assert own or tensor in outputs or tensor.startswith("mask_state/"), tensor


def test_constants_are_named_after_weights_readers_or_their_value(
    exported: Exported, checkpoint: Checkpoint
) -> None:
    weights = set(InferenceGenerator(checkpoint.build(), exported.spec).state_dict())
    graph = exported.model.graph
    nodes = {node.name for node in graph.node}
    names = [tensor.name for tensor in graph.initializer]
    assert len(set(names)) == len(names)
    for name in names:
        by_value = re.fullmatch(r"constant/(float32|int64|int32|bool):[-\d.e,\[\]]+", name)
        assert name in weights or by_value or name.rpartition(".")[0] in nodes, name


def test_traces_of_the_exporter_are_left_out(exported: Exported) -> None:
    graph = exported.model.graph
    assert not graph.metadata_props
    assert not [node.name for node in graph.node if node.metadata_props or node.doc_string]
    assert b"/site-packages/" not in exported.path.read_bytes()


# -- what it says about itself ---------------------------------------------------------------------


def test_the_metadata_hold_the_specification(exported: Exported, checkpoint: Checkpoint) -> None:
    metadata = {entry.key: entry.value for entry in exported.model.metadata_props}
    assert GraphSpec.from_metadata(metadata) == exported.spec.with_changes(
        checkpoint=checkpoint.digest, source=checkpoint.source
    )
    assert exported.model.producer_name == "mat-export"


def test_the_manifest_beside_it_describes_this_very_file(
    exported: Exported, checkpoint: Checkpoint
) -> None:
    manifest = read_manifest(exported.path)
    assert manifest is not None
    digest = file_digest(exported.path)
    assert manifest["sha256"] == exported.report.digest == digest
    assert manifest["bytes"] == exported.report.bytes == exported.path.stat().st_size
    assert manifest["kind"] == "onnx"
    assert manifest["opset"] == exported.report.opset == exported.opset
    assert manifest["made_from"] == {
        "checkpoint_digest": checkpoint.digest,
        "source": checkpoint.source,
    }
    assert manifest["graph"]["io"] == exported.spec.io
    assert manifest["versions"]["onnx"] == onnx.__version__
    assert str(exported.path.parent) not in manifest_path(exported.path).read_text()


def test_another_file_under_the_manifest_is_noticed(exports: Export, tmp_path: Path) -> None:
    source = exports("fixed").path
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(source.read_bytes()[:-1])
    manifest_path(copy).write_bytes(manifest_path(source).read_bytes())
    with pytest.raises(UserError, match="is not the file its manifest"):
        read_manifest(copy)


def test_the_report_counts_nodes_and_rewrites(exported: Exported) -> None:
    report = exported.report
    assert report.path == str(exported.path)
    assert report.nodes == count_nodes(exported.model) == len(exported.nodes)
    assert report.nodes <= 700
    assert report.inlined_nodes > len(exported.model.graph.node)
    absent = {"constant-noise"} if exported.spec.noise == "input" else set()
    assert set(report.rewrites) == set(REWRITES) - absent
    assert report.seconds > 0


def test_progress_is_a_line_for_each_step(exported: Exported) -> None:
    steps = ["rewriting", "tracing", "naming", "checking", "writing"]
    if exported.opset < 20:
        steps.insert(3, "lowering to opset 17")
    assert len(exported.progress) == len(steps)
    assert all(map(str.startswith, exported.progress, steps))


def test_the_same_weights_and_options_give_the_same_bytes(
    exports: Export, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    first = exports("fixed")
    again = tmp_path / "again.onnx"
    export_onnx(checkpoint, again)
    assert file_digest(again) == first.report.digest
    assert manifest_path(again).read_bytes() == manifest_path(first.path).read_bytes()


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [16, 21])
def test_an_opset_out_of_range_is_a_user_error(
    opset: int, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"opset {opset} is not from 17 to 20"):
        export_onnx(checkpoint, tmp_path / "mat.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> onnx.ModelProto:
    """What export_onnx writes instead of translating the network."""
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "quick", [info], [])
    graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1]))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    monkeypatch.setattr(export, "build_model", lambda *args, **options: (model, {}))
    return model


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, with what it holds."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(
    "target",
    ["missing/mat.onnx", "file/mat.onnx", "folder", "n" * 300 + ".onnx"],
    ids=lambda t: t[:8],
)
def test_a_place_that_cannot_be_written_is_a_user_error_before_any_work(
    target: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    before, lines = tree(tmp_path), list[str]()
    with pytest.raises(UserError, match=target[:8]):
        export_onnx(checkpoint, tmp_path / target, progress=lines.append)
    assert tree(tmp_path) == before
    assert not lines


def test_a_folder_without_permission_is_a_user_error(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *arguments: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # tests may run as root, who may do all
    with pytest.raises(UserError, match=r"mat\.onnx' cannot be written: permission denied"):
        export_onnx(checkpoint, tmp_path / "mat.onnx")
    assert not list(tmp_path.iterdir())


def test_a_manifest_that_cannot_be_written_keeps_the_model_from_being_written(
    checkpoint: Checkpoint, tmp_path: Path, quick: onnx.ModelProto
) -> None:
    (tmp_path / "mat.onnx.json").mkdir()
    with pytest.raises(UserError, match=r"mat\.onnx\.json"):
        export_onnx(checkpoint, tmp_path / "mat.onnx")
    assert tree(tmp_path) == {"mat.onnx.json": None}


@pytest.mark.parametrize(
    ("stop", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
    ],
    ids=["interrupted", "disk_full"],
)
@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_write_that_does_not_finish_leaves_the_old_files_as_they_were(
    stop: BaseException,
    raised: type[BaseException],
    step: str,
    checkpoint: Checkpoint,
    tmp_path: Path,
    quick: onnx.ModelProto,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "mat.onnx"
    path.write_bytes(b"old model")
    manifest_path(path).write_bytes(b"old manifest")
    before = tree(tmp_path)

    def half(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise stop

    def fail(source: Any, target: Any) -> None:
        raise stop

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(Path, "write_bytes", half)
        else:
            patch.setattr(os, "replace", fail)
        with pytest.raises(raised):
            export_onnx(checkpoint, path)
    assert tree(tmp_path) == before


def test_a_file_that_is_there_is_replaced_with_ordinary_permissions(
    checkpoint: Checkpoint, tmp_path: Path, quick: onnx.ModelProto
) -> None:
    path = tmp_path / "mat.onnx"
    path.write_bytes(b"old model")
    report = export_onnx(checkpoint, path)
    assert path.read_bytes() == quick.SerializeToString()
    assert report.digest == file_digest(path)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mat.onnx", "mat.onnx.json"]


# -- other sizes and readers -----------------------------------------------------------------------


def test_the_published_size_stays_within_its_bounds(tmp_path: Path) -> None:
    path = tmp_path / "mat.onnx"
    report = export_onnx(random_checkpoint(preset("mat-512"), 0), path)
    assert report.nodes <= 700
    assert report.bytes == path.stat().st_size <= 260 * 10**6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mat.onnx", "mat.onnx.json"]
    # What plugins find in it; another number means that a pass over the graph misses something.
    assert prepare_engine_graph(path, "fp16", opset=17, plugins=True).passes["plugins"] == {
        "FusedEpilogue": 24,
        "MapAttention": 9,
        "MaskPropagation": 5,
        "MaskedMapAttention": 5,
        "MaskedWindowAttention": 0,
        "TokenNorm": 14,
        "WindowAttention": 0,
    }


def test_tensorrt_parses_the_file_as_it_is(exported: Exported) -> None:
    trt = pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is installed on some machines only"
    )
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    parsed = parser.parse_from_file(str(exported.path))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    assert names == [tensor.name for tensor in exported.spec.inputs]
