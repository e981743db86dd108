"""The CUDA kernels: equal to the PyTorch reference, compiled for every GPU, and clear refusals.

There is no GPU here, so the very sources run on a CPU (`cuda_on_cpu`): threads are fibers, and the
tensor cores are played by the layouts that PTX documents. That proves arithmetic and indices, not
speed and not the absence of races.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines.plugins.kernels import SOURCES, KernelLibrary, Tokens, compile_kernels, find_nvcc
from mat_export import ops
from mat_export.contract import UserError

PAPER = Path(__file__).parent / "cuda_on_cpu"

BARS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest ‖a − b‖ / ‖b‖ against the reference in FP32; bfloat16 has three bits less than half."""

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs CUDA's compiler nvcc")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    """The kernels, compiled for the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to run the kernels on the CPU")
    target = tmp_path_factory.mktemp("kernels") / "libpaper.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    includes = ["-I", str(PAPER), "-include", "tensor_cores.h", "-x", "c++"]
    source = str(SOURCES / "kernels.cu")
    subprocess.run([compiler, *flags, *includes, source, "-o", str(target)], check=True)
    return KernelLibrary(target)


@dataclass(frozen=True)
class Case:
    """One call, and how its numbers are drawn.

    Attributes:
        tiles: Rows and columns of the grid, in windows.
        kept: Share of valid tokens; None calls without a mask.
        dead: The first window, as it lies in the rolled grid, has no valid token.
        packed: q, k and v lie side by side in one tensor.
    """

    window: int = 8
    shift: int = 0
    tiles: tuple[int, int] = (1, 1)
    heads: int = 2
    head_size: int = 30
    batch: int = 1
    kept: float | None = 0.5
    dead: bool = False
    packed: bool = False
    dtype: torch.dtype = torch.float16
    seed: int = 0


