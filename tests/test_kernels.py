"""The CUDA kernels: equal to the PyTorch reference, compiled for every GPU, and clear refusals.

There is no GPU here, so the very sources run on a CPU (`cuda_on_cpu`): threads are fibers, and the
tensor cores are played by the layouts that PTX documents. That proves arithmetic and indices, not
speed and not the absence of races: on a GPU, `gpu/check_kernels.py` looks for those.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import BARS, HARD, Case, any_case, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import call_kernels, compile_on_paper, in_double

from engines.plugins.kernels import KernelLibrary, Tokens, compile_kernels, find_nvcc
from mat_export import ops
from mat_export.contract import UserError

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs CUDA's compiler nvcc")


def check(library: KernelLibrary, case: Case) -> None:
    q, k, v, valid = draw(case)
    cut = {"window": case.window, "shift": case.shift}
    answer = call_kernels(
        library, q, k, v, valid, **cut, heads=case.heads, mask_dtype=case.mask_dtype
    )
    expected = in_double(q, k, v, valid, **cut, heads=case.heads)
    error = (answer.y.double() - expected).norm() / expected.norm()
    assert error <= BARS[case.dtype], case
    assert answer.tidy, case
    if valid is None:
        assert (answer.behind == 1).all()
        return
    mask = ops.mask_propagation(valid, **cut)[:, 0].to(answer.behind.dtype)
    assert torch.equal(answer.behind, mask), case
    assert answer.alone is not None
    assert torch.equal(answer.alone, mask), case


@pytest.mark.parametrize("dtype", list(BARS), ids=str)
@pytest.mark.parametrize("case", HARD.values(), ids=HARD.keys())
def test_hard_cases_equal_the_reference(
    paper_kernels: KernelLibrary, case: Case, dtype: torch.dtype
) -> None:
    check(paper_kernels, replace(case, dtype=dtype))


@settings(max_examples=40, deadline=None)
@given(case=st.composite(lambda draw: any_case(lambda of: draw(st.sampled_from(of))))())
def test_any_case_equals_the_reference(paper_kernels: KernelLibrary, case: Case) -> None:
    check(paper_kernels, case)


def test_logits_beyond_the_range_of_half_are_fine(paper_kernels: KernelLibrary) -> None:
    q, k, v, valid = draw(Case(8, 4, (2, 2)))
    q, k = q * 60.0, k * 60.0  # products of some 1e5
    y = call_kernels(paper_kernels, q, k, v, valid, window=8, shift=4, heads=2).y.double()
    expected = in_double(q, k, v, valid, window=8, shift=4, heads=2)
    assert (y - expected).norm() <= BARS[torch.float16] * expected.norm()


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
        ({"mask_dtype": "int8"}, "masks of bool, int32"),
    ],
)
def test_what_the_kernels_do_not_have_is_refused_in_a_sentence(
    paper_kernels: KernelLibrary, changes: dict[str, Any], words: str
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
        paper_kernels.attention(
            *(Tokens(x.data_ptr(), x.stride(2)) for x in (q, k, v, y)), **{**call, **changes}
        )


def test_the_driver_for_compute_sanitizer_writes_what_it_should(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to run the kernels on the CPU")
    source = Path(__file__).parent / "gpu" / "sanitize.cu"
    driver = compile_on_paper(tmp_path / "sanitize", "-x", "c++", str(source))
    done = subprocess.run([str(driver)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(": written\n") == 18 + 20 + 8  # attentions, epilogues, norms


@needs_nvcc
@pytest.mark.parametrize(
    "architecture", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
)
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
