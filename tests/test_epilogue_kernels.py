"""The fused epilogue's kernels on a CPU that plays a GPU: one rounding away from FP64.

As ``test_kernels.py``; on a GPU ``gpu/check_kernels.py`` holds the same cases, and larger ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from epilogue_cases import FORMS, HARD, Epilogue, any_epilogue, draw, holds, in_double
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import call_epilogue

from engines.plugins.kernels import KernelLibrary
from mat_export.contract import UserError


def check(library: KernelLibrary, case: Epilogue) -> None:
    x, parts = draw(case)
    holds(case, call_epilogue(library, case, x, parts).y(), in_double(case, x, parts))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("case", HARD.values(), ids=HARD.keys())
def test_hard_cases_are_one_rounding_away(
    paper_kernels: KernelLibrary, case: Epilogue, form: dict[str, Any]
) -> None:
    check(paper_kernels, replace(case, **form))


@settings(max_examples=50, deadline=None)
@given(case=st.composite(lambda draw: any_epilogue(lambda of: draw(st.sampled_from(of))))())
def test_any_case_is_one_rounding_away(paper_kernels: KernelLibrary, case: Epilogue) -> None:
    check(paper_kernels, case)


def test_sums_beyond_the_range_of_half_are_fine(paper_kernels: KernelLibrary) -> None:
    case = Epilogue((1, 8, 8, 8), 1, 64.0, 0.2, ("scale", "style"), channels_last=True)
    x, parts = draw(case)
    x, parts["scale"] = x * 100.0, parts["scale"] * 100.0
    parts["style"] = parts["style"] * 1e-3
    holds(case, call_epilogue(paper_kernels, case, x, parts).y(), in_double(case, x, parts))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": (0, 8, 8, 8)}, "batch and channels"),
        ({"shape": (1, 40000, 8, 8)}, "batch and channels"),
        ({"shape": (1, 8, 0, 8)}, "sides are from 1"),
        ({"shape": (1, 8, 8, 2), "pad": 0}, "the filter leaves some"),
        ({"pad": 3}, "padding is from 0 to 2"),
        ({"dtype": "int8"}, "float32, float16, bfloat16"),
        ({"dtype": "float32", "channels_last": True}, "of FP16 or BF16"),
        ({"channels_last": True, "x": 8}, "multiples of 16 bytes"),
    ],
)
def test_what_the_kernels_do_not_have_is_refused_in_a_sentence(
    paper_kernels: KernelLibrary, changes: dict[str, Any], words: str
) -> None:
    call: dict[str, Any] = {"x": 0, "y": 0, "parts": {}, "shape": (1, 8, 8, 8), "dtype": "float16"}
    with pytest.raises(UserError, match=words):
        paper_kernels.epilogue(**{**call, **changes})
