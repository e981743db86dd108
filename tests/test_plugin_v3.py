"""The plugins of TensorRT 10 and later, driven through their life as TensorRT does, on the CPU."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import BARS, DENSE, Case
from epilogue_cases import FORMS, LIFE, Epilogue
from kernel_harness import PAPER
from plugin_harness import HERE, LINEAR, TYPES, Harness, epilogue_attributes

from engines.plugins.kernels import EPILOGUE_PARTS
from engines.plugins.toolchain import find_headers
from mat_export.contract import UserError

FLOATS = {TYPES[dtype] for dtype in (torch.float32, torch.float16, torch.bfloat16)}
INT32 = TYPES[torch.int32]
INPUTS = {"MaskedWindowAttention": 4, "WindowAttention": 3, "MaskPropagation": 1}
MORE = ("FusedEpilogue", "MaskedMapAttention", "MapAttention", "TokenNorm")
CUT = "window=8 shift=4 heads=2"
REST = [0] * 11
"""What an engine holds of an attention behind its heads."""

GOOD = {
    "MaskedWindowAttention": [[1, 16, 8, 12]] * 3 + [[1, 1, 16, 8]],
    "WindowAttention": [[1, 16, 8, 12]] * 3,
    "MaskPropagation": [[1, 1, 16, 8]],
}


@pytest.fixture(scope="module")
def headers() -> Path:
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to run the plugins on the CPU")
    try:
        return find_headers(major=10).folder
    except UserError as error:
        pytest.skip(f"needs TensorRT 10's headers: {error}")


@pytest.fixture(scope="module")
def harness(headers: Path, tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness("v3", headers, tmp_path_factory.mktemp("plugin"))


@pytest.mark.parametrize("dtype", BARS, ids=str)
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


@pytest.mark.parametrize("name", INPUTS)
def test_tensors_are_packed_and_of_one_type_and_masks_are_integers(
    harness: Harness, name: str
) -> None:
    inputs, types, formats = INPUTS[name], 12, 13
    masks = range(2) if name == "MaskPropagation" else ([3] if inputs == 4 else [])
    for position in range(inputs + 1):
        seen = (ctypes.c_uint8 * (types * types * formats))()
        call = (name.encode(), CUT.encode(), inputs, position, LINEAR, types, formats, seen)
        harness.library.formats(*call)
        combinations = itertools.product(range(types), range(types), range(formats))
        for (first, own, layout), fits in zip(combinations, seen, strict=True):
            if position == 0:
                first = own  # the first tensor is itself
            floats = own in FLOATS and own == first
            expected = layout == 0 and (own == INT32 if position in masks else floats)
            assert bool(fits) == expected, (position, first, own, layout)


@pytest.mark.parametrize(
    ("window", "shift", "heads", "words"),
    [
        (7, 0, 6, "attribute 'window' is 8 or 16"),
        (8, 8, 6, "attribute 'shift' is from 0 to below the window"),
        (8, -1, 6, "attribute 'shift' is from 0 to below the window"),
        (8, 0, 0, "attribute 'heads' is from 1 up"),
        (8, 0, -1, "attribute 'heads' is from 1 up"),
    ],
)
def test_attributes_that_no_kernel_has_are_refused_in_a_sentence(
    harness: Harness, window: int, shift: int, heads: int, words: str
) -> None:
    given = f"window={window} shift={shift} heads={heads}"
    assert harness.refused("WindowAttention", given)
    assert harness.last_line == f"mat::WindowAttention: {words}"
    assert not harness.refused("WindowAttention", "window=8 shift=4 heads=1")
    assert not harness.refused("MaskPropagation", "window=8 shift=4")


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([1, 1, 8, 4, 6], "another version of this library"),
        ([3, 1, 8, 4, 6, *REST, 0], "another version of this library"),
        ([2, 1, 8, 4, 6, *REST], "of another version"),
        ([3, 2, 8, 4, 6, *REST], "another operator"),
        ([3, 1, 8, 9, 6, *REST], "attribute 'shift'"),
    ],
)
def test_what_another_library_serialized_is_refused_in_a_sentence(
    harness: Harness, numbers: list[int], words: str
) -> None:
    assert not unread(harness, [3, 1, 8, 4, 6, *REST])
    assert unread(harness, numbers)
    assert words in harness.last_line


def unread(harness: Harness, numbers: Sequence[int]) -> bool:
    array = (ctypes.c_int32 * len(numbers))(*numbers)
    return bool(harness.library.unread(b"WindowAttention", array, len(numbers)))


def qkv(*shape: int) -> dict[int, list[int]]:
    return {i: list(shape) for i in range(3)}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("MaskedWindowAttention", {3: [1, 1, 8, 16]}, "the mask is not"),
        ("MaskedWindowAttention", {3: [2, 1, 16, 8]}, "the mask is not"),
        ("WindowAttention", {1: [1, 16, 8, 16]}, "differ in shape"),
        ("WindowAttention", {0: [0, 16, 8, 12]}, "empty"),
        ("WindowAttention", qkv(1, 16, 12, 12), "does not tile"),
        ("WindowAttention", qkv(1, 16, 8, 13), "multiple of the heads"),
        ("WindowAttention", qkv(1, 16, 8, 68), "head size"),
        ("WindowAttention", qkv(1, 1 << 16, 8, 12), "above 32768"),
        ("MaskPropagation", {0: [1, 2, 16, 8]}, "[B, 1, H, W]"),
        ("MaskPropagation", {0: [1, 1, 4, 8]}, "does not tile"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_while_building_and_while_running(
    harness: Harness, name: str, changes: dict[int, list[int]], words: str
) -> None:
    good = GOOD[name]
    assert misfits(harness, name, good) == 0
    assert misfits(harness, name, [changes.get(i, shape) for i, shape in enumerate(good)]) == 3
    assert harness.last_line.startswith(f"mat::{name}: ")
    assert words in harness.last_line


def misfits(
    harness: Harness, name: str, shapes: list[list[int]], attributes: str | None = None
) -> int:
    inputs, attributes = len(shapes), attributes or CUT
    shapes = [*shapes, shapes[0]]  # the result's, which they are not asked for
    array = (ctypes.c_int32 * (4 * len(shapes)))(*(d for shape in shapes for d in shape))
    return int(harness.library.misfits(name.encode(), attributes.encode(), inputs, array))


def test_timings_are_kept_apart_by_operator_and_attributes(harness: Harness) -> None:
    harness.library.timing_id.restype = ctypes.c_char_p
    cuts = [
        f"window={window} shift={shift} heads={heads}"
        for window, shift, heads in itertools.product((8, 16), (0, 4), (2, 6))
    ]
    ids = {
        harness.library.timing_id(name.encode(), cut.encode())
        for name, cut in itertools.product(INPUTS, cuts)
    }
    assert len(ids) == 3 * 8
    cases = [Epilogue(), Epilogue(pad=0), Epilogue(pad=1), Epilogue(slope=0.2), Epilogue(gain=4.0)]
    cases += [Epilogue(parts=(part,)) for part in EPILOGUE_PARTS]
    ids = {
        harness.library.timing_id(b"FusedEpilogue", epilogue_attributes(case).encode())
        for case in cases
    }
    assert len(ids) == len(cases)


# -- the epilogue ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("case", LIFE.values(), ids=LIFE.keys())
def test_the_epilogue_lives_through_build_and_run(
    harness: Harness, case: Epilogue, form: dict[str, Any]
) -> None:
    harness.check_epilogue(replace(case, **form))


def test_maps_of_the_epilogue_are_linear_or_have_channels_last(harness: Harness) -> None:
    harness.check_epilogue_formats()


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ("filter=2", "attribute 'filter' is 0 or 1"),
        ("filter=1 pad=3", "attribute 'pad' is from 0 to 2, of a filter"),
        ("filter=0 pad=1", "attribute 'pad' is from 0 to 2, of a filter"),
        ("skip=2", "attributes that name a part are 0 or 1"),
        ("gain=1", "its attributes are one INT32 each, 'gain', 'slope' and 'floor' one FLOAT32"),
        ("skip=1.0", "its attributes are one INT32 each, 'gain', 'slope' and 'floor' one FLOAT32"),
    ],
)
def test_epilogues_that_no_kernel_has_are_refused_in_a_sentence(
    harness: Harness, attributes: str, words: str
) -> None:
    assert harness.refused("FusedEpilogue", attributes)
    assert harness.last_line == f"mat::FusedEpilogue: {words}"
    assert not harness.refused("FusedEpilogue", "filter=1 pad=2 gain=4.0 skip=1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: [2, 16, 2, 9]}, "the filter leaves some of them"),
        ({1: [2, 1, 1, 1]}, "scale, bias or style is not"),
        ({2: [2, 1, 8, 9]}, "noise or ratio is not"),
        ({3: [3, 16, 6, 7]}, "skip is not"),
        ({4: [2, 16, 1, 7]}, "scale, bias or style is not"),
    ],
)
def test_shapes_of_an_epilogue_that_do_not_fit_are_refused(
    harness: Harness, changes: dict[int, list[int]], words: str
) -> None:
    attributes = "filter=1 pad=0 scale=1 noise=1 skip=1 style=1"
    good = [[2, 16, 8, 9], [2, 16, 1, 1], [1, 1, 6, 7], [2, 16, 6, 7], [1, 16, 1, 1]]
    assert misfits(harness, "FusedEpilogue", good, attributes) == 0
    shapes = [changes.get(i, shape) for i, shape in enumerate(good)]
    assert misfits(harness, "FusedEpilogue", shapes, attributes) == 3
    assert words in harness.last_line


# -- the registry ----------------------------------------------------------------------------------

_REGISTRY = """
import ctypes, json, sys
tensorrt = ctypes.CDLL(sys.argv[1], mode=int(sys.argv[3]))
tensorrt.registered.restype = tensorrt.last_line.restype = ctypes.c_char_p
library = ctypes.CDLL(sys.argv[2])
seen = [tensorrt.registered().decode()]
count = ctypes.c_int32()
library.getCreators(ctypes.byref(count))
seen.append(tensorrt.registered().decode())
library.setLoggerFinder(None)
assert library.refused(b"WindowAttention", b"window=7 shift=0 heads=1")
print(json.dumps([*seen, count.value, tensorrt.last_line().decode()]))
"""


@pytest.fixture(scope="module")
def tensorrt(headers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for TensorRT 10's library that has a registry and nothing else."""
    target = tmp_path_factory.mktemp("tensorrt") / "libnvinfer.so.10"
    command = [
        *("g++", "-std=c++17", "-shared", "-fPIC", "-Wno-deprecated-declarations"),
        *("-isystem", str(headers), "-I", str(PAPER), str(HERE / "plugin_registry.cpp")),
        *("-Wl,-soname,libnvinfer.so.10", "-o", str(target)),
    ]
    subprocess.run(command, check=True)
    return target


