"""The CUDA kernels on a GPU, against the PyTorch reference in FP64, and under compute-sanitizer.

CI has no GPU, so this is started by hand, on a machine with one, PyTorch and nvcc. From the
repository's root:

    PYTHONPATH=.:tests python tests/gpu/check_kernels.py -o kernels.json [--cases 200] [--seed 0]
    PYTHONPATH=.:tests python tests/gpu/check_kernels.py -o sanitizer.json --sanitize

The first draws cases as ``test_kernels.py`` and ``test_epilogue_kernels.py`` do, larger ones, after
the hard ones and the network's own: errors within their bars, masks exact, nothing written outside
the results, the same bits in every run and from a CUDA graph. Then PyTorch's operators on the
kernels, eager, compiled and captured. The second runs ``sanitize.cu`` under compute-sanitizer's
tools. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from attention_cases import BARS, HARD, NETWORK, Case, any_case, draw
from epilogue_cases import FORMS, Epilogue, any_epilogue
from epilogue_cases import HARD as EPILOGUES
from epilogue_cases import NETWORK as EPILOGUES_OF_THE_NETWORK
from epilogue_cases import draw as draw_epilogue
from epilogue_cases import holds as epilogue_holds
from epilogue_cases import in_double as epilogue_in_double
from kernel_harness import Answer, EpilogueAnswer, call_epilogue, call_kernels, in_double
from torch import Tensor

from engines.plugins import torch_operators
from engines.plugins.kernels import SOURCES, KernelLibrary, Tokens, find_nvcc, open_kernels
from mat_export import ops
from mat_export.files import atomic_write
from mat_torch import attention

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
"""Of compute-sanitizer."""

T = TypeVar("T")

RUNS = 3
"""How often each case runs; every run gives the same bits."""


def main() -> int:
    """Run one half and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--cases", type=int, default=200, help="how many to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the cases drawn")
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer instead")
    parser.add_argument("--tools", default=",".join(TOOLS), help="which of its tools")
    arguments = parser.parse_args()
    started = time.perf_counter()
    if arguments.sanitize:
        report = sanitize(arguments.tools.split(","))
    else:
        report = check_all(arguments.cases, arguments.seed)
    report["seconds"] = time.perf_counter() - started
    atomic_write(arguments.output, json.dumps(report, indent=1) + "\n")
    for failure in report["failures"]:
        print(f"FAILED {failure}")
    print(f"{len(report['failures'])} failures in {report['seconds']:.0f} s")
    return 1 if report["failures"] else 0


# -- against the reference -------------------------------------------------------------------------


def check_all(count: int, seed: int) -> dict[str, Any]:
    """Every check on the current GPU."""
    capability = torch.cuda.get_device_capability()
    started = time.perf_counter()
    library = open_kernels(capability)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(capability),
        "torch": torch.__version__,
        "compile_seconds": time.perf_counter() - started,
        "cases": 0,
        "worst": {},
        "failures": [],
    }
    for name, case in all_cases(count, seed):
        report["cases"] += 1
        try:
            error = check(library, case)
        except (AssertionError, RuntimeError) as failure:
            report["failures"].append(f"{name}: {case}: {failure}")
            if "CUDA" in str(failure):
                break  # nothing runs on after such an error
            continue
        dtype = str(case.dtype).removeprefix("torch.")
        if error >= report["worst"].get(dtype, {"error": 0.0})["error"]:
            report["worst"][dtype] = {"error": error, "case": f"{name}: {case}"}
    for dtype, worst in report["worst"].items():
        print(f"{dtype}: at most {worst['error']:.2e} ({worst['case']})")
    check_epilogues(library, count, seed, report)
    print(f"{report['cases']} cases, each {RUNS} times and as a CUDA graph")
    report["operators"] = {}
    for test in (
        operators_are_the_kernels,
        a_graph_is_captured_after_a_warm_up,
        compiled_functions_run_the_kernels,
        all_else_stays_with_pytorch,
    ):
        try:
            test()
            report["operators"][test.__name__] = "passed"
        except Exception as failure:
            report["operators"][test.__name__] = f"{type(failure).__name__}: {failure}"
            report["failures"].append(f"{test.__name__}: {failure}")
        print(f"{test.__name__}: {report['operators'][test.__name__]}", flush=True)
    return report


def all_cases(count: int, seed: int) -> Iterable[tuple[str, Case]]:
    """The hard ones and the network's in every type, then drawn ones."""
    for name, case in {**HARD, **NETWORK}.items():
        for dtype in BARS:
            yield name, replace(case, dtype=dtype)
    pick = random.Random(seed).choice
    for i in range(count):
        yield f"drawn {i}", any_case(pick, large=True)


