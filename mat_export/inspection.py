"""What a file is, and what this machine can do: the commands `info` and `doctor`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mat_export.contract import GraphSpec, UserError
from mat_export.manifest import manifest_path, package_version, read_manifest
from mat_export.openers import OPENERS

__all__ = ["Check", "describe", "examine"]

Facts = dict[str, str]


def describe(path: str | os.PathLike[str]) -> Facts:
    """Facts about any file we read: ONNX model, engine, manifest, checkpoint or picture.

    Raises:
        UserError: If it is none of these, or unreadable.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"there is no file '{path}'")
    suffix = file.suffix.lower()
    if suffix == ".onnx":
        facts = _describe_onnx(file)
    elif suffix == ".json":
        facts = _describe_manifest(file)
    elif suffix in OPENERS:
        facts = _describe_engine(file)
    elif suffix in _pictures():
        facts = _describe_picture(file)
    else:
        facts = _describe_checkpoint(file)
    return {"file": str(path), "size": _size(file.stat().st_size), **facts}


def _size(count: int) -> str:
    return f"{count:,} bytes" if count < 10_000_000 else f"{count / 1e6:,.1f} MB"


def _describe_onnx(file: Path) -> Facts:
    from mat_export.contract import OPERATOR_DOMAIN
    from mat_export.engine_graph import calibration_of
    from mat_export.parity import load_onnx

    model = load_onnx(file)
    spec = GraphSpec.of_model(model)
    calls = [node.op_type for node in model.graph.node if node.domain == OPERATOR_DOMAIN]
    nodes = len(model.graph.node) + sum(len(function.node) for function in model.functions)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)
    facts = {
        "kind": "ONNX model",
        "made by": f"{model.producer_name} {model.producer_version}".strip() or "unknown",
        "opset": f"{opset}, IR version {model.ir_version}",
        "nodes": f"{nodes}, {len(model.functions)} functions counted once",
        "operators of mat": ", ".join(f"{name} ×{calls.count(name)}" for name in sorted(set(calls)))
        or "none",
    }
    if spec is None:
        return {**facts, "graph": "not exported by mat-export"}
    facts |= _describe_graph(spec)
    calibrated = calibration_of(model)
    if calibrated is not None:
        facts["calibration"] = (
            f"{calibrated.get('layers')} layers in INT8, {calibrated.get('share', 0.0):.0%} of the "
            f"convolutions' work, {calibrated.get('mean_db', 0.0):.1f} dB in the hole against FP32"
        )
    return {**facts, "manifest": "matches" if read_manifest(file) else "none"}


def _describe_graph(spec: GraphSpec) -> Facts:
    def shapes(tensors: Any) -> str:
        return ", ".join(f"{t.name} {t.dtype} [{', '.join(map(str, t.shape))}]" for t in tensors)

    return {
        "network": f"{spec.config.name}, native size {spec.config.resolution}",
        "precision": spec.precision,
        "weights": f"{spec.source or 'unknown'}, digest {spec.checkpoint[:12] or 'unknown'}",
        "inputs": shapes(spec.inputs),
        "outputs": shapes(spec.outputs),
    }


def _describe_engine(file: Path) -> Facts:
    """A file of a registered type, by its manifest, which has to be its own."""
    if read_manifest(file) is None:
        raise UserError(
            f"'{file}' has no manifest '{manifest_path(file).name}' beside it, which says what "
            "it is: bring both, or build it again"
        )
    return {**_describe_manifest(manifest_path(file)), "kind": "engine", "manifest": "matches"}


def _describe_manifest(file: Path) -> Facts:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{file}' is not readable JSON: {error}") from error
    if not isinstance(entries, dict) or not (
        "sha256" in entries and isinstance(entries.get("versions"), dict)
    ):
        raise UserError(f"'{file}' is JSON, but no manifest of mat-export")
    facts = {
        "kind": f"manifest of a file of kind {entries.get('kind', 'unknown')}",
        "sha256": str(entries["sha256"]),
        "versions": ", ".join(f"{k} {v}" for k, v in entries["versions"].items()),
    }
    facts |= _describe_build(entries)
    if "graph" in entries:
        facts.update(_describe_graph(GraphSpec.from_json(json.dumps(entries["graph"]))))
    return facts


def _describe_build(entries: dict[str, Any]) -> Facts:
    """What an engine's manifest says besides its graph."""
    if entries.get("kind") != "engine":
        return {}
    request, facts = _part(entries, "request"), {}
    facts["built by"] = f"{request.get('backend')} {request.get('version')}"
    options = _part(request, "options")
    gpu = _part(entries, "gpu").get("name") if options.get("target") is None else None
    facts["for"] = str(options.get("target") or gpu or "several GPUs")
    layers = _part(entries, "layers")
    if layers:
        kinds = ", ".join(f"{name} ×{n}" for name, n in _part(layers, "by_precision").items())
        facts["layers"] = f"{layers.get('layers')} ({kinds})"
    facts["plugins"] = _describe_plugins(_part(entries, "sources"))
    passed = _part(entries, "parity").get("passed", False)
    words = "not checked" if entries.get("parity") is None else "passed" if passed else "FAILED"
    command = entries.get("command", [])
    _require(isinstance(command, list), "command", command)
    return {**facts, "parity": words, "command": " ".join(map(str, command))}


