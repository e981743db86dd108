"""The contract of the graph as data: shapes for every option, and text that comes back the same."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mat_export.contract import (
    METADATA_KEY,
    GraphSpec,
    TensorSpec,
    UserError,
    axes_of_size,
    mask_state_names,
)
from mat_export.pixels import KEEP_THRESHOLD, from_unit, to_unit
from mat_torch.config import PRESETS, preset

TINY = preset("mat-tiny-256")
FULL = preset("mat-512")


def shapes(tensors: tuple[TensorSpec, ...]) -> dict[str, tuple[int | str, ...]]:
    return {tensor.name: tensor.shape for tensor in tensors}


def types(tensors: tuple[TensorSpec, ...]) -> dict[str, str]:
    return {tensor.name: tensor.dtype for tensor in tensors}


# -- shapes ----------------------------------------------------------------------------------------


def test_the_default_graph_takes_one_native_float_image() -> None:
    spec = GraphSpec(FULL)
    assert shapes(spec.inputs) == {
        "image": (1, 3, 512, 512),
        "mask": (1, 1, 512, 512),
        "z": (1, 512),
        "truncation": (1,),
        "gate_tokens": (1, 256, 180),
        "gate_bottleneck": (1, 512, 16, 16),
    }
    assert set(types(spec.inputs).values()) == {"float32"}
    assert shapes(spec.outputs) == {"output": (1, 3, 512, 512)}
    assert types(spec.outputs) == {"output": "float32"}


def test_a_dynamic_batch_names_the_first_axis_of_all_but_the_truncation() -> None:
    spec = GraphSpec(TINY, batch=None, coarse=True)
    first = {name: shape[0] for name, shape in shapes((*spec.inputs, *spec.outputs)).items()}
    assert first.pop("truncation") == 1
    assert set(first.values()) == {"batch"}


def test_a_batch_of_several_is_the_first_axis_of_all_but_the_truncation() -> None:
    spec = GraphSpec(TINY, batch=3, coarse=True)
    first = {name: shape[0] for name, shape in shapes((*spec.inputs, *spec.outputs)).items()}
    assert first.pop("truncation") == 1
    assert set(first.values()) == {3}


def test_bytes_are_channels_last_and_numbers_stay_float() -> None:
    spec = GraphSpec(TINY, io="uint8", coarse=True)
    assert shapes(spec.inputs)["image"] == (1, 256, 256, 3)
    assert shapes(spec.inputs)["mask"] == (1, 256, 256)
    assert shapes(spec.outputs) == {"output": (1, 256, 256, 3), "coarse": (1, 256, 256, 3)}
    assert types(spec.outputs) == {"output": "uint8", "coarse": "uint8"}
    bytes_in = [name for name, dtype in types(spec.inputs).items() if dtype == "uint8"]
    assert bytes_in == ["image", "mask"]


def test_noise_as_input_adds_one_map_at_16_and_two_at_every_larger_size() -> None:
    added = [t for t in GraphSpec(FULL, noise="input").inputs if t.name.startswith("noise")]
    assert {t.name: t.shape for t in added} == {
        "noise_16": (1, 1, 16, 16),
        **{f"noise_{r}_{i}": (1, 1, r, r) for r in (32, 64, 128, 256, 512) for i in (0, 1)},
    }
    assert [t.name for t in added[:3]] == ["noise_16", "noise_32_0", "noise_32_1"]


def test_a_dynamic_size_names_every_axis_that_follows_from_it() -> None:
    spec = GraphSpec(TINY, dynamic_size=True, noise="input")
    assert shapes(spec.inputs)["image"] == (1, 3, "height", "width")
    assert shapes(spec.inputs)["mask"] == (1, 1, "height", "width")
    assert shapes(spec.inputs)["gate_tokens"] == (1, "tokens", 90)
    assert shapes(spec.inputs)["gate_bottleneck"] == (1, 160, "grid_height", "grid_width")
    assert shapes(spec.inputs)["noise_64_1"] == (1, 1, "height_64", "width_64")
    assert shapes(spec.outputs) == {"output": (1, 3, "height", "width")}


def test_every_named_axis_but_the_batch_follows_from_the_size() -> None:
    spec = GraphSpec(TINY, dynamic_size=True, noise="input", batch=None)
    found = axes_of_size(TINY, 256, 768)
    named = {axis for t in spec.inputs for axis in t.shape if isinstance(axis, str)}
    assert set(found) == named - {"batch", "height", "width"}
    assert (found["grid_height"], found["grid_width"], found["tokens"]) == (16, 48, 768)
    assert (found["height_16"], found["width_16"]) == (16, 48)
    assert (found["height_256"], found["width_256"]) == (256, 768)
    with pytest.raises(UserError, match="256"):
        axes_of_size(TINY, 256, 300)


def test_an_octave_more_is_one_mask_more() -> None:
    more = set(mask_state_names(FULL)) - set(mask_state_names(TINY))
    assert more == {"enc_conv.2"}
    assert len(mask_state_names(FULL)) == 11


def test_the_masks_of_the_tiny_preset_are_these_in_this_order() -> None:
    assert mask_state_names(TINY) == (
        "conv_first",
        "enc_conv.0",
        "enc_conv.1",
        "tran.0.blocks.0",
        "tran.0.blocks.1",
        "tran.0.conv",
        "tran.1.downsample",
        "tran.1.blocks.0",
        "tran.1.blocks.1",
        "tran.1.blocks.2",
    )


# -- bad values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": -1}, "batch"),
        ({"batch": 1.5}, "batch"),
        ({"batch": True}, "batch"),
        ({"batch": "2"}, "batch"),
        ({"noise": "random"}, "noise"),
        ({"noise": ["const"]}, "noise"),
        ({"io": "int8"}, "io"),
        ({"dynamic_size": True}, "--noise input"),
        ({"dynamic_size": "yes", "noise": "input"}, "dynamic_size"),
        ({"coarse": 1}, "coarse"),
        ({"precision": None}, "precision"),
    ],
    ids=str,
)
def test_a_bad_value_is_a_user_error_that_names_it(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        GraphSpec(TINY, **fields)


def test_changes_are_checked_like_new_values() -> None:
    with pytest.raises(UserError, match="io"):
        GraphSpec(TINY).with_changes(io="float16")


# -- as text ---------------------------------------------------------------------------------------

_SPECS = st.builds(
    GraphSpec,
    st.sampled_from(list(PRESETS.values())),
    batch=st.none() | st.integers(1, 64),
    dynamic_size=st.booleans(),
    noise=st.just("input"),
    io=st.sampled_from(["float", "uint8"]),
    coarse=st.booleans(),
    precision=st.sampled_from(["fp32", "fp16"]),
    checkpoint=st.text(max_size=8),
    source=st.text(max_size=8),
) | st.builds(GraphSpec, st.sampled_from(list(PRESETS.values())))


@given(_SPECS)
def test_json_gives_the_same_specification_back(spec: GraphSpec) -> None:
    assert GraphSpec.from_json(spec.to_json()) == spec
    assert GraphSpec.from_metadata({"other": "x", METADATA_KEY: spec.to_json()}) == spec


def test_metadata_without_our_key_is_no_model_of_ours() -> None:
    assert GraphSpec.from_metadata({"producer": "someone"}) is None


def test_another_version_of_the_contract_is_refused_by_number() -> None:
    fields = {**json.loads(GraphSpec(TINY).to_json()), "format": 99}
    with pytest.raises(UserError, match=r"version 99.*export it again"):
        GraphSpec.from_json(json.dumps(fields))


def read(text: str) -> GraphSpec | None:
    """What is read, None for a user's error; any other exception is the test's failure."""
    try:
        return GraphSpec.from_json(text)
    except UserError:
        return None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.text(max_size=40) | _JSON.map(json.dumps))
def test_text_that_is_no_specification_is_a_user_error(text: str) -> None:
    assert read(text) is None


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"format": 1}', "1" * 5000, "NaN"])
def test_hostile_text_is_a_user_error(text: str) -> None:
    assert read(text) is None


@given(st.data())
@settings(max_examples=200)
def test_a_specification_with_one_field_replaced_is_sound_or_refused(data: st.DataObject) -> None:
    fields = json.loads(GraphSpec(TINY, noise="input").to_json())
    where = data.draw(st.sampled_from(["top", "config"]))
    part = fields if where == "top" else fields["config"]
    part[data.draw(st.sampled_from([*sorted(part), "surplus"]))] = data.draw(_JSON)
    spec = read(json.dumps(fields))
    if spec is not None:
        assert read(spec.to_json()) == spec
        sizes = [axis for t in (*spec.inputs, *spec.outputs) for axis in t.shape]
        assert all(isinstance(axis, str) or (type(axis) is int and axis >= 1) for axis in sizes)


# -- pixels ----------------------------------------------------------------------------------------


def test_every_pixel_value_comes_back_exactly() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    unit, _ = to_unit(values, np.zeros((1, 16, 16), np.uint8))
    assert unit.dtype == np.float32
    assert unit.shape == (1, 3, 16, 16)
    assert (unit.min(), unit.max()) == (-1.0, 1.0)
    np.testing.assert_array_equal(from_unit(unit), values)


def test_channels_and_rows_keep_their_places() -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), dtype=np.uint8)
    unit, _ = to_unit(image, np.zeros((2, 3, 5), np.uint8))
    assert unit.shape == (2, 3, 3, 5)
    assert unit[1, 2, 0, 4] == pytest.approx(image[1, 0, 4, 2] / 127.5 - 1.0, abs=1e-6)
    np.testing.assert_array_equal(from_unit(unit), image)


def test_values_beyond_the_range_are_clipped() -> None:
    unit = np.array([-9.0, -1.01, 1.01, 9.0], np.float32).reshape(1, 1, 2, 2).repeat(3, axis=1)
    np.testing.assert_array_equal(from_unit(unit)[0, :, :, 0], [[0, 0], [255, 255]])


def test_a_mask_is_kept_from_the_threshold_up() -> None:
    mask = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    _, keep = to_unit(np.zeros((1, 16, 16, 3), np.uint8), mask)
    assert keep.dtype == np.float32
    np.testing.assert_array_equal(keep.ravel(), np.arange(256) >= KEEP_THRESHOLD)
