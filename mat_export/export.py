"""A checkpoint becomes one ONNX file: inference form → torch.export → ONNX → named, checked, saved.

The file holds nodes of domain ``mat`` for the custom operators with a model-local function under
each, so any ONNX runtime runs it as it is, and a manifest beside it says what it was made of.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import values

from mat_export import functions, ops
from mat_export.contract import (
    METADATA_KEY,
    OPERATOR_DOMAIN,
    GraphSpec,
    TensorSpec,
    UserError,
    require_exportable,
)
from mat_export.files import require_writable
from mat_export.inference import InferenceGenerator, rewrite_counts
from mat_export.inlining import inline_functions
from mat_export.lowering import LOWEST_OPSET, lower_opset
from mat_export.manifest import package_version, save_model
from mat_torch import Checkpoint
from mat_torch.attention import effective_window

__all__ = ["DEFAULT_OPSET", "ExportReport", "build_model", "count_nodes", "export_onnx"]

DEFAULT_OPSET = 20
"""What torch's exporter is asked for; older ones come from it by a pass of ours."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
        path: The file.
        digest: SHA-256 of it.
        bytes: Its size.
        nodes: Nodes of the graph and of its functions, each function counted once.
        inlined_nodes: Nodes once functions are inlined and what is constant in them is evaluated.
        opset: Version of the standard operators.
        rewrites: Places in which each rewrite was applied, by name.
        seconds: Wall time of the whole export.
    """

    path: str
    digest: str
    bytes: int
    nodes: int
    inlined_nodes: int
    opset: int
    rewrites: dict[str, int]
    seconds: float


def export_onnx(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    spec: GraphSpec | None = None,
    *,
    opset: int = DEFAULT_OPSET,
    progress: Progress = lambda message: None,
) -> ExportReport:
    """Export a checkpoint to one ``.onnx`` file with a manifest beside it.

    Args:
        checkpoint: The weights.
        path: Where to write; a file there is replaced once the new one is complete.
        spec: Batch, size, noise and types of the graph; by default one native float image.
        opset: 17 to 20.
        progress: Called with a line as each step begins.

    Raises:
        UserError: For an ablation of the network, an opset out of range, or a folder that cannot
            be written.
    """
    start = time.perf_counter()
    require_exportable(checkpoint.config)
    require_writable(path)
    spec = (spec or GraphSpec(checkpoint.config)).with_changes(
        checkpoint=checkpoint.digest, source=checkpoint.source
    )
    model, rewrites = build_model(checkpoint, spec, opset=opset, progress=progress)
    progress("checking the file with onnx.checker and full shape inference")
    onnx.checker.check_model(model, full_check=True)
    progress("writing")
    digest, size = save_model(
        model,
        path,
        {
            "kind": "onnx",
            "graph": spec,
            "opset": opset,
            "rewrites": rewrites,
            "made_from": {"checkpoint_digest": checkpoint.digest, "source": checkpoint.source},
        },
    )
    return ExportReport(
        path=os.fspath(path),
        digest=digest,
        bytes=size,
        nodes=count_nodes(model),
        inlined_nodes=_inlined_count(model),
        opset=opset,
        rewrites=rewrites,
        seconds=time.perf_counter() - start,
    )


def build_model(
    checkpoint: Checkpoint,
    spec: GraphSpec,
    *,
    opset: int = DEFAULT_OPSET,
    progress: Progress = lambda message: None,
) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The ONNX model of a checkpoint, and where each rewrite was applied.

    Raises:
        UserError: For an ablation of the network, or an opset out of range.
    """
    require_exportable(checkpoint.config)
    if not LOWEST_OPSET <= opset <= DEFAULT_OPSET:
        raise UserError(f"opset {opset} is not from {LOWEST_OPSET} to {DEFAULT_OPSET}")
    progress("rewriting the model into its inference form")
    inference = InferenceGenerator(checkpoint.build(), spec)
    rewrites = rewrite_counts(inference)
    progress("tracing with torch.export and translating to ONNX")
    graph = _translate(inference, spec)
    progress("naming nodes after their modules")
    _name_nodes(graph)
    _name_constants(graph, set(inference.state_dict()))
    _describe(graph, spec)
    model = ir.to_proto(graph)
    model.functions.extend(functions.function_library(DEFAULT_OPSET, dynamic=spec.dynamic_size))
    if opset < DEFAULT_OPSET:
        progress(f"lowering to opset {opset}")
        lower_opset(model, opset)
        del model.functions[:]
        model.functions.extend(functions.function_library(opset, dynamic=spec.dynamic_size))
    return model, rewrites


def count_nodes(model: onnx.ModelProto) -> int:
    """Nodes of the graph and of every function, each function once."""
    return len(model.graph.node) + sum(len(function.node) for function in model.functions)


def _inlined_count(model: onnx.ModelProto) -> int:
    """Nodes after inlining; weights stay behind to keep this cheap."""
    graph = onnx.helper.make_graph(model.graph.node, "bare", [], [])
    bare = onnx.helper.make_model(
        graph, functions=list(model.functions), opset_imports=list(model.opset_import)
    )
    return len(inline_functions(bare).graph.node)


