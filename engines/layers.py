"""What an engine is made of, from the JSON of TensorRT's engine inspector.

Its form differs between versions and with the detail an engine was built with; what is not said is
left out of the figures, never an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

__all__ = ["LayerSummary", "summarise"]

_TYPES = (
    ("bf16", r"bf16|bfloat16", 2),
    ("fp16", r"fp16|half|float16", 2),
    ("fp8", r"fp8|e4m3|e5m2", 1),
    ("fp32", r"fp32|float32|float", 4),
    ("uint8", r"uint8", 1),
    ("int8", r"int8", 1),
    ("int32", r"int32", 4),
    ("int64", r"int64", 8),
    ("bool", r"bool", 1),
)
"""Name of each element type, how TensorRT's texts say it (``Row major linear FP32``, ``Half``), and
bytes of an element. The first that matches counts."""

_UNKNOWN = "unknown"

_REFORMAT = re.compile(r"reformat", re.IGNORECASE)


@dataclass(frozen=True)
class LayerSummary:
    """Figures of an engine.

    Attributes:
        layers: How many there are, reformats included.
        detailed: Whether TensorRT told more than their names.
        by_type: Layers of each of TensorRT's types, the most frequent first.
        by_precision: Layers by the type of their outputs, likewise; reformats not counted.
        reformats: Layers that only change how a tensor lies in memory, or its type.
        weight_bytes: Weights and biases that the layers list.
        tensor_bytes: What all layers together read and write of tensors of known shape and type.
        convolution_flop: Operations of the convolutions, two a multiply-add, by the type of what
            they read. Those inside a fused block are not told.
    """

    layers: int
    detailed: bool
    by_type: dict[str, int]
    by_precision: dict[str, int]
    reformats: int
    weight_bytes: int
    tensor_bytes: int
    convolution_flop: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Every figure by name, for JSON."""
        return asdict(self)


def summarise(information: Mapping[str, Any]) -> LayerSummary:
    """Figures from what the engine inspector told.

    Args:
        information: The inspector's JSON: ``Layers`` holds names, or an object for each layer.
    """
    found = information.get("Layers")
    layers = found if isinstance(found, list) else []
    detailed = [layer for layer in layers if isinstance(layer, Mapping)]
    reformats = [layer for layer in layers if _is_reformat(layer)]
    computing = [layer for layer in detailed if not _is_reformat(layer)]
    return LayerSummary(
        layers=len(layers),
        detailed=bool(detailed),
        by_type=_counted(str(layer.get("LayerType", _UNKNOWN)) for layer in detailed),
        by_precision=_counted(_precision(layer) for layer in computing),
        reformats=len(reformats),
        weight_bytes=sum(_weight_bytes(layer) for layer in detailed),
        tensor_bytes=sum(
            _tensor_bytes(tensor)
            for layer in detailed
            for tensor in (*_tensors(layer, "Inputs"), *_tensors(layer, "Outputs"))
        ),
        convolution_flop=_convolution_flop(detailed),
    )


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _is_reformat(layer: Any) -> bool:
    if isinstance(layer, Mapping):
        kind = layer.get("LayerType")
        return isinstance(kind, str) and _REFORMAT.search(kind) is not None
    return isinstance(layer, str) and layer.startswith("Reformatting CopyNode")


def _tensors(layer: Mapping[str, Any], side: str) -> list[Mapping[str, Any]]:
    tensors = layer.get(side)
    if not isinstance(tensors, list):
        return []
    return [tensor for tensor in tensors if isinstance(tensor, Mapping)]


def _type_of(tensor: Mapping[str, Any]) -> tuple[str, int]:
    """Name and bytes of an element; TensorRT 11 splits what others say in one text."""
    for key in ("Datatype", "DataType", "Format/Datatype", "Format"):
        text = tensor.get(key)
        if isinstance(text, str):
            for name, pattern, size in _TYPES:
                if re.search(rf"(?<![a-z])(?:{pattern})(?![0-9])", text, re.IGNORECASE):
                    return name, size
    return _UNKNOWN, 0


def _precision(layer: Mapping[str, Any]) -> str:
    """Type of the first output that has one, else of the first such input."""
    for tensor in (*_tensors(layer, "Outputs"), *_tensors(layer, "Inputs")):
        name, _ = _type_of(tensor)
        if name != _UNKNOWN:
            return name
    return _UNKNOWN


def _elements(tensor: Mapping[str, Any]) -> int:
    """How many values a tensor has, 0 if that is not known."""
    sizes = tensor.get("Dimensions")
    known = isinstance(sizes, list) and all(type(n) is int and n >= 0 for n in sizes)
    return prod(sizes) if known and isinstance(sizes, list) else 0


def _tensor_bytes(tensor: Mapping[str, Any]) -> int:
    return _elements(tensor) * _type_of(tensor)[1]


def _convolution_flop(layers: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Every weight is used once for each position of the output."""
    total: Counter[str] = Counter()
    for layer in layers:
        inputs, outputs = _tensors(layer, "Inputs"), _tensors(layer, "Outputs")
        weights, maps = layer.get("Weights"), layer.get("OutMaps")
        if not inputs or not outputs or layer.get("ParameterType") != "Convolution":
            continue
        count = weights.get("Count") if isinstance(weights, Mapping) else None
        if type(count) is int and type(maps) is int and maps > 0:
            values = _elements(outputs[0])
            total[_type_of(inputs[0])[0]] += 2 * count * values // maps
    return dict(total.most_common())


def _weight_bytes(layer: Mapping[str, Any]) -> int:
    total = 0
    for key in ("Weights", "Bias"):
        entry = layer.get(key)
        if isinstance(entry, Mapping) and type(entry.get("Count")) is int:
            total += max(0, entry["Count"]) * _type_of({"Datatype": entry.get("Type")})[1]
    return total
