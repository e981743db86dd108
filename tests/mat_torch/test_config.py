"""Configurations: the presets are the published sizes, and nothing else than a network is taken."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mat_torch.config import CHOICES, PRESETS, ConfigError, GeneratorConfig, preset
from mat_torch.generator import Generator

_FUZZ = settings(deadline=None, database=None)

# -- presets ---------------------------------------------------------------------------------------


def _parameters(config: GeneratorConfig) -> int:
    with torch.device("meta"):  # no data
        return sum(parameter.numel() for parameter in Generator(config).parameters())


@pytest.mark.parametrize(("name", "resolution"), [("mat-512", 512), ("mat-256", 256)])
def test_the_published_presets_have_the_published_sizes(name: str, resolution: int) -> None:
    config = preset(name)
    assert dataclasses.asdict(config) == {
        "name": name,
        "resolution": resolution,
        "latent_dim": 512,
        "token_dim": 180,
        "heads": 6,
        "depths": (2, 3, 4, 3, 2),
        "windows": (8, 16, 16, 16, 8),
        "base_channels": 32768,
        "max_channels": 512,
        "mapping_layers": 8,
        "attention": "masked",
        "block": "mat",
        "body": "transformer",
        "style": "full",
        "tokens": "convolution",
    }


@pytest.mark.parametrize(("name", "millions"), [("mat-512", 61.6), ("mat-256", 59.8)])
def test_the_published_presets_have_the_published_number_of_parameters(
    name: str, millions: float
) -> None:
    assert round(_parameters(preset(name)) / 1e6, 1) == millions


def test_the_tiny_preset_is_tiny_and_of_the_same_topology() -> None:
    tiny, published = preset("mat-tiny-256"), preset("mat-256")
    assert _parameters(tiny) <= 8_000_000
    for name in ("resolution", "depths", "windows", "stage_grids", "noise_resolutions"):
        assert getattr(tiny, name) == getattr(published, name), name
    # So that the same attention kernels serve it.
    assert tiny.token_dim // tiny.heads == published.token_dim // published.heads


def test_an_unknown_preset_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'mat-1024'; known: mat-512, mat-256, mat-tiny-256"):
        preset("mat-1024")


# -- what follows from the sizes -------------------------------------------------------------------


def test_dimensions_at_512_are_those_of_the_paper() -> None:
    config = preset("mat-512")
    assert config.num_ws == 12
    assert config.stage_grids == (64, 32, 16, 32, 64)
    assert config.encoder_resolutions == (512, 256, 128, 64, 32, 16)
    assert [config.channels(r) for r in config.encoder_resolutions] == [64, 128, 256, 512, 512, 512]
    assert config.style_dim_tokens == 540
    assert config.style_dim_pixels == 1536


def test_256_has_one_octave_less() -> None:
    config = preset("mat-256")
    assert config.num_ws == 10
    assert config.encoder_resolutions == (256, 128, 64, 32, 16)
    assert config.channels(256) == 128


def test_noise_maps_are_one_at_16_and_two_from_32_up() -> None:
    assert list(preset("mat-256").noise_resolutions.items()) == [
        ("noise_16", 16),
        ("noise_32_0", 32),
        ("noise_32_1", 32),
        ("noise_64_0", 64),
        ("noise_64_1", 64),
        ("noise_128_0", 128),
        ("noise_128_1", 128),
        ("noise_256_0", 256),
        ("noise_256_1", 256),
    ]
    assert len(preset("mat-512").noise_resolutions) == 11


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("mat-512", (512, 512), (16, 16)),
        ("mat-512", (512, 1536), (16, 48)),
        ("mat-256", (256, 256), (16, 16)),
        ("mat-256", (768, 512), (48, 32)),
    ],
)
def test_the_bottleneck_is_16_tokens_a_native_side(
    name: str, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    assert preset(name).bottleneck_grid(*size) == grid


@pytest.mark.parametrize(("height", "width"), [(256, 256), (256, 512), (1024, 256)])
def test_multiples_of_the_native_size_are_taken(height: int, width: int) -> None:
    preset("mat-256").check_size(height, width)


@pytest.mark.parametrize(
    ("height", "width"), [(0, 256), (256, 0), (-256, 256), (255, 256), (256, 384), (128, 128)]
)
def test_other_sizes_are_errors_that_say_what_is_taken(height: int, width: int) -> None:
    with pytest.raises(ConfigError, match=f"mat-256 .* multiples of 256, got {height}x{width}"):
        preset("mat-256").check_size(height, width)


# -- validation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"resolution": 64}, "resolution 64 is not a power of two from 128 up"),
        ({"resolution": 384}, "resolution 384 is not a power of two"),
        ({"resolution": 256.0}, "whole number"),
        ({"resolution": True}, "whole number"),
        ({"token_dim": 181}, "token_dim 181 does not divide by 6 heads"),
        ({"heads": 0}, "whole number"),
        ({"heads": -6}, "whole number"),
        ({"latent_dim": 0}, "whole number"),
        ({"base_channels": "32768"}, "whole number"),
        ({"max_channels": None}, "whole number"),
        ({"mapping_layers": 0}, "whole number"),
        ({"depths": (2, 3, 4, 3)}, "five entries"),
        ({"windows": (8, 16, 16, 16, 8, 8)}, "five entries"),
        ({"depths": (2, 3, 0, 3, 2)}, "whole number"),
        ({"depths": [2, 3, 4, 3, 2]}, "whole number"),  # a list: not hashable
        ({"windows": (8, 16, 16.0, 16, 8)}, "whole number"),
        ({"windows": (8, 16, 32, 16, 8)}, "window 32 does not tile a grid of 16 tokens"),
        ({"windows": (12, 16, 16, 16, 8)}, "window 12 does not tile a grid of 64 tokens"),
        ({"windows": (1, 16, 16, 16, 8)}, "window 1 does not tile"),
    ],
)
def test_sizes_that_contradict_each_other_are_errors(
    changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        dataclasses.replace(preset("mat-512"), **changes)


def test_a_configuration_cannot_be_changed_and_can_be_a_key() -> None:
    config = preset("mat-512")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.heads = 3  # type: ignore[misc]
    assert {config: 1}[dataclasses.replace(config)] == 1


# -- as text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_round_trip_through_json(name: str) -> None:
    config = preset(name)
    text = config.to_json()
    assert "\n" not in text
    assert GeneratorConfig.from_json(text) == config


_SIZES = st.integers(1, 4096)


@st.composite
def _configurations(draw: st.DrawFn) -> GeneratorConfig:
    heads = draw(st.integers(1, 16))
    return GeneratorConfig(
        name=draw(st.text()),
        resolution=2 ** draw(st.integers(7, 12)),
        latent_dim=draw(_SIZES),
        token_dim=heads * draw(st.integers(1, 64)),
        heads=heads,
        depths=draw(st.tuples(*[st.integers(1, 9)] * 5)),
        windows=draw(st.tuples(*[st.sampled_from((2, 4, 8, 16))] * 5)),
        base_channels=draw(_SIZES),
        max_channels=draw(_SIZES),
        mapping_layers=draw(st.integers(1, 9)),
    )


@_FUZZ
@given(_configurations())
def test_any_configuration_survives_the_round_trip_through_json(config: GeneratorConfig) -> None:
    assert GeneratorConfig.from_json(config.to_json()) == config


_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=10,
)
# A name says nothing about the network; who reads one from a file checks that it is text.
_SIZE_FIELDS = [
    f.name for f in dataclasses.fields(GeneratorConfig) if f.name not in ("name", *CHOICES)
]


@_FUZZ
@given(st.text() | _JSON.map(json.dumps))
def test_any_text_or_json_is_refused_and_nothing_else_happens(text: str) -> None:
    with pytest.raises(ConfigError):
        GeneratorConfig.from_json(text)


@_FUZZ
@given(st.dictionaries(st.sampled_from(_SIZE_FIELDS), _JSON, min_size=1))
def test_any_value_of_a_size_is_taken_as_it_is_or_refused(changes: dict[str, Any]) -> None:
    text = json.dumps(json.loads(preset("mat-256").to_json()) | changes)
    try:
        config = GeneratorConfig.from_json(text)
    except ConfigError:
        return
    assert json.loads(config.to_json()) == json.loads(text)


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"resolution": 1e999},
        {"resolution": math.nan},
        {"depths": "abcde"},
        {"windows": {"8": 1}},
        {"depths": 5},
    ],
)
def test_a_json_object_with_other_entries_is_refused(change: dict[str, Any]) -> None:
    entries = json.loads(preset("mat-256").to_json())
    with pytest.raises(ConfigError):
        GeneratorConfig.from_json(json.dumps(entries | change))


@pytest.mark.parametrize("missing", ["name", "resolution", "depths", "windows"])
def test_a_json_object_without_a_needed_entry_is_refused(missing: str) -> None:
    entries = json.loads(preset("mat-256").to_json())
    del entries[missing]
    with pytest.raises(ConfigError, match=missing):
        GeneratorConfig.from_json(json.dumps(entries))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "1", '"a"', "[" * 100_000, "9" * 10_000])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a generator configuration"):
        GeneratorConfig.from_json(text)