# -- translation --------------------------------------------------------------------------------


def _translate(model: InferenceGenerator, spec: GraphSpec) -> ir.Model:
    """torch.export and torch.onnx, quietly."""
    axes = [
        {i: axis for i, axis in enumerate(tensor.shape) if isinstance(axis, str)}
        for tensor in spec.inputs
    ]
    with _quiet():
        program = torch.onnx.export(
            model,
            tuple(_example_inputs(spec)),
            dynamo=True,
            opset_version=DEFAULT_OPSET,
            custom_translation_table=_translations(spec.dynamic_size),
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=_dynamic_shapes(axes) if any(axes) else None,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    return program.model


def _dynamic_shapes(axes: list[dict[int, str]]) -> tuple[Any, ...]:
    """Dynamic axes in the shape of the arguments: six of them, then the noise as a tuple."""
    return (*axes[:6], tuple(axes[6:])) if len(axes) > 6 else tuple(axes)


def _example_inputs(spec: GraphSpec) -> list[torch.Tensor]:
    """Zeros of the right shapes and types; dynamic axes get sizes that differ from 1 and 0."""
    r = spec.config.resolution
    h, w = spec.config.bottleneck_grid(2 * r, 3 * r)
    sizes = {
        "batch": 2,
        "height": 2 * r,
        "width": 3 * r,
        "tokens": h * w,
        "grid_height": h,
        "grid_width": w,
    }
    for side in spec.config.noise_resolutions.values():
        sizes[f"height_{side}"], sizes[f"width_{side}"] = 2 * side, 3 * side

    def zeros(tensor: TensorSpec) -> torch.Tensor:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
        return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))

    return [zeros(tensor) for tensor in spec.inputs]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own warnings (torchvision missing, deprecations inside torch) away."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _translations(dynamic: bool) -> dict[Any, Callable[..., Any]]:
    """How each custom operator becomes an ONNX node."""
    from onnxscript import opset20 as standard

    attention = _operator(functions.ATTENTION, ["q", "k", "v", "valid"], ["y"], dynamic, "heads")
    unmasked = _operator(functions.UNMASKED_ATTENTION, ["q", "k", "v"], ["y"], dynamic, "heads")
    propagation = _operator(functions.PROPAGATION, ["valid"], ["y"], dynamic)
    weights = ["query_key_weight", "query_key_bias", "value_weight"]
    query_key_value = _operator(functions.QUERY_KEY_VALUE, ["x", *weights], ["q", "k", "v"], None)
    parts = [f"{name}_{part}" for name in ("fuse", "fc1", "fc2") for part in ("weight", "bias")]
    fuse_mlp = _operator(functions.FUSE_MLP, ["x", "y", *parts], ["z"], None)
    style_scales = _operator(
        functions.STYLE_SCALES,
        ["style", "weight", "bias", "energy", "norm"],
        ["scale", "factor", "magnitude"],
        None,
        "width",
        "demodulated",
    )

    def cut(x: Any, axis: int, window: int, shift: int) -> dict[str, int]:
        if dynamic:
            return {"window": window, "shift": shift}
        height, width = int(x.shape[axis]), int(x.shape[axis + 1])
        window, shift = effective_window(height, width, window, shift)
        return {"window": window, "shift": shift, "height": height, "width": width}

    def translate_attention(
        q: Any, k: Any, v: Any, valid: Any, window: int, shift: int, heads: int
    ) -> Any:
        attributes = {**cut(q, 1, window, shift), "heads": heads}
        if valid is None:
            return unmasked(q, k, v, **attributes)
        return attention(q, k, v, valid, **attributes)

    def translate_propagation(valid: Any, window: int, shift: int) -> Any:
        return propagation(valid, **cut(valid, 2, window, shift))

    def translate_style_scales(style: Any, weight: Any, bias: Any, energy: Any, norm: Any) -> Any:
        count, width, _ = (int(side) for side in energy.shape)
        return style_scales(style, weight, bias, energy, norm, width=width, demodulated=count)

    def translate_depth_to_space(x: Any) -> Any:
        return standard.DepthToSpace(x, blocksize=2, mode="DCR")

    return {
        ops.masked_window_attention._opoverload: translate_attention,
        ops.mask_propagation._opoverload: translate_propagation,
        ops.query_key_value._opoverload: lambda *inputs: query_key_value(*inputs),
        ops.fuse_mlp._opoverload: lambda *inputs: fuse_mlp(*inputs),
        ops.style_scales._opoverload: translate_style_scales,
        ops.depth_to_space._opoverload: translate_depth_to_space,
    }


