"""A graph in a few parts, so that what lies before a layer is computed once.

To know what a layer costs, its quantization error is added to what it makes, and the rest of the
graph runs. With the graph in parts only those from the layer's own on run again; and the error is
an input of a part, so that no session is ever built twice.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from calib.candidates import Candidate
from mat_export.contract import UserError
from mat_export.runners import reason_of, session_options

__all__ = ["PARTS", "StagedModel", "open_session"]

Values = Mapping[str, NDArray[Any]]

Visit = Callable[[Candidate, NDArray[Any], Values], None]
"""Called with a candidate, what it reads, and all that ``StagedModel.with_error`` needs."""

PARTS = 8
"""Into so many parts of about equal work a graph is cut."""


def open_session(model: onnx.ModelProto, threads: int | None) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        UserError: If ONNX Runtime cannot load the model.
    """
    import onnxruntime as ort

    options = session_options(threads)
    # Of many sessions one is at work: the others' threads must not wait at full speed, and their
    # memory must be free.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False
    try:
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        raise UserError(f"ONNX Runtime cannot load the model: {reason_of(error)}") from error


@dataclass(frozen=True)
class _Part:
    """Some of a graph's nodes.

    Attributes:
        session: What runs them.
        reads: Tensors they need, errors not among them.
        gives: Tensors that later parts, or the caller, need.
        candidates: Those among the nodes.
        taps: What the candidates read and is made here.
    """

    session: Any
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    taps: tuple[str, ...]

    def run(
        self, names: Sequence[str], values: Values, errors: Values | None = None
    ) -> dict[str, NDArray[Any]]:
        """These of its tensors, by name."""
        feeds = {name: values[name] for name in self.reads}
        results = self.session.run(list(names), {**feeds, **(errors or {})})
        return dict(zip(names, results, strict=True))


class StagedModel:
    """A model whose candidates may err.

    Args:
        model: The FP32 graph.
        candidates: What may err, in the graph's order.
        threads: CPU threads, ONNX Runtime's choice if None.
    """

    def __init__(
        self, model: onnx.ModelProto, candidates: Sequence[Candidate], threads: int | None = None
    ) -> None:
        cutter = _Cutter(model, candidates)
        self._parts = [cutter.part(begin, end, threads) for begin, end in cutter.cuts(PARTS)]

    def run(self, feeds: Values, visit: Visit | None = None) -> NDArray[Any]:
        """The output.

        Args:
            feeds: The graph's inputs.
            visit: Called for each candidate on the way. What candidates read is kept no longer.
        """
        values = dict(feeds)
        for part in self._parts:
            taps = part.taps if visit is not None else ()
            results = part.run(tuple({*part.gives, *taps}), values)
            values.update({name: results[name] for name in part.gives})
            if visit is not None:
                seen = ChainMap(results, values)
                for candidate in part.candidates:
                    visit(candidate, seen[candidate.tensor], values)
        return values["output"]

    def with_error(self, values: Values, candidate: Candidate, error: NDArray[Any]) -> NDArray[Any]:
        """The output if a candidate errs by that much.

        Args:
            values: As a visit gets them.
            candidate: What errs.
            error: Of the shape of its output.
        """
        first = next(i for i, part in enumerate(self._parts) if candidate in part.candidates)
        changed: MutableMapping[str, NDArray[Any]] = ChainMap({}, dict(values))
        errors: Values | None = {_error_of(candidate): error}
        for part in self._parts[first:]:
            changed.update(part.run(part.gives, changed, errors))
            errors = None
        return changed["output"]


def _error_of(candidate: Candidate) -> str:
    """The input that takes a candidate's error."""
    return f"{candidate.name}/error"


class _Cutter:
    """A graph, and what cutting it takes."""

    def __init__(self, model: onnx.ModelProto, candidates: Sequence[Candidate]) -> None:
        inferred = onnx.shape_inference.infer_shapes(model)
        self._model, self._nodes = model, list(model.graph.node)
        graph = inferred.graph
        self._infos = {v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}
        self._weights = {t.name: t for t in graph.initializer}
        self._outputs = {value.name for value in graph.output}
        self._candidates = {candidate.name: candidate for candidate in candidates}

    def cuts(self, parts: int) -> list[tuple[int, int]]:
        """First and last node of each part: about the same work in all."""
        work = [1e6 + self._flop(node) for node in self._nodes]
        result: list[tuple[int, int]] = []
        goal, begin, done = sum(work) / parts, 0, 0.0
        for i, own in enumerate(work):
            done += own
            if done >= goal * (len(result) + 1) and i + 1 < len(work):
                result.append((begin, i + 1))
                begin = i + 1
        return [*result, (begin, len(work))]

    def _flop(self, node: onnx.NodeProto) -> float:
        candidate = self._candidates.get(node.name)
        return candidate.flop if candidate is not None else 0.0

    def part(self, begin: int, end: int, threads: int | None) -> _Part:
        """The part of these nodes."""
        nodes = self._nodes[begin:end]
        made = {name for node in nodes for name in node.output if name}
        read = {name for node in nodes for name in node.input if name}
        later = {name for node in self._nodes[end:] for name in node.input} | self._outputs
        reads = sorted((read - made) - set(self._weights))
        gives = sorted(made & later)
        own = [self._candidates[node.name] for node in nodes if node.name in self._candidates]
        taps = sorted({candidate.tensor for candidate in own} & made)
        graph = helper.make_graph(
            self._with_errors(nodes, own),
            "part",
            [self._infos[name] for name in reads],
            [self._infos[name] for name in sorted({*gives, *taps})],
            [self._weights[name] for name in sorted(read & set(self._weights))],
        )
        for candidate in own:
            name = _error_of(candidate)
            rank = len(self._infos[candidate.output].type.tensor_type.shape.dim)
            graph.input.append(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)
            )
            graph.initializer.append(numpy_helper.from_array(np.zeros([1] * rank, "f4"), name))
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        model.graph.CopyFrom(graph)
        session = open_session(model, threads)
        return _Part(session, tuple(reads), tuple(gives), tuple(own), tuple(taps))

    def _with_errors(
        self, nodes: Collection[onnx.NodeProto], own: Collection[Candidate]
    ) -> list[onnx.NodeProto]:
        """The nodes, and after each candidate a sum with its error, which is zero by default."""
        erring = {candidate.output: _error_of(candidate) for candidate in own}
        result = []
        for node in nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            result.append(copy)
            for i, name in enumerate(node.output):
                if name in erring:
                    copy.output[i] = f"{name}/exact"
                    inputs = [copy.output[i], erring[name]]
                    result.append(helper.make_node("Add", inputs, [name], f"{name}/erring"))
        return result
