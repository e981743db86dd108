"""Make the channels of a tensor alike before it gets its one scale. Exact in FP32.

A layer's input has one scale, and channels that are small beside the largest keep few levels: most
of all in the decoders, where styles make some channels large and others small. So each channel is
multiplied by a power of two, and the weights that read it divided by the same. The factor costs
nothing where something multiplies each channel anyway: a style, a resampling filter, or the layer
before. (Nagel et al., 2019, "Data-free quantization"; Xiao et al., 2023, "SmoothQuant".)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from calib.candidates import Candidate
from calib.ranges import Progress
from calib.samples import Sample
from calib.stages import StagedModel, Values
from mat_export.graphs import readers_of, write_graph

__all__ = ["STRENGTH", "equalize", "measure_powers"]

STRENGTH = 0.5
"""How much of the difference between channels moves to the weights: 0 none, 1 all. All candidates
of mat-tiny-256 (untrained) in INT8 are at 25.7 dB with 0, 30.9 with ½, 30.7 with ¾, 27.4 with 1."""

_MOST = 6
"""Largest power of two of a factor."""

_Factors = NDArray[np.float32]


def measure_powers(
    model: StagedModel, samples: Sequence[Sample], progress: Progress
) -> dict[str, tuple[int, ...]]:
    """For each layer, the power of two that its input's channels are to be multiplied by.

    A channel counts with its largest magnitude, the mean over samples.
    """
    largest: dict[str, NDArray[np.float32]] = {}
    strengths: dict[str, float] = {}

    def look(candidate: Candidate, x: NDArray[np.float32], _: Values) -> None:
        found = np.abs(x).max(axis=(0, 2, 3)) / np.float32(len(samples))
        largest[candidate.name] = largest.get(candidate.name, np.float32(0.0)) + found
        # A filter has one channel to each of its scales: it takes all of the difference.
        strengths[candidate.name] = 1.0 if candidate.kind == "filter" else STRENGTH

    for i, sample in enumerate(samples):
        progress("measuring channels", i, len(samples))
        model.run(sample.feeds, look)
    return {name: _powers(channels, strengths[name]) for name, channels in largest.items()}


def _powers(largest: NDArray[np.float32], strength: float) -> tuple[int, ...]:
    top = max(float(largest.max(initial=0.0)), 1e-30)
    seen = np.where(largest > 0.0, largest, top)
    powers = np.rint(strength * np.log2(top / np.maximum(seen, 1e-30)))
    return tuple(int(power) for power in np.clip(powers, 0, _MOST))


def equalize(
    model: onnx.ModelProto,
    candidates: Sequence[Candidate],
    powers: Mapping[str, Sequence[int]],
) -> tuple[onnx.ModelProto, int]:
    """A copy of a model with equalized channels.

    Args:
        model: The FP32 graph; it is left as it is.
        candidates: Its layers.
        powers: Of `measure_powers`, by layer.

    Returns:
        The copy, and how many layers read equalized channels now. The others read what nothing
        multiplies by channel, or what others read too.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    pass_ = _Pass(result.graph)
    for candidate in candidates:
        if candidate.weight:
            pass_.rewrite(candidate, np.exp2(powers[candidate.name]).astype(np.float32))
    nodes = [n for node in result.graph.node for n in (*pass_.before.get(node.name, ()), node)]
    write_graph(result.graph, nodes, pass_.weights.values())
    return onnx.shape_inference.infer_shapes(result), pass_.count


class _Pass:
    """One pass over a graph: who makes and who reads each tensor, and constants as they become."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.weights = {t.name: t for t in graph.initializer}
        self.before: dict[str, list[onnx.NodeProto]] = {}
        self.count = 0
        self._makers: dict[str, onnx.NodeProto] = {
            name: node for node in graph.node for name in node.output
        }
        self._readers = readers_of(graph)

    def rewrite(self, candidate: Candidate, factors: _Factors) -> None:
        """Equalize what a layer reads, if it can be had for nothing."""
        source = self._source(candidate.tensor)
        if source is None or not self._own(candidate.weight) or (factors == 1.0).all():
            return
        if source.op_type == "Mul":
            self._scale_style(source, factors)
        elif not all(self._own(name) for name in source.input[1:]):
            return
        else:
            for name in source.input[1:]:  # weight and bias: rows are what it makes
                self._scale(name, factors, axis=0)
        axis = 0 if candidate.kind == "filter" else 1
        self._scale(candidate.weight, 1.0 / factors, axis=axis)
        self.count += 1

    def _source(self, tensor: str) -> onnx.NodeProto | None:
        """What multiplies each channel of a tensor that nothing else reads."""
        while len(self._readers[tensor]) == 1:
            node = self._makers.get(tensor)
            if node is None:
                return None
            if node.op_type == "Conv" or (node.op_type == "Mul" and self._is_style(node.input[1])):
                return node
            if node.op_type not in ("Resize", "LeakyRelu"):
                return None
            tensor = node.input[0]
        return None

    def _is_style(self, name: str) -> bool:
        """Whether a tensor is one number a channel, cut from those of several layers."""
        maker = self._makers.get(name)
        return maker is not None and maker.op_type == "Split"

    def _own(self, name: str) -> bool:
        """Whether a constant has one reader."""
        return name in self.weights and len(self._readers[name]) == 1

    def _scale_style(self, node: onnx.NodeProto, factors: _Factors) -> None:
        constant, scaled = f"{node.name}/factors", f"{node.input[1]}/equalized"
        self.weights[constant] = numpy_helper.from_array(factors[None, :, None, None], constant)
        times = helper.make_node("Mul", [node.input[1], constant], [scaled], scaled)
        self.before[node.name] = [times]
        node.input[1] = scaled

    def _scale(self, name: str, factors: _Factors, axis: int) -> None:
        value = numpy_helper.to_array(self.weights[name])
        shape = [1] * value.ndim
        shape[axis] = -1
        scaled = (value * factors.reshape(shape)).astype(np.float32)
        self.weights[name] = numpy_helper.from_array(scaled, name)
