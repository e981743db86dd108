"""The graph that engines are built of: an exported model, prepared for a GPU.

Functions inlined, resampling said densely, biases computed, types in the file, opset as old as the
backend needs.
Every TensorRT gets the same graph.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from mat_export.blending import blend_outputs
from mat_export.casts import hoist_casts
from mat_export.contract import (
    CALIBRATION_KEY,
    STATE_PREFIX,
    GraphSpec,
    UserError,
    mask_state_names,
    plugin_problem,
)
from mat_export.epilogues import fuse_epilogues
from mat_export.free_types import free_types
from mat_export.functions import function_library
from mat_export.fusing import compute_biases
from mat_export.inlining import inline_functions
from mat_export.lowering import lower_opset, quantize_in_graph
from mat_export.parity import load_onnx
from mat_export.plugin_masks import PLUGIN_OPERATORS, masks_as_integers
from mat_export.precision import PRECISIONS, apply_precision, require_source
from mat_export.resampling import resample_densely
from mat_export.token_maps import tokens_as_maps

__all__ = [
    "ENGINE_PRECISIONS",
    "PLUGIN_OPERATORS",
    "EngineGraph",
    "calibration_of",
    "prepare_engine_graph",
    "spec_of",
]

ENGINE_PRECISIONS = ("fp32", "tf32", *PRECISIONS)
"""What an engine may compute in; ``tf32`` is the FP32 graph on TF32 tensor cores, ``int8`` a graph
with Q/DQ nodes, the rest of it in FP16."""


@dataclass(frozen=True)
class EngineGraph:
    """A prepared graph.

    Attributes:
        model: Standard operators of the types the engine is to compute in, and calls of those that
            are left to plugins.
        spec: What it takes and gives.
        passes: What was done, in words and numbers, for the manifest.
    """

    model: onnx.ModelProto
    spec: GraphSpec
    passes: dict[str, object]


def spec_of(model: onnx.ModelProto, label: str = "the model") -> GraphSpec:
    """The contract in a model's metadata.

    Raises:
        UserError: If it has none.
    """
    spec = GraphSpec.of_model(model)
    if spec is None:
        raise UserError(
            f"{label} is an ONNX model, but not one that mat-export wrote: "
            "export it with 'mat-export onnx'"
        )
    return spec


def calibration_of(model: onnx.ModelProto) -> dict[str, Any] | None:
    """How an INT8 model was calibrated and how well it does; None for another model.

    Raises:
        UserError: If what it says is unreadable.
    """
    for entry in model.metadata_props:
        if entry.key == CALIBRATION_KEY:
            try:
                facts: dict[str, Any] = json.loads(entry.value)
            except ValueError as error:
                raise UserError(f"unreadable calibration ({error}): calibrate again") from error
            return facts
    return None


def prepare_engine_graph(
    path: str | os.PathLike[str],
    precision: str,
    *,
    opset: int,
    weakly_typed: bool = False,
    mask_states: bool = False,
    plugins: bool = False,
    quick: bool = False,
) -> EngineGraph:
    """Prepare an exported model for a TensorRT backend.

    Args:
        path: A file of ``mat-export onnx``, in FP32; for ``int8`` one of ``mat-export calibrate``.
        precision: One of ENGINE_PRECISIONS.
        opset: The newest opset the backend parses.
        weakly_typed: The backend chooses types itself unless each layer is told, and takes no
            weights in INT8 (`engines.backend.Backend.weakly_typed`).
        mask_states: Give the masks of stage one as outputs too, for a parity check.
        plugins: Leave PLUGIN_OPERATORS to a plugin library: the graph calls them, and nothing in
            it says what they do. Their masks are INT32.
        quick: The plugins are quick ones, which have the operators of the exported file alone.
            For others what stands between convolutions is fused, and in 16 bits tokens are maps.

    Raises:
        UserError: If there is no such file, it is not ours, not in the precision
            that is needed, or cannot be lowered, or if plugins have no kernel for its network.
    """
    return prepare_model(
        load_onnx(path),
        precision,
        opset=opset,
        weakly_typed=weakly_typed,
        mask_states=mask_states,
        plugins=plugins,
        quick=quick,
        label=f"'{path}'",
    )


def prepare_model(
    model: onnx.ModelProto,
    precision: str,
    *,
    opset: int,
    weakly_typed: bool = False,
    mask_states: bool = False,
    plugins: bool = False,
    quick: bool = False,
    label: str = "the model",
) -> EngineGraph:
    """`prepare_engine_graph` of a loaded model."""
    if precision not in ENGINE_PRECISIONS:
        raise UserError(f"precision is one of {', '.join(ENGINE_PRECISIONS)}, got '{precision}'")
    spec = spec_of(model, label)
    problem = plugin_problem(spec.config) if plugins else ""
    if problem:
        raise UserError(f"{problem}: build with --plugins off")
    require_source(spec, precision, label)
    lowered = model
    if next(o.version for o in model.opset_import if o.domain == "") > opset:
        lowered = onnx.ModelProto()
        lowered.CopyFrom(model)
        lower_opset(lowered, opset)
        del lowered.functions[:]
        lowered.functions.extend(function_library(opset, dynamic=spec.dynamic_size))
    keep = PLUGIN_OPERATORS if plugins else frozenset[str]()
    dense, resampled = resample_densely(inline_functions(lowered, keep=keep))
    dense, computed = compute_biases(dense)
    passes: dict[str, object] = {
        "inlined": True,
        "resampled": resampled,
        "computed_biases": computed,
    }
    if precision in PRECISIONS:
        if weakly_typed:
            passes["blended_outputs"] = blend_outputs(dense)
        typed = apply_precision(dense, precision, keep=keep)
        passes |= {
            "half_nodes": typed.half_nodes,
            "fp32_islands": typed.islands,
            "casts": typed.casts,
            "raised_floors": typed.floors,
        }
        dense = typed.model
        passes["hoisted_casts"] = hoist_casts(dense.graph)
    if precision == "int8":
        passes["quantized"] = sum(node.op_type == "QuantizeLinear" for node in dense.graph.node)
        if weakly_typed:
            dense = free_types(dense)
            passes["weights_rounded_in_graph"] = quantize_in_graph(dense.graph)
    if mask_states:
        passes["mask_states"] = _give_mask_states(dense, spec)
    if plugins:  # behind the mask states, which are read beside the calls
        if not quick:
            if precision in PRECISIONS:  # their operators on maps compute in 16 bits
                tokens_as_maps(dense)
            fuse_epilogues(dense)
        calls = Counter(node.op_type for node in dense.graph.node)
        passes["plugins"] = {name: calls[name] for name in sorted(PLUGIN_OPERATORS)}
        passes["plugin_mask_casts"] = masks_as_integers(dense.graph)
        del dense.functions[:]
    spec = spec.with_changes(precision=precision)
    spec.write_to(dense)
    passes["opset"] = next(o.version for o in dense.opset_import if o.domain == "")
    return EngineGraph(dense, spec, passes)


def _give_mask_states(model: onnx.ModelProto, spec: GraphSpec) -> int:
    """Make every mask of stage one an output, as floats: not every TensorRT gives bools."""
    graph = model.graph
    names = [STATE_PREFIX + name for name in mask_state_names(spec.config)]
    inner = {name: f"{name}/inner" for name in names}
    for node in graph.node:
        for values in (node.input, node.output):
            for i, name in enumerate(values):
                values[i] = inner.get(name, name)
    for name in names:
        cast = helper.make_node("Cast", [inner[name]], [name], f"{name}/Cast", to=TensorProto.FLOAT)
        graph.node.append(cast)
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    del graph.value_info[:]
    shapes = {v.name: v.type for v in onnx.shape_inference.infer_shapes(model).graph.output}
    for output in graph.output:
        output.type.CopyFrom(shapes[output.name])
    return len(names)