def on_gpu(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A case's tensors on the GPU, side by side where the case says so."""
    q, k, v, valid = draw(case)
    if case.packed:
        q, k, v = torch.split(torch.cat([q, k, v], dim=3).cuda(), q.shape[3], dim=3)
    return q.cuda(), k.cuda(), v.cuda(), None if valid is None else valid.cuda()


def side_stream() -> torch.cuda.Stream:
    """A stream that runs after all work so far."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def repeated(call: Callable[[], T]) -> list[T]:
    """What a call gives in RUNS runs, and in a replay of its CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side_stream()):
        answers = [call() for _ in range(RUNS)]
        torch.cuda.synchronize()
        graph.capture_begin()  # the poison is captured too
        answers.append(call())
        graph.capture_end()
        graph.replay()
    torch.cuda.synchronize()
    return answers


def check(library: KernelLibrary, case: Case) -> float:
    """Hold a case against the reference. Returns ‖a − b‖ / ‖b‖, raises AssertionError."""
    q, k, v, valid = on_gpu(case)
    cut = {"window": case.window, "shift": case.shift}
    expected = in_double(q, k, v, valid, **cut, heads=case.heads)

    def call() -> Answer:
        handle = torch.cuda.current_stream().cuda_stream
        given: dict[str, Any] = {**cut, "heads": case.heads, "mask_dtype": case.mask_dtype}
        return call_kernels(library, q, k, v, valid, **given, stream=handle)

    answers = repeated(call)
    first = answers[0]
    error = float((first.y.double() - expected).norm() / expected.norm())
    assert error <= BARS[case.dtype], f"an error of {error:.2e}"
    mask = torch.ones_like(first.behind)
    if valid is not None:
        mask = attention.mask_propagation(valid, **cut)[:, 0].to(first.behind.dtype)
    for answer in answers:
        assert answer.tidy, "written outside the results"
        assert torch.equal(answer.y, first.y), "another run, or the graph, gave other bits"
        assert torch.equal(answer.behind, mask), "the mask behind the block is wrong"
        if answer.alone is not None:
            assert torch.equal(answer.alone, mask), "the mask of the kernel of its own is wrong"
    return error


# -- the fused epilogue ----------------------------------------------------------------------------


def check_epilogues(library: KernelLibrary, count: int, seed: int, report: dict[str, Any]) -> None:
    """Hold every case of the epilogue against the formula in FP64; failures go to the report."""
    for name, case in all_epilogues(count, seed):
        report["cases"] += 1
        try:
            check_epilogue(library, case)
        except (AssertionError, RuntimeError) as failure:
            report["failures"].append(f"epilogue, {name}: {failure}")
            if "CUDA" in str(failure):
                break


def all_epilogues(count: int, seed: int) -> Iterable[tuple[str, Epilogue]]:
    """The hard ones and the network's in every form, then drawn ones."""
    for name, case in {**EPILOGUES, **EPILOGUES_OF_THE_NETWORK}.items():
        for form, changes in FORMS.items():
            yield f"{name}, {form}", replace(case, **changes)
    pick = random.Random(seed).choice
    for i in range(count):
        yield f"drawn {i}", any_epilogue(pick, large=True)


def check_epilogue(library: KernelLibrary, case: Epilogue) -> None:
    """Hold a case against the formula. Raises AssertionError."""
    x, parts = draw_epilogue(case)
    x, parts = x.cuda(), {name: part.cuda() for name, part in parts.items()}

    def call() -> EpilogueAnswer:
        handle = torch.cuda.current_stream().cuda_stream
        return call_epilogue(library, case, x, parts, stream=handle)

    answers = repeated(call)
    first = answers[0].y()
    epilogue_holds(case, first, epilogue_in_double(case, x, parts))
    for answer in answers:
        assert torch.equal(answer.y(), first), "another run, or the graph, gave other bits"


# -- PyTorch's operators ---------------------------------------------------------------------------


def block_of_the_network() -> tuple[tuple[Any, ...], Tensor]:
    """The arguments of an attention, and what the reference makes of them in FP64."""
    q, k, v, valid = on_gpu(NETWORK["mat-512, 64×64 tokens, window 8, shift 4, 1 at once"])
    expected = in_double(q, k, v, valid, window=8, shift=4, heads=6)
    return (q, k, v, valid, 8, 4, 6), expected


def holds(y: Tensor, expected: Tensor) -> None:
    error = float((y.double() - expected).norm() / expected.norm())
    assert error <= BARS[y.dtype], f"an error of {error:.2e}"


