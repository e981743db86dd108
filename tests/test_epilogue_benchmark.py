"""What `benchmarks/epilogue.py` times is one expression in every way, and what it says follows.

Its times need a GPU; everything else runs here.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.plugins.kernels import KernelLibrary

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module, beside the other one whose clock it uses."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("epilogue")


def test_both_kernels_are_the_expression(script: Any, paper_kernels: KernelLibrary) -> None:
    for shape in script.SHAPES:
        small = replace(shape, channels=16, side=10)
        x = script.draw(small, 2, torch.Generator().manual_seed(1))
        wide = {name: part.double() for name, part in x.parts.items()}
        truth = script.expression(small)(x.x.double(), wide)
        ways = {
            "channels last": script.kernel(small, paper_kernels, channels_last=True)(x),
            "linear": script.kernel(small, paper_kernels, channels_last=False)(x.linear()),
            "eager": script.expression(small)(x.x, x.parts),
        }
        for name, y in ways.items():
            assert (y.double() - truth).norm() <= script.BAR * truth.norm(), (shape, name)


def test_the_floor_is_what_is_read_and_written_once(script: Any) -> None:
    up, style, down, ratio = script.SHAPES[:4]
    assert up.bytes(1) == 2 * 192 * (514**2 + 2 * 512**2)
    assert style.bytes(2) == 2 * 2 * 192 * 2 * 512**2
    assert down.bytes(1) == 2 * 192 * (512**2 + 514**2)
    assert ratio.bytes(1) == 2 * (192 * 2 + 1) * 512**2


def test_the_table_marks_what_is_wrong_and_what_was_not_compiled(script: Any) -> None:
    ways = {
        "kernel": {"us": 50.0, "right": True},
        "kernel, linear": {"us": 60.0, "right": True},
        "eager": {"us": 500.0, "right": False},
    }
    report = {"shapes": [{"name": "one", "floor_us": 40.0, "ways": ways}]}
    (line,) = script.table(report).splitlines()[1:]
    assert line.split() == ["one", "40.0", "80%", "50.0", "60.0", "500.0!", "—"]


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    command = [sys.executable, str(FOLDER / "epilogue.py"), "-o", str(tmp_path / "x.json")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=FOLDER.parent,
        env={"PYTHONPATH": str(FOLDER.parent), "PATH": ""},
    )
    assert done.returncode == 2
    assert "this measures on a GPU" in done.stderr
    assert not list(tmp_path.iterdir())
