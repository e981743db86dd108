"""The one source of randomness: what a seed means (NumPy only, no torch here).

MAT draws at inference too: the latent z, two 0/1 gates, and the noise of stage two. In this project
they are inputs, and this module draws them. A seed names a picture for good, so the algorithm is
fixed, and uses nothing whose bits could differ between machines or NumPy versions:

1. **Words.** Each input has a stream of its own: ``Philox4x64-10`` (Salmon et al., 2011) with the
   128-bit key ``seed + 2⁶⁴·crc32(name)``, the blocks of four 64-bit words at counters 1, 2, 3, …
   (NumPy's ``Philox(key=…)``, which counts before it draws). Raw Philox output is part of NumPy's
   stability promise; its distributions are not.
2. **Gates.** Bit i of the stream, counted from the least significant bit of each word, is element
   i of the flattened gate: 1 keeps the feature, 0 takes the style's.
3. **Normals.** Word x gives ``u = (⌊x/2¹²⌋ + ½)·2⁻⁵²``, strictly inside (0, 1), and the value is
   the inverse normal distribution function at u by Wichura's AS 241 (PPND16, relative error
   1e-16), rounded to float32. AS 241 needs a logarithm in the tails, and libraries differ there
   by a last bit, so it is computed here from additions, multiplications and divisions, which
   IEEE 754 fixes.

Streams are independent of batch, size of the other inputs and export options: image i of a batch
drawn from seeds [a, b] is what seed a or b draws alone.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mat_torch.config import GeneratorConfig

__all__ = ["draw", "gate", "normal", "words"]

_MAX_SEED = 2**64 - 1


def words(seed: int, name: str, count: int) -> NDArray[np.uint64]:
    """The first `count` 64-bit words of the stream (seed, name).

    Raises:
        TypeError: If the seed is no whole number.
        ValueError: If the seed is not in [0, 2⁶⁴).
    """
    seed = operator.index(seed)  # NumPy's integers would overflow below
    if not 0 <= seed <= _MAX_SEED:
        raise ValueError(f"a seed is a whole number from 0 to 2**64 - 1, got {seed}")
    key = seed | zlib.crc32(name.encode()) << 64
    return np.asarray(np.random.Philox(key=key).random_raw(count), dtype=np.uint64)


def gate(seed: int, name: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """Fair coins, 0.0 or 1.0, of this shape."""
    size = int(np.prod(shape))
    raw = words(seed, name, -(-size // 64)).astype("<u8").view(np.uint8)
    bits = np.unpackbits(raw, bitorder="little")[:size]
    return bits.astype(np.float32).reshape(tuple(shape))


def normal(seed: int, name: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal values of this shape."""
    size = int(np.prod(shape))
    u = ((words(seed, name, size) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return _normal_quantile(u).astype(np.float32).reshape(tuple(shape))


def draw(
    config: GeneratorConfig,
    seeds: Sequence[int],
    height: int | None = None,
    width: int | None = None,
    *,
    noise: bool = False,
) -> dict[str, NDArray[np.float32]]:
    """Every random input of the graph for a batch, one seed an image.

    Args:
        config: The network.
        seeds: One seed in [0, 2⁶⁴) for each image.
        height: Image height in pixels, native if None; a multiple of the native size.
        width: Image width likewise.
        noise: Draw the noise maps too (needed off the native size).

    Returns:
        ``z`` [B, latent], ``gate_tokens`` [B, h·w, token_dim], ``gate_bottleneck`` [B, C, h, w],
        and with `noise` each ``noise_*`` [B, 1, r, r], as float32.

    Raises:
        TypeError: For a seed that is no whole number.
        ValueError: For no seeds, a seed out of range, or a size the network cannot take.
    """
    if len(seeds) == 0:
        raise ValueError("draw needs at least one seed")
    height = config.resolution if height is None else height
    width = config.resolution if width is None else width
    config.check_size(height, width)
    h, w = config.bottleneck_grid(height, width)
    bottleneck = (config.channels(16), h, w)
    scale_y, scale_x = height // config.resolution, width // config.resolution

    def batch(kind: str, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        source = gate if kind == "gate" else normal
        return np.stack([source(seed, name, shape) for seed in seeds])

    inputs = {
        "z": batch("normal", "z", (config.latent_dim,)),
        "gate_tokens": batch("gate", "gate_tokens", (h * w, config.token_dim)),
        "gate_bottleneck": batch("gate", "gate_bottleneck", bottleneck),
    }
    if noise:
        for name, r in config.noise_resolutions.items():
            inputs[name] = batch("normal", name, (1, r * scale_y, r * scale_x))
    return inputs


# -- AS 241, PPND16 (Wichura 1988, Applied Statistics 37, 477-484) ---------------------------------
# Coefficients from the constant term up; the denominators' constant term is 1.

_CENTRE = (
    (
        3.3871328727963666080e0,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ),
    (
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)
_SHOULDER = (
    (
        1.42343711074968357734e0,
        4.63033784615654529590e0,
        5.76949722146069140550e0,
        3.64784832476320460504e0,
        1.27045825245236838258e0,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ),
    (
        1.0,
        2.05319162663775882187e0,
        1.67638483018380384940e0,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
_TAIL = (
    (
        6.65790464350110377720e0,
        5.46378491116411436990e0,
        1.78482653991729133580e0,
        2.96560571828504891230e-1,
        2.65321895265761230930e-2,
        1.24266094738807843860e-3,
        2.71155556874348757815e-5,
        2.01033439929228813265e-7,
    ),
    (
        1.0,
        5.99832206555887937690e-1,
        1.36929880922735805310e-1,
        1.48753612908506148525e-2,
        7.86869131145613259100e-4,
        1.84631831751005468180e-5,
        1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ),
)
_LN2 = 0.6931471805599453094
_SQRT_HALF = 0.7071067811865475244


def _polynomial(coefficients: Sequence[float], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Horner's rule as separate operations, so that no compiler fuses a multiply and an add."""
    total = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = np.multiply(total, x)
        total = np.add(total, coefficient)
    return total


def _ratio(
    table: tuple[tuple[float, ...], tuple[float, ...]], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    return _polynomial(table[0], x) / _polynomial(table[1], x)


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm of positive values: ``2·artanh((m−1)/(m+1)) + e·ln 2`` by its series."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < _SQRT_HALF
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    exponent = exponent - low.astype(exponent.dtype)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _polynomial([2.0 / (2 * k + 1) for k in range(12)], s * s)
    log: NDArray[np.float64] = exponent.astype(np.float64) * _LN2 + s * series
    return log


def _normal_quantile(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Φ⁻¹(u) for u in (0, 1)."""
    q = u - 0.5
    value = np.empty_like(u)
    centre = np.abs(q) <= 0.425
    value[centre] = q[centre] * _ratio(_CENTRE, 0.180625 - q[centre] * q[centre])
    outer = ~centre
    r = np.sqrt(-_log(np.minimum(u[outer], 1.0 - u[outer])))
    magnitude = np.where(r <= 5.0, _ratio(_SHOULDER, r - 1.6), _ratio(_TAIL, r - 5.0))
    value[outer] = np.where(q[outer] < 0.0, -magnitude, magnitude)
    return value