class Counting:
    """The kernels, counting the launches that PyTorch's operators ask for."""

    def __init__(self, library: KernelLibrary) -> None:
        self.library, self.calls = library, 0

    def attention(self, *tokens: Tokens, **options: Any) -> None:
        self.calls += 1
        self.library.attention(*tokens, **options)

    def propagate(self, *addresses: int, **options: Any) -> None:
        self.calls += 1
        self.library.propagate(*addresses, **options)


def counting() -> Counting:
    """Puts itself where the operators find their kernels."""
    capability = torch.cuda.get_device_capability()
    counted = Counting(open_kernels(capability))
    torch_operators._opened[capability] = counted  # type: ignore[assignment]
    return counted


def operators_are_the_kernels() -> None:
    """Each operator is one launch, of our kernel, on views of one tensor too."""
    torch_operators.use_kernels()
    counted = counting()
    call, expected = block_of_the_network()
    holds(ops.masked_window_attention(*call), expected)
    packed = torch.split(torch.cat(call[:3], dim=3), 180, dim=3)
    with torch.cuda.stream(side_stream()):
        y = ops.masked_window_attention(*packed, *call[3:])
    torch.cuda.synchronize()
    holds(y, expected)
    out = ops.mask_propagation(call[3], 8, 4)
    assert torch.equal(out, attention.mask_propagation(call[3], window=8, shift=4))
    assert counted.calls == 3, f"{counted.calls} launches for 3 calls"


def a_graph_is_captured_after_a_warm_up() -> None:
    """A capture before it is refused with a sentence, one after it works at once."""
    call, expected = block_of_the_network()
    torch_operators._opened.clear()
    stream, graph = side_stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            ops.masked_window_attention(*call)
            refused = False
        except RuntimeError as error:
            refused = "warm_up" in str(error)
        graph.capture_end()
    assert refused, "a capture without a warm-up was not refused"
    assert torch_operators.warm_up()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        y = ops.masked_window_attention(*call)
        graph.capture_end()
        y.fill_(torch.nan)
        graph.replay()
    torch.cuda.synchronize()
    holds(y, expected)


def compiled_functions_run_the_kernels() -> None:
    """Under ``torch.compile``, in the CUDA graphs that it makes."""
    counted = counting()
    call, expected = block_of_the_network()
    run = torch.compile(
        lambda q: ops.masked_window_attention(q * 1.0, *call[1:]), mode="reduce-overhead"
    )
    with torch.inference_mode():
        for _ in range(4):
            y = run(call[0])
    holds(y, expected)
    assert counted.calls, "the compiled function did without the kernels"


def all_else_stays_with_pytorch() -> None:
    """FP64 and a window of 4, without a warning."""
    counted = counting()
    call, expected = block_of_the_network()
    wide = [x.double() for x in call[:3]]
    corner = [x[:, :4, :4] for x in call[:3]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ops.masked_window_attention(*wide, *call[3:]), expected)
        assert ops.masked_window_attention(*corner, None, 8, 4, 6).isfinite().all()
    assert not counted.calls, "the kernels were asked for what they do not have"


# -- compute-sanitizer -----------------------------------------------------------------------------


def sanitize(tools: list[str]) -> dict[str, Any]:
    """``sanitize.cu`` by itself and under each tool."""
    sanitizer = shutil.which("compute-sanitizer")
    report: dict[str, Any] = {"failures": [], "tools": {}}
    if sanitizer is None:
        report["failures"].append("compute-sanitizer is not on the PATH: it is part of CUDA")
        return report
    with TemporaryDirectory() as scratch:
        driver = str(Path(scratch, "sanitize"))
        sources = (str(Path(__file__).with_name("sanitize.cu")), str(SOURCES / "kernels.cu"))
        flags = ("-std=c++17", "-O3", "-lineinfo", "-arch=native", "-I", str(SOURCES))
        subprocess.run([find_nvcc(), *flags, *sources, "-o", driver], check=True)
        options = ("--error-exitcode", "3", "--print-limit", "20")
        commands = {"none": [driver]}
        commands |= {tool: [sanitizer, "--tool", tool, *options, driver] for tool in tools}
        for tool, command in commands.items():
            started = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
            lines = (done.stdout + done.stderr).splitlines()
            entry = {
                "exit_code": done.returncode,
                "seconds": time.perf_counter() - started,
                "summary": [line for line in lines if "SUMMARY" in line],
                "written": sum(line.endswith(": written") for line in lines),
            }
            report["tools"][tool] = entry
            if done.returncode or not entry["written"] or (tool != "none" and not entry["summary"]):
                report["failures"].append(f"{tool}: exit code {done.returncode}")
                entry["output"] = lines[:200]
                print("\n".join(lines[:60]))
            print(f"{tool}: {entry['written']} written, {entry['summary']}", flush=True)
    return report


if __name__ == "__main__":
    sys.exit(main())
