"""Swap the weights of a built engine: seconds instead of minutes, since every kernel stays."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engines.papers import OpenedPlan, save_engine
from mat_export.contract import GraphSpec, UserError

if TYPE_CHECKING:
    import onnx

__all__ = ["RefitReport", "refit_plan"]


@dataclass(frozen=True)
class RefitReport:
    """What a refit did.

    Attributes:
        manifest: Everything that is known of the new engine.
        weights: How many weights of the graph the engine holds by name.
        seconds: Wall time, reading and writing included.
    """

    manifest: dict[str, Any]
    weights: int
    seconds: float


def refit_plan(
    opened: OpenedPlan,
    model: onnx.ModelProto,
    output: str | os.PathLike[str],
    *,
    command: Sequence[str],
    sources: Mapping[str, Any] | None = None,
) -> RefitReport:
    """Write an engine with the weights of another checkpoint.

    Args:
        opened: The engine, built with ``refittable``.
        model: The graph of the new weights, prepared exactly as the engine's was.
        output: Where to; the engine's own path replaces it.
        command: What would build an engine of the new weights from the start.
        sources: What the manifest says of the new weights' files; nothing that it said of the old
            ones stays, but for the passes over the graph.

    Raises:
        UserError: If the engine is not refittable, or the graph is not of the same network, types
            and options.
    """
    from onnx import numpy_helper

    started = time.monotonic()
    spec = GraphSpec.of_model(model)
    if spec is None:
        raise UserError("the new weights come in a model that is not ours")
    different = [
        f"{name} {getattr(opened.spec, name)!r} and {getattr(spec, name)!r}"
        for name in ("batch", "dynamic_size", "noise", "io", "coarse", "precision")
        if getattr(opened.spec, name) != getattr(spec, name)
    ]
    if opened.spec.config != spec.config:
        different.append(f"network {opened.spec.config.name} and {spec.config.name}")
    if different:
        raise UserError(
            f"the engine and the new weights are of different graphs ({'; '.join(different)}): "
            "export the weights with the options of the engine"
        )
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    engine = opened.backend.deserialize(opened.plan)
    held = opened.backend.refittable_weights(engine)
    plan = opened.backend.refit(engine, weights)
    manifest = dict(opened.manifest)
    for name in ("sha256", "bytes", "versions", "parity", "kind", "format"):
        manifest.pop(name, None)
    manifest["graph"] = json.loads(spec.to_json())
    passes = {k: v for k, v in manifest["sources"].items() if k == "passes"}
    manifest["sources"] = {**passes, **(sources or {}), "checkpoint": spec.checkpoint}
    manifest["command"] = list(command)
    digest = hashlib.sha256(model.SerializeToString()).hexdigest()
    manifest["request"] = {**manifest["request"], "model": digest}
    manifest["key"] = f"refit of {opened.manifest['key']} with {digest}"
    manifest["refitted_from"] = opened.manifest["sha256"]
    manifest = save_engine(plan, output, manifest)
    return RefitReport(manifest, len(held & weights.keys()), time.monotonic() - started)
