"""The operators run the kernels where they can, and PyTorch everywhere else.

The kernels are those of a CPU that plays a GPU, put before the operators' CPU form.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from attention_cases import BARS, Case, draw
from kernel_harness import in_double
from torch import Tensor

from engines.plugins import torch_operators
from engines.plugins.kernels import KernelLibrary, Tokens
from mat_export import ops
from mat_export.contract import UserError
from mat_torch import attention


@dataclass
class Watched:
    """A library that notes what it is asked for.

    Attributes:
        library: The kernels; None: there are none.
        calls: The arguments of every launch.
    """

    library: KernelLibrary | None = None
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def on(self, device: torch.device) -> Any:
        return None if self.library is None else self

    def attention(self, *tokens: Tokens, **options: Any) -> None:
        assert self.library is not None
        self.calls.append(tokens)
        self.library.attention(*tokens, **options)

    def propagate(self, *addresses: int, **options: Any) -> None:
        assert self.library is not None
        self.calls.append(addresses)
        self.library.propagate(*addresses, **options)


WATCHED = Watched()
"""Registered once, as torch keeps what it is told."""


@pytest.fixture
def watched(paper_kernels: KernelLibrary) -> Iterator[Watched]:
    torch_operators._register("cpu", WATCHED.on)
    WATCHED.library, WATCHED.calls = paper_kernels, []
    yield WATCHED
    WATCHED.library = None


def check(*call: Any) -> None:
    y = ops.masked_window_attention(*call)
    q, k, v, valid, window, shift, heads = call
    expected = in_double(q, k, v, valid, window=window, shift=shift, heads=heads)
    assert y.dtype == call[0].dtype
    assert y.is_contiguous()
    assert (y.double() - expected).norm() <= BARS.get(y.dtype, 1e-12) * expected.norm()


@pytest.mark.parametrize("dtype", list(BARS), ids=str)
def test_the_operators_run_the_kernels(watched: Watched, dtype: torch.dtype) -> None:
    q, k, v, valid = draw(Case(8, 4, (2, 3), dtype=dtype, batch=2))
    check(q, k, v, valid, 8, 4, 2)
    check(q, k, v, None, 8, 4, 2)
    assert valid is not None
    out = ops.mask_propagation(valid, 8, 4)
    assert torch.equal(out, attention.mask_propagation(valid, window=8, shift=4))
    assert len(watched.calls) == 3


def test_views_of_one_tensor_are_read_where_they_lie(watched: Watched) -> None:
    q, k, v, valid = draw(Case(8, 4, (2, 2), packed=True))
    check(q, k, v, valid, 8, 4, 2)
    ((*given, _),) = watched.calls
    assert given == [Tokens(x.data_ptr(), 180) for x in (q, k, v)]


def test_other_layouts_are_copied(watched: Watched) -> None:
    q, k, v, valid = draw(Case(8, 4, (2, 2)))
    odd = torch.randn(1 + q.numel()).half()[1:].view(q.shape)  # two bytes beside a word
    wide = torch.randn(*q.shape[:3], 61).half()[..., :60]
    check(q.transpose(1, 2), k, v, valid, 8, 4, 2)
    check(q, k.flip(1), wide, valid, 8, 4, 2)
    check(odd, k.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), v, valid, 8, 4, 2)
    assert len(watched.calls) == 3


def test_one_mask_serves_all_images(watched: Watched) -> None:
    q, k, v, valid = draw(Case(8, 4, (2, 2), batch=3))
    assert valid is not None
    check(q, k, v, valid[:1], 8, 4, 2)
    check(q, k, v, valid[:, :, ::2].repeat_interleave(2, 2), 8, 4, 2)
    assert len(watched.calls) == 2


def test_a_small_grid_is_cut_as_the_reference_cuts_it(watched: Watched) -> None:
    q, k, v, valid = draw(Case(8, 0, (1, 2)))
    check(q, k, v, valid, 16, 8, 2)  # a window of 8, unshifted
    assert len(watched.calls) == 1


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda q: (q.double(), *[q.double()] * 2, None, 8, 4, 2), id="FP64"),
        pytest.param(lambda q: (q, q, q, None, 4, 2, 2), id="a window of 4"),
        pytest.param(lambda q: (q, q, q, None, 8, 4, 4), id="heads of 15"),
        pytest.param(lambda q: (q, q, q, None, 8, 4, 1), id="a head of 60"),
    ],
)
def test_what_the_kernels_do_not_have_is_pytorchs(watched: Watched, call: Any) -> None:
    q, *_ = draw(Case(8, 4, (2, 2), dtype=torch.float32))
    check(*call(q))
    assert watched.calls == []


def test_wrong_calls_fail_as_they_did(watched: Watched) -> None:
    q, k, v, valid = draw(Case(8, 4, (2, 2), dtype=torch.float32))
    assert valid is not None
    for call in (
        (q, k[:, :8], v, valid, 8, 4, 2),
        (q, k.half(), v, valid, 8, 4, 2),
        (q, k, v, valid[..., :8], 8, 4, 2),
        (q[:, :12], k[:, :12], v[:, :12], None, 8, 4, 2),
    ):
        with pytest.raises(RuntimeError):
            ops.masked_window_attention(*call)
    assert watched.calls == []


def test_without_kernels_everything_is_pytorchs(watched: Watched) -> None:
    q, k, v, valid = draw(Case(8, 4, (2, 2), dtype=torch.float32))
    assert valid is not None
    watched.library = None
    check(q, k, v, valid, 8, 4, 2)
    out = ops.mask_propagation(valid, 8, 4)
    assert torch.equal(out, attention.mask_propagation(valid, window=8, shift=4))
    assert watched.calls == []


def test_the_kernels_can_be_taken_back_for_a_while(watched: Watched) -> None:
    q, k, v, valid = draw(Case(8, 4, (2, 2)))
    with ops.masked_window_attention.set_kernel_enabled("cpu", enabled=False):
        ops.masked_window_attention(q.float(), k.float(), v.float(), valid, 8, 4, 2)
    assert watched.calls == []


def test_a_compiled_function_runs_the_kernels(watched: Watched) -> None:
    q, k, v, valid = draw(Case(8, 4, (2, 2), packed=True, dtype=torch.float32))
    assert valid is not None

    def block(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        y = ops.masked_window_attention(q * 2.0, k, v, valid, 8, 4, 2)
        return y + 1.0, ops.mask_propagation(valid, 8, 4)

    y, mask = torch.compile(block, backend="aot_eager", fullgraph=True)(q, k, v, valid)
    expected = in_double(q * 2.0, k, v, valid, window=8, shift=4, heads=2) + 1.0
    assert (y.double() - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(mask, attention.mask_propagation(valid, window=8, shift=4))
    assert len(watched.calls) == 2


# -- finding the library ---------------------------------------------------------------------------

HOPPER = (9, 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU by name, none of whose libraries was opened yet."""
    monkeypatch.setattr(torch_operators, "_opened", {})
    monkeypatch.setattr(torch_operators, "_capability", lambda device: HOPPER)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return torch.device("cuda", 0)