def _describe_plugins(sources: dict[str, Any]) -> str:
    """The plugin library that an engine calls, and why it does or does not."""
    library = _part(sources, "plugin").get("path", "none")
    why = _part(sources, "plugin_choice").get("why")
    return str(library) if not why else f"{library} ({why})"


def _part(entries: dict[str, Any], name: str) -> dict[str, Any]:
    """The entries under a name; none where there are none."""
    part = entries.get(name)
    _require(part is None or isinstance(part, dict), name, part)
    return part or {}


def _require(good: bool, name: str, value: Any) -> None:
    """Raise UserError unless an entry of an engine's manifest is of its form."""
    if not good:
        raise UserError(
            f"the manifest is damaged ('{name}' is {str(value)[:40]!r}): build the engine again "
            "with 'mat-export trt'"
        )


def _pictures() -> set[str]:
    from PIL import Image

    return set(Image.registered_extensions())


def _describe_picture(file: Path) -> Facts:
    from mat_export.images import orientation_of, read_image

    notes: list[str] = []
    image = read_image(file, notes)
    return {
        "kind": "picture",
        "pixels": f"{image.width}×{image.height}, mode {image.mode}",
        "EXIF orientation": str(orientation_of(image)),
        "colour profile": "yes" if image.info.get("icc_profile") else "no",
        **({"notes": " ".join(notes)} if notes else {}),
    }


def _describe_checkpoint(file: Path) -> Facts:
    from mat_export.runners import read_checkpoint

    checkpoint = read_checkpoint(file)
    config = checkpoint.config
    parameters = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    network = f"{config.name}, native size {config.resolution}"
    return {
        "kind": "checkpoint",
        "network": ", ".join(filter(None, (network, config.describe_ablations()))),
        "values": f"{parameters / 1e6:.1f} M in {len(checkpoint.tensors)} tensors",
        "digest": checkpoint.digest,
        "source": checkpoint.source,
    }


# -- doctor -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One line of `doctor`.

    Attributes:
        name: What was looked at.
        works: Whether it works; None where it is optional and absent.
        detail: What was found, and what to do where it does not work.
    """

    name: str
    works: bool | None
    detail: str


def examine() -> list[Check]:
    """What is installed, which backends work, and why others do not."""
    return [
        Check("Python", True, f"{platform.python_version()} on {platform.platform()}"),
        Check("mat-export", True, package_version()),
        Check("memory and cores", True, f"{_memory()}, {os.cpu_count()} cores"),
        _examine_onnxruntime("CPUExecutionProvider", required=True),
        _examine_onnxruntime("CUDAExecutionProvider", required=False),
        _examine_torch(),
        _examine_cuda(),
        _examine_exporter(),
    ]


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "memory unknown"
    return f"{total / (1 << 30):.0f} GiB"


def _examine_onnxruntime(provider: str, *, required: bool) -> Check:
    """Run a model of one node on a provider."""
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper

    name = f"ONNX Runtime, {provider.removesuffix('ExecutionProvider')}"
    if provider not in ort.get_available_providers():
        detail = "not in this build; onnxruntime-gpu has it"
        return Check(name, False if required else None, detail)
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])], "g", tensors[:1], tensors[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
        (y,) = session.run(None, {"x": np.ones(2, np.float32)})
    except Exception as error:
        return Check(name, False, f"{ort.__version__}: {str(error).splitlines()[0]}")
    if provider not in session.get_providers() or not np.array_equal(y, -np.ones(2)):
        reason = "the provider did not load; its CUDA or cuDNN libraries may be missing"
        return Check(name, False, f"{ort.__version__}: {reason}")
    return Check(name, True, f"{ort.__version__}, ran a model")


def _broken(module: str) -> str | None:
    """Why an installed module does not import, or None if it does."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken install can raise anything
        return f"installed, but does not import: {str(error).splitlines()[0]}"
    return None


def _examine_torch() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("PyTorch", None, "not installed; export needs it: mat-export[export]")
    reason = _broken("torch")
    return Check("PyTorch", reason is None, reason or package_version("torch"))


def _examine_cuda() -> Check:
    if importlib.util.find_spec("torch") is None or _broken("torch"):
        return Check("CUDA in PyTorch", None, "PyTorch is not installed or does not import")
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        return Check("CUDA in PyTorch", None, f"no GPU seen (PyTorch is built with {built})")
    return Check("CUDA in PyTorch", True, torch.cuda.get_device_name())


def _examine_exporter() -> Check:
    missing = [n for n in ("torch", "onnxscript") if importlib.util.find_spec(n) is None]
    if missing:
        detail = f"{' and '.join(missing)} not installed: mat-export[export]"
        return Check("ONNX export", None, detail)
    reason = _broken("mat_export.export")
    return Check("ONNX export", reason is None, reason or _version("onnxscript"))


def _version(module: str) -> str:
    return f"{module} {package_version(module)}"
