"""Biases as TensorRT fuses them: computed beside the demodulation factors.

A layer of stage two is ``leaky_relu(conv(x)·factor + noise + bias)``, and all behind the
convolution should be one pass over the map. TensorRT 8.6 fuses pointwise operators over computed
tensors, but takes a sum with a constant of one value a channel for a layer of its own kind (Scale),
which breaks the run in two: on an H200 these sums took 0.60 of 6.5 ms, and the passes that they
kept apart half as much again. So each bias becomes ``0·factor + bias``, which is the bias exactly
(factors are finite), of all layers of a group at once, and goes the way of its factor.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mat_export.graphs import write_graph

__all__ = ["compute_biases"]

_ZERO = "computed_bias/zero"
_MOVING = ("Split", "Slice")
"""What lies between the factors of a group and a layer's own."""


def compute_biases(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Make the biases of demodulated layers depend on an input.

    Args:
        model: What ``inline_functions`` gives of an exported model, in FP32; it is left as it is.

    Returns:
        The rewritten copy, and how many biases are computed now.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    pass_ = _Pass(result.graph)
    for node in result.graph.node:
        pass_.rewrite(node)
    pass_.write()
    return onnx.shape_inference.infer_shapes(result), pass_.count


class _Pass:
    """One pass over a graph, remembering the factors of each group and where biases lie in them."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._weights = {t.name: t for t in graph.initializer}
        self._makers = {o: node for node in graph.node for o in node.output}
        self._shapes = {
            v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info
        }
        self._rows: dict[str, NDArray[np.float32]] = {}
        self._positions: dict[str, NDArray[np.int64]] = {}
        self._moved: dict[str, list[onnx.NodeProto]] = {}
        self.count = 0

    def rewrite(self, node: onnx.NodeProto) -> None:
        """Replace a layer's constant bias, if this node adds one."""
        if node.op_type != "Add" or not self._per_channel(node.input[1]):
            return
        factor = self._factor_of(node.input[0])
        if factor is None or self._shapes[factor][1] != len(self._array(node.input[1])[0]):
            return  # not demodulated: the bias of an image
        group = self._group_of(factor)
        rows = self._rows.setdefault(group, np.zeros(self._shapes[group][1], np.float32))
        rows[self._positions[factor]] = self._array(node.input[1]).ravel()
        node.input[1] = _shift(factor)
        self.count += 1

    def write(self) -> None:
        """Put the computation of each group's biases behind that of its factors."""
        nodes = []
        for node in self._graph.node:
            nodes.append(node)
            for output in node.output:
                nodes += self._computed(output) if output in self._rows else []
            nodes += self._moved.get(node.output[0], [])
        if self._rows:
            self._weights[_ZERO] = numpy_helper.from_array(np.float32(0.0), _ZERO)
        write_graph(self._graph, nodes, self._weights.values())

    def _per_channel(self, name: str) -> bool:
        dims = list(self._weights[name].dims) if name in self._weights else []
        return len(dims) == 4 and dims[1] > 1 and dims[0] == dims[2] == dims[3] == 1

    def _factor_of(self, name: str) -> str | None:
        """The demodulation factor of ``conv·factor`` or ``conv·factor + noise``."""
        node = self._makers.get(name)
        if node is not None and node.op_type == "Add":
            node = self._makers.get(node.input[0])
        if node is None or node.op_type != "Mul":
            return None
        maker = self._makers.get(node.input[1])
        return node.input[1] if maker is not None and maker.op_type in _MOVING else None

    def _group_of(self, name: str) -> str:
        """The factors of the whole group that a layer's are cut from; its place is remembered."""
        maker = self._makers[name]
        if maker.op_type not in _MOVING:
            self._positions.setdefault(name, np.arange(self._shapes[name][1]))
            return name
        group = self._group_of(maker.input[0])
        if name not in self._positions:
            for output, place in self._cut(maker, self._positions[maker.input[0]]).items():
                self._positions[output] = place
            copy = onnx.NodeProto()
            copy.CopyFrom(maker)
            copy.name = _shift(maker.name)
            copy.input[0] = _shift(maker.input[0])
            copy.output[:] = [_shift(output) for output in maker.output]
            self._moved[maker.output[0]] = [copy]
        return group

    def _cut(self, node: onnx.NodeProto, whole: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Which of a group's channels each output of a Split or Slice along channels holds."""
        if node.op_type == "Slice":
            begin, end = (int(self._array(node.input[i]).item()) for i in (1, 2))
            return {node.output[0]: whole[begin:end]}
        sizes = [self._shapes[output][1] for output in node.output]
        parts = np.split(whole, np.cumsum(sizes)[:-1])
        return dict(zip(node.output, parts, strict=True))

    def _computed(self, group: str) -> list[onnx.NodeProto]:
        """``0·factor + bias`` of a whole group."""
        bias, nothing = f"{group}/biases", f"{group}/nothing"
        value = self._rows[group][None, :, None, None]
        self._weights[bias] = numpy_helper.from_array(value, bias)
        return [
            helper.make_node("Mul", [group, _ZERO], [nothing], nothing),
            helper.make_node("Add", [nothing, bias], [_shift(group)], _shift(group)),
        ]

    def _array(self, name: str) -> NDArray[np.float32]:
        return numpy_helper.to_array(self._weights[name])


def _shift(name: str) -> str:
    return f"{name}/shift"
