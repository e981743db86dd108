"""Name the first layer where two backends part.

Two runs of a graph are compared tensor by tensor: not every one, but those that leave a module
(node names are ``module.path/Op``), in the order of the graph. The first that differs is the
divergence, and the nodes that can have caused it are those between it and the tensors before it
that agree. Where not all fit into one run, those of the first run lie evenly over the graph, its
last among them, and those of the next between the last that agrees and the first that does not:
for an engine every run is a build.

The typed graphs of ``precision`` keep the names of the FP32 graph, so each can be held against it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mat_export.contract import STATE_PREFIX, UserError
from mat_export.inlining import inline_functions
from mat_export.runners import hold_half, reason_of, session_options

__all__ = [
    "HEADINGS",
    "Backend",
    "Divergence",
    "Suspect",
    "TensorComparison",
    "checkpoints_of",
    "find_divergence",
    "run_onnxruntime",
]

Arrays = Mapping[str, NDArray[Any]]

Backend = Callable[[onnx.ModelProto, Arrays], Arrays]
"""Runs a model without functions: its inputs by name in, every output of its graph by name out.

It may be given inputs that the graph does not take, which it leaves out.
"""

HEADINGS = ("tensor", "relative", "largest", "verdict")
"""Of the columns of ``Divergence.rows``."""


@dataclass(frozen=True)
class TensorComparison:
    """One tensor in both runs; a is on trial and b the reference.

    Attributes:
        tensor: Its name in the graph.
        module: The PyTorch module that it leaves; empty for the graph's own nodes.
        relative: ‖a − b‖₂ / ‖b‖₂, or None where that is no finite number.
        largest: max |a − b|, likewise.
        problem: What is wrong, in words; empty if they agree.
    """

    tensor: str
    module: str
    relative: float | None
    largest: float | None
    problem: str

    @property
    def agrees(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problem


@dataclass(frozen=True)
class Suspect:
    """A node that can have caused a divergence, by its name and operator."""

    node: str
    operator: str


@dataclass(frozen=True)
class Divergence:
    """Where two runs part, with the evidence.

    Attributes:
        tolerance: Largest relative error that counts as agreement.
        tensors: Every tensor compared, in the order of the graph.
        suspects: Nodes between the first tensor that differs and the tensors that agree, in the
            order of the graph; empty if there is no divergence.
        agreeing: Those tensors.
        of: How many tensors there were to compare.
    """

    tolerance: float
    tensors: tuple[TensorComparison, ...]
    suspects: tuple[Suspect, ...]
    agreeing: tuple[str, ...]
    of: int

    @property
    def first(self) -> TensorComparison | None:
        """The first tensor that differs, or None."""
        return next((tensor for tensor in self.tensors if not tensor.agrees), None)

    def __str__(self) -> str:
        """The result in a sentence or three."""
        if self.first is None:
            worst = max(self.tensors, key=lambda tensor: tensor.relative or 0.0)
            number = f"{len(self.tensors)}"
            if len(self.tensors) < self.of:
                number += f" evenly spread ones of {self.of}"
            return (
                f"no divergence in {number} tensors: the largest relative error "
                f"is {worst.relative:.1e} at {worst.tensor}, within {self.tolerance:g}"
            )
        nodes = ", ".join(f"{s.node} ({s.operator})" for s in self.suspects)
        after = ", ".join(self.agreeing) or "only the inputs"
        module = self.first.module or "the graph's own nodes"
        return (
            f"they part at {self.first.tensor}, in {module}: {self.first.problem}. "
            f"Before it {after} agree. In between: {nodes}."
        )

    def rows(self) -> list[list[str]]:
        """A table of every tensor, under HEADINGS."""
        return [
            [
                tensor.tensor,
                *("–" if v is None else f"{v:.1e}" for v in (tensor.relative, tensor.largest)),
                tensor.problem or "agrees",
            ]
            for tensor in self.tensors
        ]

    def to_json(self) -> str:
        """Everything, and the first tensor that differs (null if none does)."""
        first = self.first.tensor if self.first else None
        return json.dumps({"first": first, **asdict(self)}, indent=2, allow_nan=False) + "\n"


def find_divergence(
    model: onnx.ModelProto,
    run_a: Backend,
    run_b: Backend,
    inputs: Arrays,
    *,
    tolerance: float,
    reference: onnx.ModelProto | None = None,
    candidates: Sequence[str] | None = None,
    at_once: int | None = None,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Divergence:
    """Find the first tensor where two runs part.

    Args:
        model: What `run_a` runs, which is on trial; its functions are inlined here.
        run_a: The backend on trial.
        run_b: The backend of the reference.
        inputs: Arrays by the names of the graph's inputs.
        tolerance: Largest relative error that counts as agreement, from 0 up. Masks, booleans and
            integers have to be equal, and everything finite.
        reference: What `run_b` runs; by default the same model.
        candidates: Tensors to compare; by default those of ``checkpoints_of`` that both have and
            that are no integers.
        at_once: Tensors that one run gives, so that all fit in memory. None gives all in one run.
        progress: Called with what is done next, the number of runs done and how many there are.

    Raises:
        UserError: If the two models have none of the tensors in common, or a candidate is in
            neither, or a backend fails.
    """
    if not 0.0 <= tolerance < math.inf:
        raise UserError(f"a tolerance is a finite number from 0 up, got {tolerance}")
    if at_once is not None and at_once < 1:
        raise UserError(f"at least one tensor is compared at once, got {at_once}")
    tried = _Graph(model)
    held = tried if reference is None else _Graph(reference)
    chosen = _choose(tried, held, candidates)
    size = at_once or len(chosen)
    runs = math.ceil(math.log(len(chosen) + 1) / math.log(size + 1) - 1e-9)
    seen: dict[str, TensorComparison] = {}
    span, done = chosen, 0
    while span:
        group = _spread(span, size)
        progress("on trial", 2 * done, 2 * runs)
        a = tried.run(run_a, group, inputs)
        progress("reference", 2 * done + 1, 2 * runs)
        b = held.run(run_b, group, inputs)
        seen |= {name: _compare(name, tried, a[name], b[name], tolerance) for name in group}
        done, runs = done + 1, max(runs, done + 2)
        span = _unsure(chosen, seen) or tried.unsure(chosen, seen)
    progress("done", 2 * done, 2 * done)
    compared = [seen[name] for name in chosen if name in seen]
    suspects, agreeing = tried.between(compared)
    return Divergence(tolerance, tuple(compared), suspects, agreeing, len(chosen))


def _spread(names: Sequence[str], count: int) -> list[str]:
    """So many of the names at most, evenly spread, the last among them."""
    count = min(count, len(names))
    return [names[len(names) * (i + 1) // count - 1] for i in range(count)]


def _unsure(chosen: Sequence[str], seen: Mapping[str, TensorComparison]) -> list[str]:
    """The tensors right before the first that differs, as far as nothing is known of them."""
    differing = [i for i, name in enumerate(chosen) if name in seen and not seen[name].agrees]
    if not differing:
        return []
    begin = end = differing[0]
    while begin and chosen[begin - 1] not in seen:
        begin -= 1
    return list(chosen[begin:end])


def checkpoints_of(model: onnx.ModelProto) -> tuple[str, ...]:
    """The tensors that leave a module, in the order of the graph.

    A module is what a node's name says before its last ``/``, so that a function counts as one. Its
    tensors leave it where a node of another module reads them, or the graph gives them.

    Args:
        model: A model without functions.
    """
    readers: dict[str, set[str]] = {output.name: {"the graph"} for output in model.graph.output}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(_module_of(node))
    return tuple(
        output
        for node in model.graph.node
        for output in node.output
        if readers.get(output, set()) - {_module_of(node)}
    )


def _module_of(node: onnx.NodeProto) -> str:
    return node.name.rpartition("/")[0]


def _choose(tried: _Graph, held: _Graph, wanted: Sequence[str] | None) -> list[str]:
    """The tensors to compare, in the order of the graph on trial."""
    if wanted is None:
        chosen = [
            name
            for name in checkpoints_of(tried.model)
            if name in held.producers and not tried.counts(name)
        ]
        if not chosen:
            raise UserError("the two graphs have no tensor in common: export both with mat-export")
        return chosen
    if not wanted:
        raise UserError("there is nothing to compare: name at least one tensor")
    for graph in (tried, held):
        for name in wanted:
            if name not in graph.producers:
                raise UserError(f"no node of the graph makes a tensor '{name}'")
    return sorted(set(wanted), key=list(tried.producers).index)


class _Graph:
    """A model to mark tensors in, its functions inlined."""

    def __init__(self, model: onnx.ModelProto) -> None:
        inlined = inline_functions(model) if model.functions else model
        self.model = onnx.shape_inference.infer_shapes(inlined)
        graph = self.model.graph
        self.producers = {name: node for node in graph.node for name in node.output}
        known = (*graph.value_info, *graph.output)
        self._types = {info.name: info.type.tensor_type.elem_type for info in known}

    def exact(self, name: str) -> bool:
        """Whether a tensor has to be equal: masks, booleans, integers."""
        return name.startswith(STATE_PREFIX) or self._types.get(name) not in _FLOATS

    def counts(self, name: str) -> bool:
        """Whether a tensor is of integers: a shape or an index, which not every runtime gives."""
        return self._types.get(name) in (TensorProto.INT32, TensorProto.INT64)

    def run(self, backend: Backend, names: Sequence[str], inputs: Arrays) -> Arrays:
        """The tensors of these names, which a backend gives as further outputs."""
        marked = onnx.ModelProto()
        marked.CopyFrom(self.model)
        places = {name: self._mark(marked.graph, name) for name in names}
        results = backend(marked, inputs)
        missing = [place for place in places.values() if place not in results]
        if missing:
            raise UserError(f"the backend gave no output '{missing[0]}'")
        return {name: results[place] for name, place in places.items()}

    def _mark(self, graph: onnx.GraphProto, name: str) -> str:
        """Make a tensor an output and return that output's name.

        FP32 and FP16 tensors go out as they are stored. The other types, which some runtimes or
        NumPy do not have, go out as FP32.
        """
        if any(output.name == name for output in graph.output):
            return name
        kind, place = self._types.get(name, TensorProto.UNDEFINED), name
        if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16):
            place, kind = f"{name}/marked", TensorProto.FLOAT
            graph.node.append(helper.make_node("Cast", [name], [place], place, to=kind))
        graph.output.append(helper.make_tensor_value_info(place, kind, None))
        return place

    def unsure(self, chosen: Sequence[str], seen: Mapping[str, TensorComparison]) -> list[str]:
        """The tensors that the first one that differs is made of, as far as nothing is known."""
        pending = [name for name in chosen if name in seen and not seen[name].agrees][:1]
        wanted, passed, found = set(chosen), set[str](), set[str]()
        while pending:
            for name in self.producers[pending.pop()].input:
                if name in passed or name not in self.producers:
                    continue
                passed.add(name)
                if name not in wanted:
                    pending.append(name)
                elif name not in seen:
                    found.add(name)
        return [name for name in chosen if name in found]

    def between(
        self, compared: Sequence[TensorComparison]
    ) -> tuple[tuple[Suspect, ...], tuple[str, ...]]:
        """The nodes from tensors that agree to the first that does not, and those tensors."""
        first = next((tensor.tensor for tensor in compared if not tensor.agrees), None)
        good = {tensor.tensor for tensor in compared if tensor.agrees}
        pending, seen = [first] if first is not None else [], set[str]()
        while pending:
            name = pending.pop()
            if name in seen or name not in self.producers:
                continue
            seen.add(name)
            if name not in good:
                pending += self.producers[name].input
        nodes = [
            Suspect(node.name, node.op_type)
            for node in self.model.graph.node
            if any(name in seen and name not in good for name in node.output)
        ]
        return tuple(nodes), tuple(name for name in self.producers if name in seen & good)


_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def _compare(
    name: str, graph: _Graph, a: NDArray[Any], b: NDArray[Any], tolerance: float
) -> TensorComparison:
    """Hold one tensor's values on trial against the reference's."""
    module = _module_of(graph.producers[name]).partition("/")[0]
    if a.shape != b.shape:
        problem = f"its shape is {list(a.shape)} and the reference's {list(b.shape)}"
        return TensorComparison(name, module, None, None, problem)
    x, y = a.astype(np.float64), b.astype(np.float64)
    for values, whose in ((y, "the reference's"), (x, "its")):
        bad = int(values.size - np.isfinite(values).sum())
        if bad:
            problem = f"{bad} of {whose} {values.size} values are not finite"
            return TensorComparison(name, module, None, None, problem)
    difference = np.abs(x - y)
    error, norm = float(np.linalg.norm(difference)), float(np.linalg.norm(y))
    relative = error / norm if norm else (0.0 if error == 0.0 else None)
    problem = ""
    if graph.exact(name) and difference.any():
        problem = f"{np.count_nonzero(difference)} of {x.size} values differ, where all are exact"
    elif relative is None:
        problem = "the reference is all zero"
    elif relative > tolerance:
        problem = f"relative error {relative:.1e} is over {tolerance:g}"
    return TensorComparison(name, module, relative, float(difference.max(initial=0.0)), problem)


# -- ONNX Runtime -------------------------------------------------------------------------------


def run_onnxruntime(
    model: onnx.ModelProto, inputs: Arrays, *, threads: int | None = None
) -> dict[str, NDArray[Any]]:
    """The backend of ONNX Runtime on the CPU, every half tensor really held in half.

    Args:
        model: A model; with half tensors it runs as ``hold_half`` makes it, unoptimized.
        inputs: Arrays by name; those that the graph does not take are left out.
        threads: CPU threads within an operator, ONNX Runtime's choice if None.

    Raises:
        UserError: If ONNX Runtime cannot load or run the model.
    """
    import onnxruntime as ort

    held = hold_half(model)
    options = session_options(threads)
    if held is not model:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(
            held.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        feed = {i.name: inputs[i.name] for i in session.get_inputs() if i.name in inputs}
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feed), strict=True))
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        raise UserError(f"ONNX Runtime cannot run the model: {reason_of(error)}") from error
