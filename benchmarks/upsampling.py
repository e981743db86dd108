"""How best to convolve to twice the size: ONNX Runtime on the CPU, layer by layer.

Three exact forms of "zeros between samples, 3×3 convolution, FIR":

- ``fused``: one 3×3 convolution to 4·C channels, the FIR inside, and depth-to-space;
- ``packed``: one 2×2 convolution to 4·C channels (7 of 16 taps zero), depth-to-space, FIR;
- ``phases``: four convolutions of 2×2, 2×1, 1×2 and 1×1, depth-to-space, FIR (what is exported).

    python benchmarks/upsampling.py [--json FILE] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from mat_export.bench import machine

LAYERS = [
    ("first_stage.tran.4", 180, 180, 32),
    ("first_stage.dec_conv.0", 180, 180, 64),
    ("first_stage.dec_conv.2", 180, 180, 256),
    ("second_stage.Dec_64", 512, 512, 32),
    ("second_stage.Dec_128", 512, 256, 64),
    ("second_stage.Dec_256", 256, 128, 128),
    ("second_stage.Dec_512", 128, 64, 256),
]
"""Name, channels in and out, and side before upsampling, at native 512."""

_ALL = [1, 1, 1, 1]


def forms(cin: int, cout: int) -> dict[str, tuple[list[Any], dict[str, tuple[int, ...]]]]:
    """Nodes and weight shapes of each form, from x to y."""

    def conv(x: str, w: str, y: str, pads: Sequence[int], group: int = 1) -> Any:
        return helper.make_node("Conv", [x, w], [y], pads=list(pads), group=group)

    def spread(x: str, y: str, mode: str) -> Any:
        return helper.make_node("DepthToSpace", [x], [y], blocksize=2, mode=mode)

    fir = {"k": (cout, 1, 4, 4)}
    # Kernel and padding (top, left, bottom, right) of each phase.
    phases = [
        ((2, 2), _ALL),
        ((2, 1), [1, 0, 1, 1]),
        ((1, 2), [0, 1, 1, 1]),
        ((1, 1), [0, 0, 1, 1]),
    ]
    parts = [f"p{i}" for i in range(4)]
    return {
        "fused": (
            [conv("x", "w", "c", _ALL), spread("c", "y", "CRD")],
            {"w": (4 * cout, cin, 3, 3)},
        ),
        "packed": (
            [
                conv("x", "w", "c", _ALL),
                spread("c", "d", "CRD"),
                conv("d", "k", "y", [1, 1, 0, 0], cout),
            ],
            {"w": (4 * cout, cin, 2, 2), **fir},
        ),
        "phases": (
            [
                *(conv("x", f"w{i}", parts[i], pads) for i, (_, pads) in enumerate(phases)),
                helper.make_node("Concat", parts, ["c"], axis=1),
                spread("c", "d", "DCR"),
                conv("d", "k", "y", [1, 1, 0, 0], cout),
            ],
            {**{f"w{i}": (cout, cin, *k) for i, (k, _) in enumerate(phases)}, **fir},
        ),
    }


def session(nodes: list[Any], weights: dict[str, tuple[int, ...]], x: Any, threads: int) -> Any:
    """An ONNX Runtime session of one form."""
    rng = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(rng.standard_normal(shape, dtype=np.float32) * 0.02, name)
        for name, shape in weights.items()
    ]
    graph = helper.make_graph(
        nodes,
        "form",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options)


def measure(threads: int, runs: int) -> list[dict[str, Any]]:
    """Median milliseconds of each form in each layer; forms take turns."""
    results = []
    for name, cin, cout, side in LAYERS:
        x = np.random.default_rng(1).standard_normal((1, cin, side, side), dtype=np.float32)
        sessions = {
            form: session(nodes, weights, x, threads)
            for form, (nodes, weights) in forms(cin, cout).items()
        }
        times: dict[str, list[float]] = {form: [] for form in sessions}
        for i in range(runs + 1):
            for form, one in sessions.items():
                start = time.perf_counter()
                one.run(None, {"x": x})
                if i:
                    times[form].append(1e3 * (time.perf_counter() - start))
        row = {form: median(own) for form, own in times.items()}
        results.append({"layer": name, "shape": [cin, cout, side], **row})
        print(f"{name:24} " + "  ".join(f"{form} {ms:7.1f} ms" for form, ms in row.items()))
    return results


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    results = measure(options.threads, options.runs)
    if options.json:
        entries = {"machine": machine(), "threads": options.threads, "layers": results}
        options.json.write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main()
