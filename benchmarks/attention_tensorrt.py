"""Masked window attention on a GPU: what TensorRT makes of the graph without plugins.

    python benchmarks/attention_tensorrt.py build FOLDER [--batches 1,8]
    python benchmarks/attention_tensorrt.py time FOLDER -o tensorrt.json

The other half of ``attention.py``, for a Python that has TensorRT and no PyTorch. ``build`` makes
an engine of each of the network's blocks: the operator's own function in FP16, as ``mat-export trt
--plugins off`` has it. ``time`` runs them as ``attention.py`` runs its ways, q, k, v, the map of
valid tokens and the result on the GPU: CUDA graphs of many calls on rotating inputs, larger
together than twice the cache, or on two; medians of replays, a call. Each engine's result is held
against ONNX Runtime in FP32 on the same inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from attention_blocks import BAR, HEAD_SIZE, HEADS, Block, blocks, count_of_sets
from numpy.typing import NDArray
from onnx import TensorProto, helper

from engines import cuda
from engines.backend.base import Backend
from engines.backend.finding import open_backend
from engines.backend.hooks import BuildHooks
from engines.options import BuildOptions
from mat_export.contract import METADATA_KEY, OPERATOR_DOMAIN, GraphSpec
from mat_export.files import atomic_write
from mat_export.functions import ATTENTION, function_library
from mat_export.inlining import inline_functions
from mat_export.precision import apply_precision
from mat_torch.config import preset

NAMES = ("q", "k", "v")


def attention_model(block: Block, opset: int) -> onnx.ModelProto:
    """One call of the operator, in FP32: q, k, v [B, H, W, C], valid [B, 1, H, W] → y."""
    call = helper.make_node(
        ATTENTION,
        [*NAMES, "valid"],
        ["inner"],
        "attention",
        domain=OPERATOR_DOMAIN,
        window=block.window,
        shift=block.shift,
        height=block.side,
        width=block.side,
        heads=HEADS,
    )
    last = helper.make_node("Cast", ["inner"], ["y"], "y", to=TensorProto.FLOAT)
    shape = list(block.shape)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in NAMES]
    mask = [block.batch, 1, block.side, block.side]
    inputs.append(helper.make_tensor_value_info("valid", TensorProto.BOOL, mask))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(OPERATOR_DOMAIN, 1)]
    model = helper.make_model(
        helper.make_graph([call, last], "attention", inputs, [output]),
        opset_imports=imports,
        functions=function_library(opset, dynamic=False),
        ir_version=8,
    )
    spec = GraphSpec(preset("mat-512"))  # typing asks whose graph it is
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    return model


def typed_model(block: Block, opset: int) -> onnx.ModelProto:
    """The same without functions, in FP16 from its inputs to its output."""
    plain = onnx.shape_inference.infer_shapes(inline_functions(attention_model(block, opset)))
    model = apply_precision(plain, "fp16").model
    for value in (*model.graph.input, *model.graph.output):
        if value.name != "valid":
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    last = next(node for node in model.graph.node if node.name == "y")
    last.attribute[0].i = TensorProto.FLOAT16
    without_casts(model, {*NAMES})
    return onnx.shape_inference.infer_shapes(model)


def without_casts(model: onnx.ModelProto, halves: set[str]) -> None:
    """Drop casts of what is in half already; `halves` are inputs that are."""
    renamed: dict[str, str] = {}
    nodes = list(model.graph.node)
    del model.graph.node[:], model.graph.value_info[:]
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        half = node.input[0] in halves
        if node.op_type == "Cast":
            to = node.attribute[0].i
            if to == TensorProto.FLOAT16 and half and node.output[0] != "y":
                renamed[node.output[0]] = node.input[0]
                continue
            half = to == TensorProto.FLOAT16
        if half:
            halves.update(node.output)
        model.graph.node.append(node)


def draw(block: Block, seed: int) -> dict[str, NDArray[Any]]:
    """Random tokens, a tenth of them valid."""
    rng = np.random.default_rng(seed)
    drawn: dict[str, NDArray[Any]] = {
        name: rng.standard_normal(block.shape, dtype=np.float32) for name in NAMES
    }
    drawn["q"] *= np.float32(HEAD_SIZE**-0.5)
    halves: dict[str, NDArray[Any]] = {name: x.astype(np.float16) for name, x in drawn.items()}
    halves["valid"] = rng.random((block.batch, 1, block.side, block.side)) < 0.1
    return halves


def expected(block: Block, x: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """The operator's function in FP32, by ONNX Runtime."""
    import onnxruntime

    model = inline_functions(attention_model(block, 17)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    feed = {name: x[name].astype(np.float32) for name in NAMES} | {"valid": x["valid"]}
    result: NDArray[Any] = session.run(None, feed)[0]
    return result


def plan_path(folder: Path, block: Block) -> Path:
    """Where a block's engine lies."""
    name = f"{block.side}-{block.window}-{block.shift}-{block.batch}.plan"
    return folder / name


def build(arguments: argparse.Namespace) -> None:
    """An engine of each block."""
    backend = open_backend("auto")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for block in blocks([int(n) for n in arguments.batches.split(",")]):
        started = time.perf_counter()
        model = typed_model(block, min(backend.opset, 18)).SerializeToString()
        plan = backend.build(model, BuildOptions(), {}, BuildHooks())
        atomic_write(plan_path(arguments.folder, block), plan)
        print(f"{time.perf_counter() - started:5.1f} s  {block.name}", flush=True)


class Engine:
    """A block's engine with its sets of inputs on the GPU."""

    def __init__(self, backend: Backend, plan: Path, sets: list[dict[str, NDArray[Any]]]) -> None:
        self._engine = backend.deserialize(plan.read_bytes())
        self._context = backend.create_context(self._engine)
        self._stream = cuda.Stream()
        self._sets = [{name: self._placed(x) for name, x in drawn.items()} for drawn in sets]
        self.shape = sets[0]["q"].shape
        self._results = [cuda.DeviceBuffer(drawn["q"].nbytes) for drawn in sets]

    def _placed(self, array: NDArray[Any]) -> cuda.DeviceBuffer:
        memory = cuda.DeviceBuffer(array.nbytes)
        host = np.ascontiguousarray(array)
        cuda.copy_to_device(memory.handle, host.ctypes.data, array.nbytes, self._stream.handle)
        self._stream.synchronize()
        return memory

    def enqueue(self, i: int) -> None:
        """One call, on one of the sets."""
        for name, memory in self._sets[i].items():
            self._context.set_tensor_address(name, memory.handle)
        self._context.set_tensor_address("y", self._results[i].handle)
        if not self._context.execute_async_v3(self._stream.handle):
            raise RuntimeError("the engine did not run")

    def result(self, i: int) -> NDArray[np.float16]:
        """What the last call on a set gave, [B, H, W, C]."""
        y = np.empty(self.shape, np.float16)
        cuda.copy_to_host(y.ctypes.data, self._results[i].handle, y.nbytes, self._stream.handle)
        self._stream.synchronize()
        return y

    def microseconds(self, sets: list[int]) -> float:
        """Median time of a call in a CUDA graph of these calls."""
        for i in sets[:3]:
            self.enqueue(i)
        self._stream.synchronize()

        def calls() -> None:
            for i in sets:
                self.enqueue(i)

        graph = cuda.capture(self._stream.handle, calls)
        begin, end = cuda.Event(timing=True), cuda.Event(timing=True)
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < 13 or (time.perf_counter() - started < 0.08 and len(times) < 103):
            begin.record(self._stream.handle)
            graph.launch(self._stream.handle)
            end.record(self._stream.handle)
            end.synchronize()
            times.append(end.elapsed_ms(begin))
        graph.close()
        return 1e3 * statistics.median(times[3:]) / len(sets)


def measure(arguments: argparse.Namespace) -> None:
    """Times and errors of every engine in the folder."""
    backend = open_backend("auto")
    report: dict[str, Any] = {
        "engine": backend.label,
        "gpu": cuda.device_info().name,
        "blocks": {},
    }
    for block in blocks([int(n) for n in arguments.batches.split(",")]):
        path = plan_path(arguments.folder, block)
        if not path.exists():
            continue
        count = count_of_sets(block, arguments.cache_mib << 20)
        sets = [draw(block, seed) for seed in range(count)]
        engine = Engine(backend, path, sets)
        engine.enqueue(0)
        truth = expected(block, sets[0]).astype(np.float64)
        error = float(np.linalg.norm(engine.result(0) - truth) / np.linalg.norm(truth))
        entry = {
            "error": error,
            "right": error <= BAR,
            "cold_us": engine.microseconds(list(range(count))),
            "warm_us": engine.microseconds([i % 2 for i in range(32)]),
        }
        report["blocks"][block.name] = {"TensorRT": entry}
        print(block.name, entry, flush=True)
    atomic_write(arguments.output, json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Build or measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=["build", "time"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("tensorrt.json"))
    parser.add_argument("--batches", default="1,8", help="separated by commas")
    parser.add_argument("--cache-mib", type=int, default=60, help="the GPU's L2 cache, at most")
    arguments = parser.parse_args()
    {"build": build, "time": measure}[arguments.part](arguments)


if __name__ == "__main__":
    main()
