"""A seed names a picture for good: the bits are fixed, fair, and independent of everything else."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mat_torch import sampling
from mat_torch.config import ConfigError, preset
from mat_torch.sampling import draw, gate, normal, words

# SciPy brings no types of its own.
_SPECIAL: Any = import_module("scipy.special")
_STATS: Any = import_module("scipy.stats")
_TINY = preset("mat-tiny-256")
_FUZZ = settings(deadline=None, database=None)
_SEEDS = st.integers(0, 2**64 - 1)


def _digest(array: NDArray[Any]) -> str:
    little = array.astype(array.dtype.newbyteorder("<"))
    return hashlib.sha256(np.ascontiguousarray(little).tobytes()).hexdigest()[:16]


# -- the algorithm ---------------------------------------------------------------------------------


def _philox(seed: int, name: str, blocks: int) -> list[int]:
    """Philox4x64-10 by its paper (Salmon et al. 2011), blocks at the counters 1, 2, …"""
    low = 2**64 - 1
    output = []
    for block in range(1, blocks + 1):
        counter, key = [block, 0, 0, 0], [seed, zlib.crc32(name.encode())]
        for _ in range(10):
            product0, product1 = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
            counter = [
                (product1 >> 64) ^ counter[1] ^ key[0],
                product1 & low,
                (product0 >> 64) ^ counter[3] ^ key[1],
                product0 & low,
            ]
            key = [(key[0] + 0x9E3779B97F4A7C15) & low, (key[1] + 0xBB67AE8584CAA73B) & low]
        output += counter
    return output


@_FUZZ
@given(seed=_SEEDS, name=st.text(), blocks=st.integers(1, 5))
def test_words_are_those_of_philox_at_the_counters_from_1(
    seed: int, name: str, blocks: int
) -> None:
    assert words(seed, name, 4 * blocks).tolist() == _philox(seed, name, blocks)


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_gates_are_the_bits_of_the_words_from_the_least_significant(seed: int) -> None:
    bits = [word >> i & 1 for word in _philox(seed, "g", 1) for i in range(64)]
    assert gate(seed, "g", (3, 50)).reshape(-1).tolist() == bits[:150]


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_normals_are_the_quantiles_of_the_words_upper_52_bits(seed: int) -> None:
    u = [((word >> 12) + 0.5) / 2**52 for word in _philox(seed, "n", 25)]
    expected = _SPECIAL.ndtri(u).astype(np.float32).reshape(4, 25)
    # Both are within 1e-15 before rounding, so at most a tie is rounded the other way.
    np.testing.assert_allclose(normal(seed, "n", (4, 25)), expected, rtol=2e-7, atol=0.0)


def test_known_draws_keep_their_bits() -> None:
    """If this fails, every seed has come to name another picture."""
    digests = {k: _digest(v) for k, v in draw(_TINY, [0, 2**64 - 1], noise=True).items()}
    assert digests == {
        "z": "a2bb62abcc1cc1e2",
        "gate_tokens": "2b836eb6d1b9de29",
        "gate_bottleneck": "8759cb96927530d1",
        "noise_16": "860ca29512fa7a21",
        "noise_32_0": "1de141e1f8da434c",
        "noise_32_1": "a55e95b7d340fcf6",
        "noise_64_0": "ae6b7f8e2583bdd6",
        "noise_64_1": "8d6f52b307bbd52a",
        "noise_128_0": "cc854344085226b3",
        "noise_128_1": "2f6bb3dd888045b9",
        "noise_256_0": "95900434d65895b6",
        "noise_256_1": "d1eb131bc04945ec",
    }


def test_known_draws_keep_their_bits_at_the_published_size() -> None:
    digests = {k: _digest(v) for k, v in draw(preset("mat-512"), [42], 512, 1024).items()}
    assert digests == {
        "z": "4099f13f93a5a5d6",
        "gate_tokens": "4bc44b7dfc1bd67e",
        "gate_bottleneck": "37a070dc7b8a4ba4",
    }


def test_known_values() -> None:
    assert words(0, "z", 3).tolist() == [
        1925791926492891219,
        18264054103881748979,
        4593301290048115900,
    ]
    assert normal(0, "z", (6,)).tolist() == [
        -1.25688636302948,
        2.3299784660339355,
        -0.6776293516159058,
        -0.6332097053527832,
        -0.8511483669281006,
        0.9492239356040955,
    ]
    assert (
        "".join(str(int(bit)) for bit in gate(0, "gate_tokens", (32,)))
        == "00100000101011001111101000001100"
    )


def _only_philox(keys: list[int]) -> SimpleNamespace:
    """numpy.random with nothing in it but Philox.random_raw, whose bits NumPy promises to keep.

    Args:
        keys: Where to note every key that is asked for.
    """
    philox = np.random.Philox

    def only_raw(*, key: int) -> SimpleNamespace:
        keys.append(key)
        return SimpleNamespace(random_raw=philox(key=key).random_raw)

    return SimpleNamespace(Philox=only_raw)


def test_nothing_of_numpys_randomness_is_used_but_raw_philox(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = draw(_TINY, [5], noise=True)
    keys: list[int] = []
    monkeypatch.setattr(np, "random", _only_philox(keys))
    drawn = draw(_TINY, [5], noise=True)
    assert keys == [5 + (zlib.crc32(name.encode()) << 64) for name in drawn]
    for name, array in expected.items():
        np.testing.assert_array_equal(drawn[name], array)


# -- the normal quantile ---------------------------------------------------------------------------


def _halves(numerators: NDArray[np.uint64]) -> NDArray[np.float64]:
    """``(k + ½)·2⁻⁵²``: exact, and every u there is."""
    u: NDArray[np.float64] = (numerators.astype(np.float64) + 0.5) * 2.0**-52
    return u


def _assert_quantiles(u: NDArray[np.float64]) -> None:
    assert u.min() > 0.0
    assert u.max() < 1.0
    np.testing.assert_allclose(
        sampling._normal_quantile(u), _SPECIAL.ndtri(u), rtol=1e-12, atol=0.0
    )


def test_the_quantile_is_right_in_both_tails_down_to_the_smallest_u() -> None:
    steps = np.arange(10_000, dtype=np.uint64)
    powers = np.uint64(2) ** np.arange(52, dtype=np.uint64)
    low = np.concatenate([steps, powers, powers - np.uint64(1)])
    _assert_quantiles(_halves(low))
    _assert_quantiles(_halves(np.uint64(2**52 - 1) - low))


def test_the_quantile_is_right_around_the_median() -> None:
    steps = np.arange(-10_000, 10_000)
    _assert_quantiles(_halves((2**51 + steps).astype(np.uint64)))


@pytest.mark.parametrize("border", [0.075, 0.925, math.exp(-25.0), 1.0 - math.exp(-25.0)])
def test_the_quantile_has_no_step_where_its_formula_changes(border: float) -> None:
    steps = np.arange(-1000.0, 1000.0, dtype=np.float64)
    _assert_quantiles(np.add(border, steps * 2.0**-52, dtype=np.float64))


def test_the_quantile_is_right_everywhere_between() -> None:
    _assert_quantiles(_halves(words(0, "test", 200_000) >> np.uint64(12)))


def test_the_quantile_is_odd() -> None:
    u = _halves(words(0, "test", 1000) >> np.uint64(12))
    np.testing.assert_array_equal(sampling._normal_quantile(1.0 - u), -sampling._normal_quantile(u))


def test_every_normal_is_finite() -> None:
    extremes = sampling._normal_quantile(_halves(np.array([0, 2**52 - 1], np.uint64)))
    assert extremes.tolist() == pytest.approx([-8.2095, 8.2095], abs=1e-4)


# -- what the draws are like -----------------------------------------------------------------------

_COUNT = 200_000


@pytest.fixture(scope="module")
def normals() -> NDArray[np.float64]:
    return normal(11, "test", (_COUNT,)).astype(np.float64)


@pytest.mark.parametrize(
    ("power", "expected", "variance"), [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]
)
def test_moments_of_the_normals(
    power: int, expected: float, variance: float, normals: NDArray[np.float64]
) -> None:
    error = np.mean(normals**power) - expected
    assert abs(error) < 4.0 * math.sqrt(variance / _COUNT)


def test_the_normals_pass_the_kolmogorov_smirnov_test(normals: NDArray[np.float64]) -> None:
    assert _STATS.kstest(normals, "norm").pvalue > 0.01


def test_neighbouring_normals_are_uncorrelated(normals: NDArray[np.float64]) -> None:
    for lag in (1, 2, 4, 64):
        assert abs(np.mean(normals[lag:] * normals[:-lag])) < 4.0 / math.sqrt(_COUNT)


def test_gates_are_fair_coins_at_every_bit_and_uncorrelated() -> None:
    coins = gate(11, "test", (_COUNT // 64, 64))
    assert set(np.unique(coins)) == {0.0, 1.0}
    signs = 2.0 * coins - 1.0
    assert abs(signs.mean()) < 4.0 / math.sqrt(signs.size)
    # 64 positions of a word, and 64 pairs of neighbours, each within 5 deviations.
    flat = signs.reshape(-1)
    assert np.abs(signs.mean(axis=0)).max() < 5.0 / math.sqrt(len(signs))
    for lag in range(1, 65):
        assert abs(np.mean(flat[lag:] * flat[:-lag])) < 5.0 / math.sqrt(flat.size)


def test_streams_of_other_names_and_seeds_are_uncorrelated(normals: NDArray[np.float64]) -> None:
    for other in (normal(12, "test", (_COUNT,)), normal(11, "tesu", (_COUNT,))):
        assert abs(np.mean(normals * other)) < 4.0 / math.sqrt(_COUNT)


# -- independence ----------------------------------------------------------------------------------


def test_every_input_of_the_graph_is_drawn_in_its_shape_as_float32() -> None:
    drawn = draw(_TINY, [1, 2], 256, 512, noise=True)
    assert {name: array.shape for name, array in drawn.items()} == {
        "z": (2, 128),
        "gate_tokens": (2, 16 * 32, 90),
        "gate_bottleneck": (2, 160, 16, 32),
        "noise_16": (2, 1, 16, 32),
        "noise_32_0": (2, 1, 32, 64),
        "noise_32_1": (2, 1, 32, 64),
        "noise_64_0": (2, 1, 64, 128),
        "noise_64_1": (2, 1, 64, 128),
        "noise_128_0": (2, 1, 128, 256),
        "noise_128_1": (2, 1, 128, 256),
        "noise_256_0": (2, 1, 256, 512),
        "noise_256_1": (2, 1, 256, 512),
    }
    assert {array.dtype for array in drawn.values()} == {np.dtype(np.float32)}


def test_inputs_of_one_shape_differ() -> None:
    drawn = draw(_TINY, [1], noise=True)
    for r in (32, 64, 128, 256):
        assert not np.array_equal(drawn[f"noise_{r}_0"], drawn[f"noise_{r}_1"])


@_FUZZ
@given(st.lists(_SEEDS, min_size=1, max_size=4))
def test_an_image_of_a_batch_is_what_its_seed_draws_alone(seeds: list[int]) -> None:
    batch = draw(_TINY, seeds)
    for i, seed in enumerate(seeds):
        for name, alone in draw(_TINY, [seed]).items():
            np.testing.assert_array_equal(batch[name][i], alone[0])


def test_noise_of_a_batch_is_what_its_seed_draws_alone() -> None:
    batch, alone = draw(_TINY, [3, 4], noise=True), draw(_TINY, [4], noise=True)
    for name, array in alone.items():
        np.testing.assert_array_equal(batch[name][1], array[0])


def test_seeds_draw_different_inputs() -> None:
    for name, array in draw(_TINY, [0, 1], noise=True).items():
        assert not np.array_equal(array[0], array[1]), name


def test_drawing_noise_changes_no_other_input() -> None:
    without, with_noise = draw(_TINY, [9]), draw(_TINY, [9], noise=True)
    assert with_noise.keys() > without.keys()
    for name, array in without.items():
        np.testing.assert_array_equal(with_noise[name], array)


def test_the_latent_does_not_depend_on_the_size_of_the_picture() -> None:
    np.testing.assert_array_equal(draw(_TINY, [9])["z"], draw(_TINY, [9], 512, 256)["z"])


@_FUZZ
@given(seed=_SEEDS, short=st.integers(0, 300), more=st.integers(0, 300))
def test_a_longer_draw_begins_with_the_shorter_one(seed: int, short: int, more: int) -> None:
    sources: list[Callable[[int], NDArray[Any]]] = [
        lambda n: words(seed, "name", n),
        lambda n: gate(seed, "name", (n,)),
        lambda n: normal(seed, "name", (n,)),
    ]
    for source in sources:
        long = source(short + more)
        assert len(long) == short + more
        np.testing.assert_array_equal(long[:short], source(short))


def test_the_native_size_is_the_default() -> None:
    for name, array in draw(_TINY, [9], 256, 256, noise=True).items():
        np.testing.assert_array_equal(draw(_TINY, [9], noise=True)[name], array)


def test_every_kind_of_whole_number_is_the_same_seed() -> None:
    expected = draw(_TINY, [3])["z"]
    for seeds in (
        np.array([3]),
        np.array([3], np.uint64),
        np.array([3], np.int8),
        (3,),
        range(3, 4),
    ):
        np.testing.assert_array_equal(draw(_TINY, seeds)["z"], expected)  # type: ignore[arg-type]


def test_a_draw_leaves_the_callers_randomness_alone() -> None:
    before: Any = np.random.get_state()
    draw(_TINY, [0])
    after: Any = np.random.get_state()
    assert np.array_equal(before[1], after[1])
    assert before[2:] == after[2:]


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**64, np.int64(-5), 10**30])
def test_a_seed_out_of_range_is_an_error_that_says_the_range(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"from 0 to 2\*\*64 - 1, got {seed}"):
        draw(_TINY, [0, seed])


@pytest.mark.parametrize("seed", [1.0, "1", None])
def test_a_seed_that_is_no_whole_number_is_an_error(seed: Any) -> None:
    with pytest.raises(TypeError):
        draw(_TINY, [seed])


def test_no_seeds_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one seed"):
        draw(_TINY, [])


@pytest.mark.parametrize("size", [(0, None), (None, 0), (-256, 256), (256, 300), (128, 128)])
def test_a_size_the_network_cannot_take_is_an_error(size: tuple[int | None, int | None]) -> None:
    with pytest.raises(ConfigError, match="multiples of 256"):
        draw(_TINY, [0], *size)
