"""The plugins of TensorRT 8.6, driven through their life as TensorRT does, on the CPU.

TensorRT 8.6's headers are no part of this project: TENSORRT86_INCLUDE says where they are.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import pytest
import torch
from attention_cases import DENSE, Case
from epilogue_cases import LIFE, Epilogue
from plugin_harness import Harness

HEADERS = os.environ.get("TENSORRT86_INCLUDE")

pytestmark = pytest.mark.skipif(
    HEADERS is None or shutil.which("g++") is None,
    reason="needs g++ and TensorRT 8.6's headers in TENSORRT86_INCLUDE",
)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    assert HEADERS is not None
    return Harness("v2", HEADERS, tmp_path_factory.mktemp("plugin"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE.keys())
def test_every_operator_lives_through_build_and_run(
    harness: Harness, case: Case, dtype: torch.dtype
) -> None:
    harness.check(replace(case, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "given", "missing"),
    [
        ("WindowAttention", "shift=4 heads=6", "window"),
        ("WindowAttention", "window=8 heads=6", "shift"),
        ("WindowAttention", "window=8 shift=4", "heads"),
        ("MapAttention", "window=8 heads=6", "shift"),
        ("MaskPropagation", "shift=4", "window"),
        ("MaskPropagation", "window=8", "shift"),
        ("TokenNorm", "", "floor"),
    ],
)
def test_an_attribute_that_is_missing_is_refused(
    harness: Harness, name: str, given: str, missing: str
) -> None:
    assert harness.refused(name, given)
    assert harness.last_line.startswith(f"mat::{name}: attribute '{missing}' is ")


def test_contexts_with_shapes_of_their_own_do_not_disturb_each_other(harness: Harness) -> None:
    harness.check_contexts()


def test_masks_are_integers_and_bools_are_refused(harness: Harness) -> None:
    harness.check_masks()


@pytest.mark.parametrize(
    ("window", "shift", "heads", "words"),
    [(7, 0, 6, "window"), (8, 8, 6, "shift"), (8, -1, 6, "shift"), (8, 0, 0, "heads")],
)
def test_attributes_that_no_kernel_has_are_refused(
    harness: Harness, window: int, shift: int, heads: int, words: str
) -> None:
    given = f"window={window} shift={shift} heads={heads}"
    assert harness.refused("WindowAttention", given)
    assert harness.last_line.startswith(f"mat::WindowAttention: attribute '{words}' is")
    assert not harness.refused("WindowAttention", f"window=8 shift=4 heads={heads or 1}")


def test_with_shapes_that_do_not_fit_nothing_is_run(harness: Harness) -> None:
    """Nothing here can refuse a build; a kernel would read beyond the mask."""
    q, y = torch.zeros(1, 16, 16, 12), torch.full((1, 16, 16, 12), torch.nan)
    mask = torch.ones(1, 1, 8, 16, dtype=torch.int32)
    given = "window=8 shift=4 heads=2"
    assert harness.play("MaskedWindowAttention", given, [q, q, q, mask], y) == 1  # invalid value
    assert "the mask is not [B, 1, H, W]" in harness.last_line
    assert y.isnan().all()


@pytest.mark.parametrize("layout", ["linear", "channels last"])
@pytest.mark.parametrize("case", LIFE.values(), ids=LIFE.keys())
def test_the_epilogue_lives_through_build_and_run(
    harness: Harness, case: Epilogue, layout: str
) -> None:
    harness.check_epilogue(replace(case, channels_last=layout == "channels last"))
    if layout == "linear":
        harness.check_epilogue(replace(case, dtype=torch.float32))


def test_maps_of_the_epilogue_are_linear_or_have_channels_last(harness: Harness) -> None:
    harness.check_epilogue_formats()


def test_an_epilogue_that_no_kernel_has_is_refused(harness: Harness) -> None:
    assert harness.refused("FusedEpilogue", "filter=1 pad=3")
    assert harness.last_line == "mat::FusedEpilogue: attribute 'pad' is from 0 to 2, of a filter"


@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE.keys())
def test_the_operators_on_maps_live_through_build_and_run(harness: Harness, case: Case) -> None:
    harness.check_maps(replace(case, dtype=torch.float16))


def test_maps_for_tokens_have_channels_last(harness: Harness) -> None:
    harness.check_map_formats()


def test_a_norm_without_a_floor_is_refused(harness: Harness) -> None:
    assert harness.refused("TokenNorm", "floor=0.0")
    assert harness.last_line == "mat::TokenNorm: attribute 'floor' is above 0"