def _operator(
    name: str, inputs: list[str], outputs: list[str], dynamic: bool | None, *more: str
) -> values.Op:
    """An operator of our domain for the exporter; `dynamic` None means it cuts no windows."""
    schema = onnx.defs.OpSchema
    parameter, attribute = schema.FormalParameter, schema.Attribute
    attributes = [*([] if dynamic is None else ["window", "shift"]), *more]
    if dynamic is False:
        attributes += ["height", "width"]

    def typed(tensor: str) -> str:
        return "M" if tensor == "valid" or name == functions.PROPAGATION else "T"

    kinds = {typed(tensor) for tensor in (*inputs, *outputs)}
    constraints = {
        "T": ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "features"),
        "M": ("M", ["tensor(bool)"], "validity"),
    }
    return values.Op(
        values.Opset(OPERATOR_DOMAIN, 1),
        name,
        schema(
            name,
            OPERATOR_DOMAIN,
            1,
            inputs=[parameter(tensor, typed(tensor)) for tensor in inputs],
            outputs=[parameter(tensor, typed(tensor)) for tensor in outputs],
            type_constraints=[constraints[kind] for kind in sorted(kinds)],
            attributes=[attribute(a, schema.AttrType.INT, required=True) for a in attributes],
        ),
    )


# -- names --------------------------------------------------------------------------------------

_SCOPES = "pkg.torch.onnx.name_scopes"

_LISTED = 8
"""Most elements of a constant that its name spells out."""


def _name_nodes(model: ir.Model) -> None:
    """Name nodes ``module/Op`` and tensors after the node that makes them; drop trace metadata.

    The masks of stage one get the names of the contract, ``mask_state/LAYER``.
    """
    graph = model.graph
    fixed = {value.name for value in (*graph.inputs, *graph.outputs)}
    taken: dict[str, int] = {}
    for node in graph:
        base = f"{_module_of(node)}/{node.op_type}".lstrip("/")
        count = taken[base] = taken.get(base, 0) + 1
        node.name = base if count == 1 else f"{base}_{count}"
        for i, output in enumerate(node.outputs):
            if output.name in fixed or not output.name:
                continue
            output.name = node.name if len(node.outputs) == 1 else f"{node.name}:{i}"
        state = _mask_state(node)
        if state is not None:
            node.outputs[0].name = f"mask_state/{state}"
    for item in (model, graph, *graph, *graph.inputs, *graph.outputs):
        item.metadata_props.clear()
        item.doc_string = ""
    for node in graph:
        for output in node.outputs:
            output.metadata_props.clear()


def _name_constants(model: ir.Model, weights: Set[str]) -> None:
    """Name constants other than the model's weights after their value, or after their reader.

    The exporter numbers them. Few elements: ``constant/int64:[2,3]``; more: ``MODULE/Op.INPUT``.
    """
    graph = model.graph
    taken: dict[str, int] = {}
    for value in [v for v in graph.initializers.values() if v.name not in weights]:
        base = _constant_name(value)
        count = taken[base] = taken.get(base, 0) + 1
        value.name = base if count == 1 else f"{base}_{count}"


def _constant_name(value: ir.Value) -> str:
    if value.const_value is None:
        raise RuntimeError(f"the initializer '{value.name}' has no value")
    array = value.const_value.numpy()
    if array.size <= _LISTED:
        numbers = ",".join(f"{number:.8g}" for number in array.ravel().tolist())
        return f"constant/{array.dtype}:{f'[{numbers}]' if array.ndim else numbers}"
    use = next(iter(value.uses()))
    schema = onnx.defs.get_schema(use.node.op_type, DEFAULT_OPSET, use.node.domain)
    return f"{use.node.name}.{schema.inputs[use.idx].name}"


def _module_of(node: ir.Node) -> str:
    """The innermost module a node came from, by torch's scopes, else by its weights."""
    text = node.metadata_props.get(_SCOPES)
    if text:
        scopes: list[str] = ast.literal_eval(text)
        # Sizes of the inputs come from no module: the exporter puts a name of its own there.
        modules = [scope for scope in scopes[:-1] if scope and not scope.startswith("_")]
        return modules[-1] if modules else ""
    for value in node.inputs:
        if value is not None and value.is_initializer() and "." in (value.name or ""):
            return str(value.name).rpartition(".")[0]
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is not None and "/" in (producer.name or ""):
            return str(producer.name).rpartition("/")[0]
    return ""


def _mask_state(node: ir.Node) -> str | None:
    """Layer whose mask this node makes, by the names of the contract, or None."""
    module = (node.name or "").rpartition("/")[0]
    if node.op_type not in ("MaxPool", functions.PROPAGATION):
        return None
    return module.removeprefix("first_stage.")


def _describe(model: ir.Model, spec: GraphSpec) -> None:
    """Say in the file what it is."""
    model.producer_name = "mat-export"
    model.producer_version = package_version()
    model.doc_string = "Mask-Aware Transformer (MAT) inpainting, arXiv 2203.15270"
    model.graph.name = spec.config.name
    model.metadata_props[METADATA_KEY] = spec.to_json()
    model.opset_imports[OPERATOR_DOMAIN] = 1
    for tensor, value in zip(
        (*spec.inputs, *spec.outputs), (*model.graph.inputs, *model.graph.outputs), strict=True
    ):
        value.doc_string = tensor.meaning
        value.shape = ir.Shape(tensor.shape)
