"""Options of a build, and the shapes that follow from them."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from engines.options import (
    BuildOptions,
    parse_batch,
    parse_size,
    parse_target,
    range_text,
)
from engines.profiles import profiles_of, ranges_of
from mat_export.contract import GraphSpec, UserError
from mat_torch import preset

TINY = preset("mat-tiny-256")
SIZES = ((256, 256), (256, 512), (512, 1024))
EVERYTHING = BuildOptions(
    backend="tensorrt",
    batch=(1, 2, 4),
    size=SIZES,
    level=3,
    workspace_mib=512,
    tf32=True,
    version_compatible=True,
    hardware_compatible=True,
    refittable=True,
    tactic_sources=("JIT_CONVOLUTIONS", "EDGE_MASK_CONVOLUTIONS"),
    timing_iterations=2,
    plugins="on",
)


# -- texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "batch"), [("4", (4, 4, 4)), ("1:4:8", (1, 4, 8)), (" 2:2:2 ", (2, 2, 2))]
)
def test_a_batch_is_a_number_or_a_range(text: str, batch: tuple[int, int, int]) -> None:
    assert parse_batch(text) == batch
    assert parse_batch(str(range_text(batch))) == batch


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1:2", "1:2:3:4", "4:2:8", "1:4:2", "a", "1.5", "²", "9" * 4000, "1::2"]
)
def test_other_batches_are_refused_with_what_was_got(text: str) -> None:
    with pytest.raises(UserError, match="batch") as caught:
        parse_batch(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("512", ((512, 512),) * 3),
        ("512x1024", ((512, 1024),) * 3),
        ("256:256×512:512x1024", SIZES),
    ],
)
def test_a_size_is_one_size_or_a_range(text: str, sizes: Any) -> None:
    assert parse_size(text) == sizes
    assert parse_size(str(range_text(sizes))) == sizes


@pytest.mark.parametrize(
    "text", ["", "x", "512x", "512:256:512", "512x512:512x256:512x512", "0", "1:2"]
)
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["sm_89", "SM89", "8.9", "89", " sm_89 "])
def test_a_target_has_one_spelling_in_the_end(text: str) -> None:
    assert parse_target(text) == "sm_89"
    assert BuildOptions(target=text).target == "sm_89"


def test_a_target_may_have_three_digits() -> None:
    assert parse_target("12.0") == parse_target("sm120") == "sm_120"


@pytest.mark.parametrize("text", ["", "ada", "sm_", "sm_8", "8.9.1", "sm_89a", 89])
def test_other_targets_are_refused(text: Any) -> None:
    with pytest.raises(UserError, match="target"):
        parse_target(text)


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backend", "trt"),
        ("level", 6),
        ("level", -1),
        ("level", True),
        ("workspace_mib", 0),
        ("workspace_mib", 1.5),
        ("timing_iterations", 0),
        ("tf32", 1),
        ("refittable", None),
        ("batch", (1, 2)),
        ("batch", (2, 1, 3)),
        ("batch", (1, 1, 1 << 40)),
        ("batch", "1:2:3"),
        ("size", (256, 256, 256)),
        ("size", ((256, 512), (512, 256), (512, 512))),
        ("tactic_sources", ()),
        ("tactic_sources", (1,)),
        ("tactic_sources", "CUDNN"),
        ("target", "here"),
        ("plugins", "yes"),
        ("plugins", True),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(UserError):
        BuildOptions(**{field: value})


def test_a_target_and_hardware_compatibility_exclude_each_other() -> None:
    with pytest.raises(UserError, match="leave out one"):
        BuildOptions(target="sm_89", hardware_compatible=True)


@pytest.mark.parametrize("options", [BuildOptions(), EVERYTHING, BuildOptions(target="sm_120")])
def test_options_come_back_from_json(options: BuildOptions) -> None:
    assert BuildOptions.from_json(options.to_json()) == options
    assert BuildOptions.from_dict(json.loads(options.to_json())) == options


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"levels": 3}', '{"level": "3"}', "[" * 100_000]
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        BuildOptions.from_json(text)


def test_the_order_of_tactic_sources_does_not_matter() -> None:
    one = BuildOptions(tactic_sources=("a", "B"))
    assert one == BuildOptions(tactic_sources=("b", "A", "a"))
    assert one.tactic_sources == ("A", "B")


def test_every_option_has_its_argument() -> None:
    arguments = EVERYTHING.to_arguments()
    assert arguments[arguments.index("--size") + 1] == "256x256:256x512:512x1024"
    assert not BuildOptions().to_arguments()
    named = 0
    for field in fields(BuildOptions):
        changed = EVERYTHING if field.name != "target" else BuildOptions(target="sm_89")
        values: dict[str, Any] = {field.name: field.default}
        default = replace(changed, **values)
        named += len(changed.to_arguments()) > len(default.to_arguments())
    assert named == len(fields(BuildOptions))


# -- profiles --------------------------------------------------------------------------------------


def test_a_static_graph_has_no_profile() -> None:
    assert profiles_of(GraphSpec(TINY), BuildOptions()) == {}
    same = BuildOptions(batch=(1, 1, 1), size=((256, 256),) * 3)
    assert profiles_of(GraphSpec(TINY), same) == {}


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (BuildOptions(batch=(1, 2, 4)), "--batch dynamic"),
        (BuildOptions(size=((256, 256), (256, 256), (512, 512))), "--size dynamic --noise input"),
    ],
)
def test_a_range_of_a_fixed_axis_says_how_to_free_it(options: BuildOptions, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        profiles_of(GraphSpec(TINY), options)


def test_a_dynamic_batch_runs_from_1_to_8_by_default() -> None:
    spec = GraphSpec(TINY, batch=None)
    profiles = profiles_of(spec, BuildOptions())
    assert profiles["image"] == ((1, 3, 256, 256), (1, 3, 256, 256), (8, 3, 256, 256))
    assert profiles["z"] == ((1, 128), (1, 128), (8, 128))
    assert "truncation" not in profiles
    assert set(profiles) == {t.name for t in spec.inputs} - {"truncation"}


def test_every_axis_follows_from_batch_and_size() -> None:
    spec = GraphSpec(TINY, batch=None, dynamic_size=True, noise="input")
    profiles = profiles_of(spec, BuildOptions(batch=(1, 2, 4), size=SIZES))
    assert profiles["mask"] == ((1, 1, 256, 256), (2, 1, 256, 512), (4, 1, 512, 1024))
    assert profiles["gate_tokens"] == ((1, 256, 90), (2, 512, 90), (4, 2048, 90))
    assert profiles["gate_bottleneck"] == ((1, 160, 16, 16), (2, 160, 16, 32), (4, 160, 32, 64))
    assert profiles["noise_16"] == ((1, 1, 16, 16), (2, 1, 16, 32), (4, 1, 32, 64))
    assert profiles["noise_256_1"] == ((1, 1, 256, 256), (2, 1, 256, 512), (4, 1, 512, 1024))


def test_a_dynamic_size_runs_to_twice_the_native_one_by_default() -> None:
    spec = GraphSpec(TINY, dynamic_size=True, noise="input")
    low, best, high = profiles_of(spec, BuildOptions())["image"]
    assert low == best == (1, 3, 256, 256)
    assert high == (1, 3, 512, 512)


def test_images_of_8_bits_have_their_own_shapes() -> None:
    profiles = profiles_of(GraphSpec(TINY, batch=None, io="uint8"), BuildOptions(batch=(1, 1, 2)))
    assert profiles["mask"][2] == (2, 256, 256)
    assert profiles["image"][2] == (2, 256, 256, 3)


def test_a_size_that_the_network_does_not_take_is_refused() -> None:
    spec = GraphSpec(TINY, dynamic_size=True, noise="input")
    with pytest.raises(UserError, match="multiples of 256"):
        profiles_of(spec, BuildOptions(size=((256, 256), (300, 300), (512, 512))))


def test_ranges_are_those_asked_for_or_what_the_graph_fixes() -> None:
    native = ((256, 256),) * 3
    assert ranges_of(GraphSpec(TINY, batch=4), BuildOptions()) == ((4, 4, 4), native)
    free = GraphSpec(TINY, batch=None, dynamic_size=True, noise="input")
    assert ranges_of(free, BuildOptions(batch=(1, 2, 4), size=SIZES)) == ((1, 2, 4), SIZES)