def cases() -> st.SearchStrategy[Case]:
    @st.composite
    def build(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
        window = draw(st.sampled_from([8, 8, 16]))
        small = st.integers(1, 3 if window == 8 else 2)
        return Case(
            window,
            draw(st.integers(0, window - 1)),
            (draw(small), draw(small)),
            draw(st.integers(1, 3 if window == 8 else 1)),
            2 * draw(st.integers(1, 16)),
            draw(st.integers(1, 2 if window == 8 else 1)),
            draw(st.sampled_from([None, 0.0, 0.02, 0.5, 1.0])),
            draw(st.booleans()),
            draw(st.booleans()),
            draw(st.sampled_from(list(BARS))),
            draw(st.integers(0, 2**32 - 1)),
        )

    return build()


HARD = {
    "window 8 of the network": Case(8, 0, (2, 2), 6),
    "window 8, shifted": Case(8, 4, (2, 3), 6),
    "window 16 of the network": Case(16, 0, (2, 1), 2),
    "window 16, shifted": Case(16, 8, (2, 2), 1),
    "all invalid": Case(8, 4, (2, 2), kept=0.0),
    "all valid": Case(8, 4, (2, 2), kept=1.0),
    "a window without a valid token": Case(8, 0, (2, 2), dead=True),
    "a shifted window without a valid token": Case(8, 4, (2, 2), dead=True),
    "no mask": Case(8, 4, (2, 2), kept=None),
    "one window is the grid": Case(16, 0, (1, 1), 1),
    "one row of windows is not shifted": Case(8, 4, (1, 2)),
    "heads without padding": Case(8, 4, (2, 2), head_size=32),
    "heads of one pair": Case(8, 4, (2, 2), head_size=2),
    "several images": Case(8, 4, (2, 2), batch=3),
    "q, k and v side by side": Case(8, 4, (2, 2), packed=True),
    "shift by one": Case(8, 1, (2, 2)),
}


def draw(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v [B, H, W, C] of the case's type and valid [B, 1, H, W] or None."""
    generator = torch.Generator().manual_seed(case.seed)
    height, width = (case.window * n for n in case.tiles)
    channels = case.heads * case.head_size
    packed = torch.randn(case.batch, height, width, 3 * channels, generator=generator)
    packed = packed.to(case.dtype)
    q, k, v = torch.split(packed, channels, dim=3)
    if not case.packed:
        q, k, v = (x.contiguous() for x in (q, k, v))
    if case.kept is None:
        return q, k, v, None
    valid = torch.rand(case.batch, 1, height, width, generator=generator) < case.kept
    if case.dead:
        rolled = valid.roll((-case.shift, -case.shift), (2, 3))
        rolled[..., : case.window, : case.window] = False
        valid = rolled.roll((case.shift, case.shift), (2, 3))
    return q, k, v, valid


def run(library: KernelLibrary, case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result, the mask behind the block, and that of the kernel of its own."""
    q, k, v, valid = draw(case)
    shape = (case.batch, *q.shape[1:3])
    y = torch.full(v.shape, torch.nan, dtype=case.dtype)
    given_mask = None if valid is None else valid[:, 0].to(torch.uint8).contiguous()
    behind, alone = torch.full(shape, 9, dtype=torch.uint8), torch.full(shape, 9, dtype=torch.uint8)
    library.attention(
        *(Tokens(x.data_ptr(), x.stride(2)) for x in (q, k, v, y)),
        shape=shape,
        heads=case.heads,
        head_size=case.head_size,
        window=case.window,
        shift=case.shift,
        dtype=str(case.dtype).removeprefix("torch."),
        valid=None if given_mask is None else given_mask.data_ptr(),
        propagated=behind.data_ptr(),
    )
    if given_mask is None:
        return y, behind, None
    cut = {"window": case.window, "shift": case.shift}
    library.propagate(given_mask.data_ptr(), alone.data_ptr(), shape=shape, **cut)
    return y, behind, alone


def check(library: KernelLibrary, case: Case) -> None:
    q, k, v, valid = draw(case)
    y, behind, alone = run(library, case)
    wide = (x.float() for x in (q, k, v))
    expected = ops.masked_window_attention(*wide, valid, case.window, case.shift, case.heads)
    error = (y.float() - expected).norm() / expected.norm()
    assert error <= BARS[case.dtype], case
    if valid is None or alone is None:
        assert (behind == 1).all()
        return
    mask = ops.mask_propagation(valid, case.window, case.shift)[:, 0].to(torch.uint8)
    assert torch.equal(behind, mask), case
    assert torch.equal(alone, mask), case


@pytest.mark.parametrize("dtype", list(BARS), ids=str)
@pytest.mark.parametrize("case", HARD.values(), ids=HARD.keys())
def test_hard_cases_equal_the_reference(
    library: KernelLibrary, case: Case, dtype: torch.dtype
) -> None:
    check(library, replace(case, dtype=dtype))


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_any_case_equals_the_reference(library: KernelLibrary, case: Case) -> None:
    check(library, case)


def test_logits_beyond_the_range_of_half_are_fine(library: KernelLibrary) -> None:
    case = Case(8, 4, (2, 2))
    q, k, v, valid = draw(case)
    q, k = q * 60.0, k * 60.0  # products of some 1e5
    y = torch.full(v.shape, torch.nan, dtype=case.dtype)
    mask = valid[:, 0].to(torch.uint8).contiguous() if valid is not None else None
    assert mask is not None
    library.attention(
        *(Tokens(x.data_ptr(), x.stride(2)) for x in (q, k, v, y)),
        shape=(1, 16, 16),
        heads=2,
        head_size=30,
        window=8,
        shift=4,
        dtype="float16",
        valid=mask.data_ptr(),
    )
    expected = ops.masked_window_attention(q.float(), k.float(), v.float(), valid, 8, 4, 2)
    assert (y.float() - expected).norm() <= 2e-3 * expected.norm()


GOOD = Case()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": 4}, "window is 8 or 16"),
        ({"shift": 8}, "shift"),
        ({"shape": (1, 8, 12)}, "tile"),
        ({"shape": (0, 8, 8)}, "batch"),
        ({"head_size": 31}, "head size"),
        ({"head_size": 34}, "head size"),
        ({"heads": 0}, "heads"),
        ({"heads": 3}, "stride"),
        ({"dtype": "int8"}, "float32, float16, bfloat16"),
    ],
)
def test_what_the_kernels_do_not_have_is_refused_in_a_sentence(
    library: KernelLibrary, changes: dict[str, Any], words: str
) -> None:
    q, k, v, _ = draw(GOOD)
    y = torch.empty_like(v)
    call: dict[str, Any] = {
        "shape": (1, 8, 8),
        "heads": 2,
        "head_size": 30,
        "window": 8,
        "shift": 0,
        "dtype": "float16",
    }
    with pytest.raises(UserError, match=words):
        library.attention(
            *(Tokens(x.data_ptr(), x.stride(2)) for x in (q, k, v, y)), **{**call, **changes}
        )


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120"])
def test_the_kernels_compile_for_every_gpu_and_only_once(architecture: str, tmp_path: Path) -> None:
    made = compile_kernels(architecture, folder=tmp_path)
    assert made.read_bytes()[:4] == b"\x7fELF"
    before = made.stat().st_mtime_ns
    assert compile_kernels(architecture, folder=tmp_path) == made
    assert made.stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == [made.name]


@needs_nvcc
def test_what_the_compiler_says_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sm_1"):
        compile_kernels("sm_1", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="nvcc"):
        find_nvcc()


def test_a_library_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "libmat_kernels.so"
    path.write_bytes(b"no library")
    with pytest.raises(UserError, match="do not load"):
        KernelLibrary(path)
