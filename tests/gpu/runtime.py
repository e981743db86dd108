"""An engine on a GPU without PyTorch: CuPy arrays where they lie, the caller's stream, threads.

    python tests/gpu/runtime.py tiny.plan

Needs TensorRT, CuPy and a GPU; every check holds an answer against ``run`` of the same inputs, bit
by bit.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from engines.runner import EngineRunner
from mat_export.bench import example_inputs

Inputs = dict[str, NDArray[Any]]


class InterfaceOnly:
    """An array that shows the CUDA array interface and no DLPack."""

    def __init__(self, array: Any) -> None:
        self.array = array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface: dict[str, Any] = self.array.__cuda_array_interface__
        return interface


def drawn(spec: Any, seed: int) -> Inputs:
    """Inputs of one call, of a seed."""
    inputs = {name: value.copy() for name, value in example_inputs(spec, 1).items()}
    inputs["z"] = np.random.default_rng(seed).standard_normal(inputs["z"].shape).astype("float32")
    return inputs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan")
    failed = 0
    with EngineRunner(parser.parse_args().plan, contexts=2) as runner:
        engine = runner.engine
        print(f"{runner.name}; Python {sys.version.split()[0]}, CuPy {cupy.__version__}")
        calls = [drawn(runner.spec, seed) for seed in range(4)]
        expected = [runner.run(inputs) for inputs in calls]

        def check(name: str, good: bool) -> None:
            nonlocal failed
            failed += not good
            print(f"{name}: {'passed' if good else 'FAILED'}", flush=True)

        def same(found: Inputs, number: int) -> bool:
            return all(np.array_equal(found[n], value) for n, value in expected[number].items())

        check("answers differ by latent", not same(expected[1], 0))
        check("no PyTorch was imported", "torch" not in sys.modules)

        used = {tensor.name for tensor in engine.tensors if tensor.mode == "input"}
        for name, wrap in (("DLPack", lambda a: a), ("CUDA array interface", InterfaceOnly)):
            stream = cupy.cuda.Stream(non_blocking=True)
            good = True
            with stream:  # uploads, inference and downloads in one stream, one wait at the end
                results = []
                for inputs in (*calls, *calls):
                    lying = {n: cupy.asarray(v) for n, v in inputs.items() if n in used}
                    outputs = {n: cupy.empty(v.shape, v.dtype) for n, v in expected[0].items()}
                    engine.enqueue(
                        {n: wrap(v) for n, v in lying.items()},
                        {n: wrap(v) for n, v in outputs.items()},
                        stream=stream.ptr,
                    )
                    results.append((lying, outputs))
            stream.synchronize()
            for number, (_, outputs) in enumerate(results):
                good &= same({n: v.get() for n, v in outputs.items()}, number % 4)
            check(f"CuPy by {name}, in a stream of the caller", good)

        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            lying = {n: cupy.asarray(v) for n, v in calls[2].items() if n in used}
            good = True
            for _ in range(4):  # the same addresses, so a graph from the second time on
                own = engine.enqueue(lying, stream=stream.ptr)
                found = {n: cupy.asarray(v) for n, v in own.items()}
                stream.synchronize()
                good &= same({n: v.get() for n, v in found.items()}, 2)
        check("the engine's own buffers, read by CuPy, replayed as a graph", good)
        check("graphs were captured", engine.graphs)

        def called(turn: int) -> bool:
            return same(runner.run(calls[turn % 4]), turn % 4)

        with ThreadPoolExecutor(4) as threads:
            good = all(threads.map(called, range(100)))
        check("four threads through two contexts, 100 calls", good)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