def test_a_library_is_opened_once(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(torch_operators, "open_kernels", opened.append)
    for _ in range(2):
        torch_operators._kernels_on(gpu)
    assert opened == [HOPPER]


def test_a_missing_compiler_is_one_warning(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(capability: tuple[int, int]) -> None:
        raise UserError("CUDA's compiler nvcc is not on the PATH")

    monkeypatch.setattr(torch_operators, "open_kernels", missing)
    with pytest.warns(RuntimeWarning, match="stay plain PyTorch on this GPU: CUDA's compiler nvcc"):
        assert torch_operators._kernels_on(gpu) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch_operators._kernels_on(gpu) is None


def test_nothing_is_compiled_while_a_graph_is_captured(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="warm_up"):
        torch_operators._kernels_on(gpu)


def test_the_operators_find_the_kernels_by_themselves_and_compile_nothing() -> None:
    """A process that imports them alone, without a compiler."""
    program = """
import sys, torch, mat_export.ops
from engines.plugins import torch_operators
for name in (torch_operators.ATTENTION, torch_operators.PROPAGATION):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
assert torch_operators._opened == {}
"""
    environment = {**os.environ, "PATH": ""}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)


def test_using_the_kernels_twice_and_without_a_gpu_changes_nothing_here() -> None:
    torch_operators.use_kernels()
    torch_operators.use_kernels()
    q, k, v, valid = draw(Case(8, 4, (2, 2), dtype=torch.float32))
    check(q, k, v, valid, 8, 4, 2)
