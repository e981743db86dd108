"""Where an engine's time goes: each layer's measured time beside the least the GPU could take.

    python benchmarks/roofline.py GRAPH.onnx PROFILE.json [-o TABLE.json] [--top 30]

GRAPH is the graph the engine was built of (``prepare_engine_graph``), PROFILE the engine's own
profile: milliseconds by the names of its layers. A layer is one or more nodes of the graph, whose
names its own name holds; a fused region ``ForeignNode[first...last]`` is the nodes that lead to its
last one and that no other layer names. FLOP are those of convolutions and matrix products, bytes
those that enter and leave the layer, each tensor once; the least time is the larger of the two
quotients.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx

from mat_export.functions import EPILOGUE
from mat_export.graphs import attribute_of

SIZES = {1: 4, 10: 2, 16: 2, 9: 1, 3: 1, 2: 1, 6: 4, 7: 8, 11: 8}
"""Bytes of an element by ONNX type."""


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        layer: The engine's name of it.
        kind: convolution, attention and tokens, fused epilogue, pointwise, reformat, or other.
        ms: Measured milliseconds.
        gflop: 10⁹ floating-point operations.
        mb: 10⁶ bytes that enter and leave.
        least_ms: The least time by the roofline.
    """

    layer: str
    kind: str
    ms: float
    gflop: float
    mb: float
    least_ms: float


class Graph:
    """Shapes, types and work of a graph's nodes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = onnx.shape_inference.infer_shapes(model).graph
        self.nodes = list(graph.node)
        self.order = {node.name: i for i, node in enumerate(self.nodes)}
        self.makers = {o: i for i, node in enumerate(self.nodes) for o in node.output}
        values = (*graph.value_info, *graph.input, *graph.output)
        self.shapes = {
            v.name: [d.dim_value or 1 for d in v.type.tensor_type.shape.dim] for v in values
        }
        self.types = {v.name: v.type.tensor_type.elem_type for v in values}
        for tensor in graph.initializer:
            self.shapes[tensor.name], self.types[tensor.name] = list(tensor.dims), tensor.data_type
        self.readers: dict[str, set[int]] = defaultdict(set)
        for i, node in enumerate(self.nodes):
            for name in node.input:
                self.readers[name].add(i)
        self.outputs = {o.name for o in graph.output}

    def flop(self, i: int) -> float:
        """Operations of a node: 2 a multiply-add of convolutions and products, else none."""
        node = self.nodes[i]
        out = float(np.prod(self.shapes.get(node.output[0], [0])))
        if node.op_type == "Conv":
            return 2.0 * out * float(np.prod(self.shapes[node.input[1]][1:]))
        if node.op_type in ("MatMul", "Gemm"):
            turned = node.op_type == "Gemm" and attribute_of(node, "transB", 0)
            return 2.0 * out * self.shapes[node.input[1]][-1 if turned else -2]
        return 0.0

    def bytes(self, members: set[int]) -> float:
        """Bytes that enter and leave a set of nodes."""
        names: set[str] = set()
        for i in members:
            node = self.nodes[i]
            names |= {n for n in node.input if n and self.makers.get(n, -1) not in members}
            names |= {
                n
                for n in node.output
                if n in self.outputs or not self.readers[n] <= members or not self.readers[n]
            }
        return sum(
            float(np.prod(self.shapes.get(n, [0]))) * SIZES.get(self.types.get(n, 1), 4)
            for n in names
        )


def members_of(graph: Graph, layers: list[str]) -> dict[str, set[int]]:
    """Nodes of each layer of the engine, by the names it holds."""
    named = sorted(graph.order, key=len, reverse=True)
    found: dict[str, set[int]] = {}
    taken: set[int] = set()
    regions = []
    for layer in layers:
        rest, own = layer, set()
        for name in [] if layer.startswith("Reformatting") else named:
            if name in rest:
                without = re.sub(re.escape(name) + r"(?![\w.])", "", rest)
                if without != rest:
                    own.add(graph.order[name])
                rest = without
        found[layer] = own
        taken |= own
        if "ForeignNode" in layer and own:
            regions.append(layer)
    # A region is what leads to its last node and is no other layer's.
    for layer in sorted(regions, key=lambda region: max(found[region])):
        ahead = list(found[layer])
        while ahead:
            for name in graph.nodes[ahead.pop()].input:
                maker = graph.makers.get(name)
                if maker is not None and maker not in taken:
                    found[layer].add(maker)
                    taken.add(maker)
                    ahead.append(maker)
    return found


def kind_of(layer: str, ops: set[str]) -> str:
    """A word for a layer."""
    if layer.startswith("Reformatting"):
        return "reformat"
    if EPILOGUE in ops:
        return "fused epilogue"
    if "ForeignNode" in layer or ".blocks." in layer:
        return "attention and tokens"
    if "Conv" in ops:
        return "convolution"
    if "PWN" in layer or ops & {"Mul", "Add", "LeakyRelu", "Div", "Clip", "Where"}:
        return "pointwise"
    return "other"


def table(
    model: onnx.ModelProto, profile: dict[str, float], tflops: float, tbs: float
) -> list[Row]:
    """A row for every layer, slowest first."""
    graph = Graph(model)
    members = members_of(graph, list(profile))
    rows = []
    for layer, ms in profile.items():
        own = members[layer]
        flop, moved = sum(graph.flop(i) for i in own), graph.bytes(own)
        least = 1e3 * max(flop / (tflops * 1e12), moved / (tbs * 1e12))
        kind = kind_of(layer, {graph.nodes[i].op_type for i in own})
        rows.append(Row(layer, kind, ms, flop / 1e9, moved / 1e6, least))
    return sorted(rows, key=lambda row: -row.ms)


def main() -> None:
    """Print the table and the sums by kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("graph", type=Path)
    parser.add_argument("profile", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--top", type=int, default=30)
    parser.add_argument("--tflops", type=float, default=790.0, help="measured rate of the GPU")
    parser.add_argument("--tbs", type=float, default=2.6, help="measured memory bandwidth, TB/s")
    arguments = parser.parse_args()
    profile = json.loads(arguments.profile.read_text(encoding="utf-8"))
    rows = table(onnx.load(arguments.graph), profile, arguments.tflops, arguments.tbs)
    total = sum(row.ms for row in rows)
    for row in rows[: arguments.top]:
        share = row.least_ms / row.ms if row.ms else 0.0
        print(
            f"{row.ms:8.4f} ms {row.gflop:8.2f} GFLOP {row.mb:8.2f} MB "
            f"least {row.least_ms:7.4f} ms ({share:4.0%})  {row.layer[:90]}"
        )
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for row in rows:
        for i, value in enumerate((row.ms, row.gflop, row.least_ms)):
            kinds[row.kind][i] += value
    for kind, (ms, gflop, least) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        print(
            f"{kind:22} {ms:8.3f} ms ({ms / total:4.0%}) {gflop:8.1f} GFLOP least {least:7.3f} ms"
        )
    print(f"{'sum':22} {total:8.3f} ms of {len(rows)} layers")
    if arguments.output:
        facts = {"tflops": arguments.tflops, "tbs": arguments.tbs, "total_ms": total}
        entries = {**facts, "layers": [asdict(row) for row in rows]}
        arguments.output.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