@pytest.mark.parametrize("scope", ["RTLD_LOCAL", "RTLD_GLOBAL"])
@pytest.mark.parametrize(("version", "known"), [(101401, True), (110100, False), (8601, False)])
def test_opening_the_library_finds_the_tensorrt_of_its_headers_alone(
    harness: Harness, tensorrt: Path, version: int, known: bool, scope: str
) -> None:
    """Its registry and its logger, also where a program has opened it for itself alone, as Python,
    Triton and GStreamer do.
    """
    mode = str(getattr(ctypes, scope))
    # In a process of its own: the stand-in's registry is seen by whatever is opened after it.
    done = subprocess.run(
        [sys.executable, "-c", _REGISTRY, str(tensorrt), str(harness.path), mode],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "VERSION": str(version)},
    )
    heard = "mat::WindowAttention: attribute 'window' is 8 or 16"
    assert json.loads(done.stdout) == (
        [" ".join([*INPUTS, *MORE]), "", 7, heard] if known else ["", "", 7, ""]
    )


@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE.keys())
def test_the_operators_on_maps_live_through_build_and_run(harness: Harness, case: Case) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        harness.check_maps(replace(case, dtype=dtype))


def test_maps_for_tokens_have_channels_last(harness: Harness) -> None:
    harness.check_map_formats()


def test_a_norm_without_a_floor_is_refused(harness: Harness) -> None:
    assert harness.refused("TokenNorm", "floor=0.0")
    assert harness.last_line == "mat::TokenNorm: attribute 'floor' is above 0"
