"""What `benchmarks/attention.py` times is the same function in every way, and what it says follows.

Its times need a GPU; everything else runs here.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.plugins.kernels import KernelLibrary

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "attention.py"


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The benchmark as a module."""
    sys.path.insert(0, str(SCRIPT.parent))  # for what it imports from beside it
    spec = importlib.util.spec_from_file_location("attention_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["attention_benchmark"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


def test_the_blocks_are_the_networks(script: Any) -> None:
    names = [block.name for block in script.blocks([1, 8])]
    assert len(set(names)) == 10
    assert names[1] == "64×64, window 8, shift 4, batch 1"
    assert names[-1] == "16×16, window 16, unshifted, batch 8"
    block = script.Block(64, 8, 4, 1)
    assert block.flop == 2 * 2 * 6 * 64 * 64 * 64 * 30  # two products of 64 windows, 64 × 64 × 30
    assert block.bytes == 64 * 64 * (4 * 180 * 2 + 1)


@pytest.mark.parametrize("cut", [(16, 8, 0, 2), (16, 8, 4, 2), (16, 16, 0, 1)], ids=str)
def test_every_way_is_the_reference(
    script: Any, paper_kernels: KernelLibrary, cut: tuple[int, int, int, int]
) -> None:
    block = script.Block(*cut)
    regions = script.region_mask(block, "cpu")
    x = script.draw(block, regions, torch.Generator().manual_seed(1))
    truth = script.expected(block, x)
    ways = dict(script.kernel_ways(block, paper_kernels))
    assert set(ways) == {script.KERNEL, script.PROPAGATING}
    for name, way in script.pytorch_ways(block, regions).items():
        ways[name] = lambda x, way=way: script._on_tensors(way, x)
    for name, way in ways.items():
        error = float((way(x).double() - truth).norm() / truth.norm())
        assert error <= script.BAR, (name, error)
    window = {"window": block.window, "shift": block.shift}
    mask = script.attention.mask_propagation(x.valid, **window)
    assert torch.equal(x.propagated, mask)


def test_what_is_compiled_first_matters_most(script: Any) -> None:
    order = script.compile_order(script.blocks([1, 8]))
    assert len(order) == 30
    first = [(block.side, block.shift, block.batch, name) for block, name in order[:4]]
    sdpa, reference = script.COMPILED[:2]
    assert first == [(64, 4, 1, sdpa), (32, 8, 1, sdpa), (16, 0, 1, sdpa), (64, 4, 1, reference)]
    assert all(block.batch == 1 for block, _ in order[:15])


def report(script: Any) -> dict[str, Any]:
    ways = {
        script.KERNEL: {"cold_us": 4.0, "warm_us": 3.0, "right": True},
        script.PROPAGATING: {"cold_us": 4.1, "warm_us": 3.1, "right": True},
        "reference": {"cold_us": 40.0, "warm_us": 30.0, "right": True},
        "SDPA": {"cold_us": 10.0, "warm_us": 12.0, "right": True},
        "SDPA, wrong": {"cold_us": 1.0, "warm_us": 1.0, "right": False},
        "reference, compiled": {"left_out": "the time for compiling was over"},
    }
    name = script.Block(64, 8, 4, 1).name
    return {"blocks": [{"name": name, "floor_us": 1.0, "ways": ways}]}


def test_the_kernel_is_compared_with_the_best_of_the_others_that_are_right(script: Any) -> None:
    found = report(script)
    script.compare(found)
    (block,) = found["blocks"]
    assert block["cold"]["best_of_the_others"] == "SDPA"
    assert block["cold"]["times_faster"] == pytest.approx(2.5)
    assert block["cold"]["share_of_the_floor"] == pytest.approx(0.25)
    line = script.table(found).splitlines()[1]
    assert "2.50×/ 4.00×" in line
    assert "above its bar, not compared: SDPA, wrong" in script.table(found)


def test_tensorrts_times_join_by_the_names_of_blocks(script: Any) -> None:
    found = report(script)
    way = {"TensorRT": {"cold_us": 11.0, "warm_us": 6.0, "right": True}}
    blocks = {found["blocks"][0]["name"]: way, "another": way}
    script.join_tensorrt(found, {"engine": "TensorRT 8.6.0", "blocks": blocks})
    script.compare(found)
    assert found["blocks"][0]["warm"]["best_of_the_others"] == "TensorRT"
    assert found["blocks"][0]["cold"]["best_of_the_others"] == "SDPA"
    assert found["tensorrt"] == {"engine": "TensorRT 8.6.0"}


def test_a_kernel_that_failed_is_shown_and_not_compared(script: Any) -> None:
    found = report(script)
    found["blocks"][0]["ways"][script.KERNEL] = {"failed": "an error"}
    script.compare(found)
    assert "an error" in script.table(found)
    json.dumps(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so it would measure")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    output = tmp_path / "attention.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "-o", str(output)],
        capture_output=True,
        text=True,
        check=False,
        cwd=SCRIPT.parent.parent,
        env={"PYTHONPATH": str(SCRIPT.parent.parent)},
    )
    assert done.returncode == 2
    assert "on a GPU" in done.stderr
    assert not output.exists()
