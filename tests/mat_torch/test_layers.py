"""Every layer is its literal definition, written out here naively in float64.

The layers themselves run in float32, so results are compared at its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mat_torch.attention import (
    Block,
    MultiHeadAttention,
    effective_window,
    mask_propagation,
    masked_window_attention,
    region_bias,
)
from mat_torch.layers import (
    Conv,
    Linear,
    Mapping,
    ModulatedConv,
    PartialConv,
    StyleConv,
    ToRGB,
    _convolve,
    blur,
    fir_kernel,
    lrelu,
    mask_count,
    partial_ratio,
    update_mask,
    upsample_image,
)

_FUZZ = settings(deadline=None, database=None, max_examples=40)
_M = TypeVar("_M", bound=nn.Module)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _randomised(module: _M) -> _M:
    """The module with random values in every tensor of its state dict, and no gradients."""
    for i, tensor in enumerate(module.requires_grad_(False).state_dict().values()):
        tensor.copy_(_random(*tensor.shape, seed=100 + i))
    return module


def _assert_equal(value: Tensor, expected: Tensor) -> None:
    assert expected.dtype == torch.float64
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


# -- naive definitions -----------------------------------------------------------------------------


def _lrelu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2.0)


def _linear(layer: Linear, x: Tensor, lr: float = 1.0) -> Tensor:
    weight, bias = layer.weight.double(), layer.bias.double()
    return x.double() @ (weight * lr / math.sqrt(weight.shape[1])).T + bias * lr


def _pad(x: Tensor, before: int, after: int) -> Tensor:
    b, c, h, w = x.shape
    padded = torch.zeros(b, c, before + h + after, before + w + after, dtype=torch.float64)
    padded[:, :, before : before + h, before : before + w] = x
    return padded


def _correlate(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Σ over taps and input channels, where the kernel lies wholly inside x."""
    k = weight.shape[-1]
    rows = range(0, x.shape[2] - k + 1, stride)
    columns = range(0, x.shape[3] - k + 1, stride)
    y = torch.zeros(x.shape[0], weight.shape[0], len(rows), len(columns), dtype=torch.float64)
    for (i, row), (j, column) in product(enumerate(rows), enumerate(columns)):
        patch = x[:, :, row : row + k, column : column + k].double()
        y[:, :, i, j] = torch.einsum("bcyx,ocyx->bo", patch, weight.double())
    return y


def _fir(x: Tensor, gain: float = 1.0, stride: int = 1) -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
    kernel = (taps[:, None] * taps[None, :] / 64.0 * gain)[None, None]
    planes = [_correlate(plane, kernel, stride) for plane in torch.split(x, 1, dim=1)]
    return torch.cat(planes, dim=1)


def _stuff(x: Tensor) -> Tensor:
    """A zero after every sample, on both axes."""
    b, c, h, w = x.shape
    stuffed = torch.zeros(b, c, 2 * h, 2 * w, dtype=torch.float64)
    stuffed[:, :, ::2, ::2] = x
    return stuffed


def _resampled(x: Tensor, weight: Tensor, up: int, down: int) -> Tensor:
    k = weight.shape[-1]
    if up == 2:
        return _fir(_correlate(_pad(_stuff(x), 3, 2), weight), gain=4.0)
    if down == 2 and k == 3:
        return _correlate(_fir(_pad(x, 2, 2)), weight, stride=2)
    if down == 2:
        return _correlate(_fir(_pad(x, 1, 1), stride=2), weight)
    return _correlate(_pad(x, k // 2, k // 2), weight)


def _conv(layer: Conv, x: Tensor) -> Tensor:
    out, cin, k, _ = layer.weight.shape
    y = _resampled(x, layer.weight.double() / math.sqrt(cin * k * k), layer.up, layer.down)
    return y if layer.bias is None else y + layer.bias.double().reshape(1, out, 1, 1)


def _upsampled(image: Tensor) -> Tensor:
    return _fir(_pad(_stuff(image), 2, 1), gain=4.0)


def _modulated(layer: ModulatedConv, x: Tensor, style: Tensor) -> Tensor:
    """One sample after the other, each with weights of its own."""
    _, _, cin, k, _ = layer.weight.shape
    samples = []
    for b in range(len(x)):
        s = _linear(layer.affine, style[b])
        weight = layer.weight[0].double() / math.sqrt(cin * k * k) * s[None, :, None, None]
        if layer.demodulate:
            norm = torch.sqrt((weight**2).sum(dim=(1, 2, 3)) + 1e-8)
            weight = weight / norm[:, None, None, None]
        samples.append(_resampled(x[b : b + 1], weight, layer.up, 1))
    return torch.cat(samples)


# -- activations and linear layers -----------------------------------------------------------------


def test_lrelu_has_slope_a_fifth_and_gain_root_two() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0])
    expected = torch.tensor([-0.4, 0.0, 0.0, 3.0]) * math.sqrt(2.0)
    torch.testing.assert_close(lrelu(x), expected)


@pytest.mark.parametrize("lr", [1.0, 0.01])
@pytest.mark.parametrize("activation", [False, True])
def test_linear(activation: bool, lr: float) -> None:
    layer = _randomised(Linear(7, 5, activation=activation, lr=lr))
    x = _random(2, 3, 7)
    expected = _linear(layer, x, lr)
    _assert_equal(layer(x), _lrelu(expected) if activation else expected)


def test_a_new_linear_layer_has_unit_variance_after_its_rate_and_the_bias_asked_for() -> None:
    torch.manual_seed(0)
    layer = Linear(400, 300, lr=0.01, bias_init=1.0).requires_grad_(False)
    assert (layer.weight * 0.01).std().item() == pytest.approx(1.0, abs=0.02)
    torch.testing.assert_close(layer(torch.zeros(1, 400)), torch.ones(1, 300))
    assert not Linear(4, 3).bias.any()


# -- convolutions and resampling -------------------------------------------------------------------

_KINDS = [(1, 1, 1), (3, 1, 1), (3, 1, 2), (1, 1, 2), (3, 2, 1)]  # kernel, up, down


def test_the_filter_is_the_outer_product_of_1_3_3_1() -> None:
    rows = [[1, 3, 3, 1], [3, 9, 9, 3], [3, 9, 9, 3], [1, 3, 3, 1]]
    assert (fir_kernel() * 64.0).tolist() == rows
    assert (fir_kernel(4.0) * 16.0).tolist() == rows


@pytest.mark.parametrize(("kernel", "up", "down"), _KINDS)
@pytest.mark.parametrize("size", [(4, 6), (8, 2)])
def test_conv_at_every_kernel_and_scale(
    kernel: int, up: int, down: int, size: tuple[int, int]
) -> None:
    layer = _randomised(Conv(3, 5, kernel, up=up, down=down))
    x = _random(2, 3, *size)
    y = layer(x)
    assert y.shape == (2, 5, size[0] * up // down, size[1] * up // down)
    _assert_equal(y, _lrelu(_conv(layer, x)))


@pytest.mark.parametrize("kernel", [1, 3])
def test_conv_takes_odd_sizes_at_the_same_scale(kernel: int) -> None:
    layer, x = _randomised(Conv(3, 2, kernel)), _random(1, 3, 5, 1)
    _assert_equal(layer(x), _lrelu(_conv(layer, x)))


def test_conv_without_activation_and_bias_and_with_a_gain() -> None:
    layer = _randomised(Conv(3, 5, 1, down=2, activation=False, bias=False, gain=0.5))
    x = _random(2, 3, 4, 4)
    assert list(layer.state_dict()) == ["weight"]
    _assert_equal(layer(x), 0.5 * _conv(layer, x))


def test_the_gain_of_conv_comes_after_bias_and_activation() -> None:
    layer, x = _randomised(Conv(3, 5, 3, gain=0.5)), _random(2, 3, 4, 4)
    _assert_equal(layer(x), 0.5 * _lrelu(_conv(layer, x)))


@pytest.mark.parametrize("size", [(4, 6), (3, 1), (1, 1)])
def test_upsample_image(size: tuple[int, int]) -> None:
    image = _random(2, 3, *size)
    _assert_equal(upsample_image(image, fir_kernel(4.0)), _upsampled(image))


def test_upsampling_keeps_a_constant_image_away_from_its_border() -> None:
    image = upsample_image(torch.full((1, 3, 4, 4), 0.7), fir_kernel(4.0))
    torch.testing.assert_close(image[..., 1:-1, 1:-1], torch.full((1, 3, 6, 6), 0.7))


# -- partial convolutions --------------------------------------------------------------------------


def _mask(kind: str, height: int, width: int) -> Tensor:
    mask = torch.ones(2, 1, height, width)
    if kind == "all hole":
        mask.zero_()
    elif kind == "one pixel":
        mask.zero_()[0, 0, 1, 2] = 1.0
    elif kind == "random":
        mask = (_random(2, 1, height, width, seed=5) > 0.8).float()
    return mask


_MASKS = ["no hole", "all hole", "one pixel", "random"]


def _count(mask: Tensor, stride: int) -> Tensor:
    padded = _pad(mask, 1, 1)
    rows, columns = range(0, mask.shape[2], stride), range(0, mask.shape[3], stride)
    counts = [[padded[:, :, i : i + 3, j : j + 3].sum(dim=(2, 3)) for j in columns] for i in rows]
    return torch.stack([torch.stack(row, dim=-1) for row in counts], dim=-2)


@pytest.mark.parametrize("kind", _MASKS)
@pytest.mark.parametrize("down", [1, 2])
def test_partial_conv_is_the_activated_conv_times_nine_over_the_count(kind: str, down: int) -> None:
    layer = _randomised(PartialConv(3, 5, down=down))
    x, mask = _random(2, 3, 6, 8), _mask(kind, 6, 8)
    y, updated = layer(x, mask)
    u = _count(mask, down)
    ratio = torch.where(u >= 1.0, 9.0 / u, 0.0)
    _assert_equal(y, _lrelu(_conv(layer.conv, x)) * ratio)
    assert updated is not None
    assert torch.equal(updated.double(), (u > 0).double())


@pytest.mark.parametrize("up", [1, 2])
def test_partial_conv_without_a_mask_is_the_plain_conv(up: int) -> None:
    layer, x = _randomised(PartialConv(3, 5, up=up)), _random(2, 3, 4, 6)
    y, updated = layer(x, None)
    assert updated is None
    assert torch.equal(y, layer.conv(x))


@pytest.mark.parametrize("kind", _MASKS)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_mask_count_is_the_number_of_kept_neighbours(kind: str, stride: int) -> None:
    mask = _mask(kind, 6, 8)
    assert torch.equal(mask_count(mask, stride).double(), _count(mask, stride))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_partial_ratio_is_nine_over_the_count_in_every_precision(dtype: torch.dtype) -> None:
    """With the published 1e-8 it is inf·0 in half precision."""
    count = torch.arange(10, dtype=dtype)
    expected = [0.0] + [9.0 / u for u in range(1, 10)]
    rounded = torch.tensor(expected, dtype=dtype)
    torch.testing.assert_close(partial_ratio(count), rounded, rtol=0.0, atol=0.0)
    assert update_mask(count).tolist() == [0.0] + [1.0] * 9


# -- modulated convolutions ------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "up"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("demodulate", [False, True])
def test_modulated_conv_has_weights_of_its_own_for_each_sample(
    kernel: int, up: int, demodulate: bool
) -> None:
    layer = _randomised(ModulatedConv(4, 5, kernel, 6, up=up, demodulate=demodulate))
    x, style = _random(3, 4, 4, 2), _random(3, 6, seed=1)
    _assert_equal(layer(x, style), _modulated(layer, x, style))


def test_a_new_modulated_conv_has_the_neutral_style_one() -> None:
    layer = ModulatedConv(4, 5, 1, 6, demodulate=False).requires_grad_(False)
    x = _random(2, 4, 3, 3)
    expected = _correlate(x, layer.weight[0] / math.sqrt(4.0))
    _assert_equal(layer(x, torch.zeros(2, 6)), expected)


def test_a_style_of_zero_gives_zero() -> None:
    layer = _randomised(ModulatedConv(4, 5, 3, 6))
    layer.affine.bias.zero_()
    assert not layer(_random(2, 4, 3, 3), torch.zeros(2, 6)).any()


@pytest.mark.parametrize("up", [1, 2])
def test_style_conv_adds_its_noise_before_bias_and_activation(up: int) -> None:
    layer = _randomised(StyleConv(4, 5, 6, up=up, noise_resolution=4 * up))
    x, style = _random(2, 4, 4, 4), _random(2, 6, seed=1)
    plain = _modulated(layer.conv, x, style)
    bias = layer.bias.double()[:, None, None]
    assert layer.noise_strength is not None
    assert layer.noise_const is not None
    strength = layer.noise_strength.double()
    _assert_equal(
        layer(x, style), _lrelu(plain + strength * layer.noise_const.double()[None, None] + bias)
    )
    for batch in (1, 2):
        noise = _random(batch, 1, 4 * up, 4 * up, seed=2)
        expected = _lrelu(plain + strength * noise.double() + bias)
        _assert_equal(layer(x, style, noise), expected)


def test_style_conv_of_stage_one_has_no_noise() -> None:
    layer = _randomised(StyleConv(4, 5, 6))
    x, style = _random(2, 4, 4, 4), _random(2, 6, seed=1)
    assert not [name for name in layer.state_dict() if "noise" in name]
    bias = layer.bias.double()[:, None, None]
    _assert_equal(layer(x, style), _lrelu(_modulated(layer.conv, x, style) + bias))


def test_to_rgb_adds_the_upsampled_previous_picture() -> None:
    layer = _randomised(ToRGB(4, 6))
    x, style, previous = _random(2, 4, 4, 6), _random(2, 6, seed=1), _random(2, 3, 2, 3, seed=2)
    assert not layer.conv.demodulate
    alone = _modulated(layer.conv, x, style) + layer.bias.double()[:, None, None]
    _assert_equal(layer(x, style, None), alone)
    _assert_equal(layer(x, style, previous), alone + _upsampled(previous))


# -- mapping network -------------------------------------------------------------------------------


def _mapped(mapping: Mapping, z: Tensor) -> Tensor:
    z = z.double()
    x = z / torch.sqrt((z**2).mean(dim=1, keepdim=True) + 1e-8)
    for i in range(mapping.layers):
        layer = mapping.get_submodule(f"fc{i}")
        assert isinstance(layer, Linear)
        x = _lrelu(_linear(layer, x, 0.01))
    return x


@pytest.fixture
def mapping() -> Mapping:
    mapping = _randomised(Mapping(16, 3))
    for name, tensor in mapping.state_dict().items():
        if name.endswith("weight"):
            tensor.mul_(100.0)  # as large as the learning rate of 0.01 is small
    return mapping


@pytest.mark.parametrize("psi", [0.0, 0.3, 0.5, 0.7, 1.0, 1.8])
def test_mapping_moves_w_towards_its_average_by_the_truncation(
    psi: float, mapping: Mapping
) -> None:
    z = _random(4, 16, seed=3)
    average = mapping.w_avg.double()
    expected = average + psi * (_mapped(mapping, z) - average)
    _assert_equal(mapping(z, psi), expected)
    assert torch.equal(mapping(z, torch.tensor([psi])), mapping(z, psi))


def test_mapping_without_truncation_ignores_the_average(mapping: Mapping) -> None:
    z = _random(4, 16, seed=3)
    before = mapping(z)
    assert torch.equal(mapping(z, 1.0), before)
    mapping.w_avg.fill_(1e6)
    assert torch.equal(mapping(z), before)


def test_mapping_gives_just_its_average_at_zero_truncation(mapping: Mapping) -> None:
    w = mapping(_random(4, 16, seed=3), 0.0)
    assert torch.equal(w, mapping.w_avg.expand(4, 16))


def test_mapping_normalises_z(mapping: Mapping) -> None:
    z = _random(4, 16, seed=3)
    torch.testing.assert_close(mapping(1000.0 * z), mapping(z), rtol=1e-5, atol=1e-5)
    assert bool(mapping(torch.zeros(1, 16)).isfinite().all())


def test_the_average_follows_the_batch_mean_by_a_two_hundredth(mapping: Mapping) -> None:
    before, w = mapping.w_avg.clone(), _random(8, 16, seed=4)
    mapping.track_average(w.requires_grad_())
    _assert_equal(mapping.w_avg, 0.995 * before.double() + 0.005 * w.detach().double().mean(dim=0))
    assert not mapping.w_avg.requires_grad


# -- windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "window", "shift", "expected"),
    [
        (64, 64, 8, 0, (8, 0)),
        (64, 64, 8, 4, (8, 4)),
        (17, 40, 16, 8, (16, 8)),
        (16, 16, 16, 8, (16, 0)),  # the grid is the window
        (8, 8, 16, 8, (8, 0)),  # and smaller
        (16, 32, 16, 8, (16, 0)),  # the shorter side decides
        (32, 8, 16, 8, (8, 0)),
    ],
)
def test_a_side_of_at_most_the_window_becomes_the_window_unshifted(
    height: int, width: int, window: int, shift: int, expected: tuple[int, int]
) -> None:
    assert effective_window(height, width, window, shift) == expected


def _windows(height: int, width: int, window: int, shift: int) -> list[list[tuple[int, int]]]:
    """Cells (row, column) of the rolled grid, window by window."""
    if min(height, width) <= window:
        window = min(height, width)
    corners = product(range(0, height, window), range(0, width, window))
    return [list(product(range(i, i + window), range(j, j + window))) for i, j in corners]


def _naive_attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, window: int, shift: int, heads: int
) -> Tensor:
    """Window by window and pair by pair, as the definition reads."""
    batch, height, width, channels = q.shape
    windows = _windows(height, width, window, shift)
    if min(height, width) <= window:
        window, shift = min(height, width), 0

    def band(i: int, size: int) -> int:
        return 0 if i < size - window else 1 if i < size - shift else 2

    y = torch.zeros(batch, height, width, channels, dtype=torch.float64)
    for b, cells in product(range(batch), windows):
        tokens = [((i + shift) % height, (j + shift) % width) for i, j in cells]
        regions = [(band(i, height), band(j, width)) if shift else (0, 0) for i, j in cells]
        bias = torch.zeros(len(cells), len(cells), dtype=torch.float64)
        for (m, region_m), (n, region_n) in product(enumerate(regions), enumerate(regions)):
            bias[m, n] += -100.0 if region_m != region_n else 0.0
        for n, (row, column) in enumerate(tokens):
            if valid is not None and not valid[b, 0, row, column]:
                bias[:, n] += -100.0
        rows, columns = [t[0] for t in tokens], [t[1] for t in tokens]
        for head in torch.arange(channels).chunk(heads):
            parts = [t[b, rows, columns][:, head].double() for t in (q, k, v)]
            probabilities = torch.softmax(parts[0] @ parts[1].T + bias, dim=1)
            result = probabilities @ parts[2]
            for n, (row, column) in enumerate(tokens):
                y[b, row, column, head] = result[n]
    return y


def _naive_propagation(valid: Tensor, window: int, shift: int) -> Tensor:
    batch, _, height, width = valid.shape
    windows = _windows(height, width, window, shift)
    shift = 0 if min(height, width) <= window else shift
    result = torch.zeros_like(valid)
    for b, cells in product(range(batch), windows):
        tokens = [((i + shift) % height, (j + shift) % width) for i, j in cells]
        any_valid = any(bool(valid[b, 0, i, j]) for i, j in tokens)
        for i, j in tokens:
            result[b, 0, i, j] = any_valid
    return result


def _valid(kind: str, height: int, width: int) -> Tensor | None:
    """Validity [2, 1, H, W]; "quarter" leaves most windows without any valid token."""
    valid = torch.zeros(2, 1, height, width, dtype=torch.bool)
    if kind == "none":
        return None
    if kind == "quarter":
        valid[:, :, : height // 2, : width // 2] = _random(2, 1, height // 2, width // 2) > 0
    elif kind == "scattered":
        valid = _random(2, 1, height, width) > 1.0
    elif kind == "all":
        valid = ~valid
    return valid


_GRIDS = [  # height, width, window, shift
    (8, 8, 4, 0),
    (8, 8, 4, 2),
    (12, 8, 4, 2),
    (8, 16, 4, 1),
    (4, 8, 4, 2),  # one row of windows: unshifted
    (2, 6, 4, 2),  # shorter than the window
    (4, 4, 4, 2),
]


@pytest.mark.parametrize("kind", ["none", "all", "scattered", "quarter", "no valid token"])
@pytest.mark.parametrize(("height", "width", "window", "shift"), _GRIDS)
def test_attention_is_that_of_every_window_alone(
    height: int, width: int, window: int, shift: int, kind: str
) -> None:
    q, k, v = (_random(2, height, width, 6, seed=s) for s in range(3))
    valid = _valid(kind, height, width)
    y = masked_window_attention(q, k, v, valid, window=window, shift=shift, heads=2)
    expected = _naive_attention(q, k, v, valid, window, shift, 2)
    # −100 costs the logits two digits: 1e-5 instead of 1e-7.
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_region_bias_that_the_caller_keeps_changes_nothing() -> None:
    q, k, v = (_random(2, 8, 12, 6, seed=s) for s in range(3))
    kept = region_bias(8, 12, 4, 2)
    y = masked_window_attention(q, k, v, None, window=4, shift=2, heads=2)
    again = masked_window_attention(q, k, v, None, window=4, shift=2, heads=2, regions=kept)
    assert torch.equal(y, again)


def test_a_window_without_any_valid_token_attends_to_all_of_them_alike() -> None:
    q, k, v = (_random(1, 8, 8, 6, seed=s) for s in range(3))
    none = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    y = masked_window_attention(q, k, v, none, window=4, shift=0, heads=2)
    unmasked = masked_window_attention(q, k, v, None, window=4, shift=0, heads=2)
    torch.testing.assert_close(y, unmasked, rtol=1e-4, atol=1e-4)


def test_invalid_tokens_have_no_influence_where_a_valid_one_is() -> None:
    q, k, v = (_random(1, 4, 4, 6, seed=s) for s in range(3))
    valid = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    valid[0, 0, 1, 2] = True
    y = masked_window_attention(q, k, v, valid, window=4, shift=0, heads=2)
    torch.testing.assert_close(y, v[:, 1:2, 2:3].expand(1, 4, 4, 6), rtol=0.0, atol=1e-6)


def test_one_validity_map_serves_the_whole_batch() -> None:
    q, k, v = (_random(2, 8, 8, 6, seed=s) for s in range(3))
    valid = _random(1, 1, 8, 8) > 1.0
    y = masked_window_attention(q, k, v, valid, window=4, shift=2, heads=2)
    each = masked_window_attention(q, k, v, valid.expand(2, -1, -1, -1), window=4, shift=2, heads=2)
    assert torch.equal(y, each)


def test_the_region_bias_forbids_what_only_the_shift_brought_together() -> None:
    """In the last window of a 4×4 grid, cut by 2 and shifted by 1, every cell is a region."""
    bias = region_bias(4, 4, 2, 1)
    assert bias.shape == (4, 4, 4)
    assert not bias[0].any()
    assert bias[1].tolist() == [[-100.0 * ((i ^ j) & 1) for j in range(4)] for i in range(4)]
    assert bias[3].tolist() == [[-100.0 * (i != j) for j in range(4)] for i in range(4)]
    assert not region_bias(4, 4, 2, 0).any()


@_FUZZ
@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    window=st.sampled_from((2, 4)),
    shifted=st.booleans(),
    kept=st.floats(0.0, 1.0),
    seed=st.integers(0, 100),
)
def test_a_token_is_valid_after_a_block_if_any_of_its_window_was(
    rows: int, columns: int, window: int, shifted: bool, kept: float, seed: int
) -> None:
    shift = window // 2 if shifted else 0
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(2, 1, rows * window, columns * window, generator=generator) < kept**3
    propagated = mask_propagation(valid, window=window, shift=shift)
    assert propagated.dtype == torch.bool
    assert torch.equal(propagated, _naive_propagation(valid, window, shift))


def test_a_grid_within_one_window_becomes_valid_as_a_whole() -> None:
    valid = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    valid[0, 0, 7, 0] = True
    propagated = mask_propagation(valid, window=16, shift=8)
    assert propagated[0].all()
    assert not propagated[1].any()


# -- blocks ----------------------------------------------------------------------------------------


def _attended(
    layer: MultiHeadAttention, x: Tensor, valid: Tensor | None, window: int, shift: int
) -> Tensor:
    unit = x.double() / x.double().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    q = _linear(layer.q, unit) / math.sqrt(x.shape[-1] // layer.heads)
    y = _naive_attention(
        q, _linear(layer.k, unit), _linear(layer.v, x), valid, window, shift, layer.heads
    )
    return _linear(layer.proj, y)


@pytest.mark.parametrize("kind", ["none", "scattered"])
@pytest.mark.parametrize("shift", [0, 2])
def test_a_block_has_neither_norm_nor_residual(kind: str, shift: int) -> None:
    block = _randomised(Block(6, 2, window=4, shift=shift, grid=8))
    x, valid = _random(2, 8, 8, 6), _valid(kind, 8, 8)
    y, propagated = block(x, valid)
    attended = _attended(block.attn, x, valid, 4, shift)
    fused = _lrelu(_linear(block.fuse, torch.cat([x.double(), attended], dim=-1)))
    expected = _linear(block.mlp.fc2, _lrelu(_linear(block.mlp.fc1, fused)))
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    if valid is None:
        assert propagated is None
    else:
        assert torch.equal(propagated, _naive_propagation(valid, 4, shift))


def test_a_block_off_its_native_grid_makes_the_regions_of_the_grid_it_gets() -> None:
    native = _randomised(Block(6, 2, window=4, shift=2, grid=8))
    other = Block(6, 2, window=4, shift=2, grid=16)
    other.load_state_dict(native.state_dict())
    assert native.regions is not None
    x = _random(1, 8, 8, 6)
    with torch.no_grad():
        assert torch.equal(native(x)[0], other(x)[0])


def test_a_token_of_zero_is_no_division_by_zero() -> None:
    block = _randomised(Block(6, 2, window=4, shift=0, grid=4))
    assert bool(block(torch.zeros(1, 4, 4, 6))[0].isfinite().all())


# -- derivatives -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("padding", "stride", "side"), [(1, 1, 6), (2, 1, 7), (1, 2, 8), (1, 2, 9)]
)
def test_a_filters_first_and_second_derivatives_are_those_of_the_convolution(
    padding: int, stride: int, side: int
) -> None:
    x = _random(2, 3, side, side + 1).double().requires_grad_()

    def filtered(x: Tensor) -> Tensor:
        return blur(x, fir_kernel(), padding, stride)

    weight = fir_kernel().double().expand(3, 1, 4, 4)
    torch.testing.assert_close(
        filtered(x), F.conv2d(x, weight, padding=padding, stride=stride, groups=3)
    )
    assert torch.autograd.gradcheck(filtered, x)
    # R1 differentiates twice; a nonlinearity, so that the second derivative is not zero.
    assert torch.autograd.gradgradcheck(lambda x: filtered(x).square(), x)


@pytest.mark.parametrize(
    ("size", "padding", "stride"), [(1, 0, 1), (3, 1, 1), (3, 0, 2), (1, 0, 2)]
)
def test_a_convolutions_first_and_second_derivatives_are_those_of_pytorch(
    size: int, padding: int, stride: int
) -> None:
    x = _random(2, 3, 5, 6).double().requires_grad_()
    weight = _random(4, 3, size, size, seed=1).double().requires_grad_()

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return _convolve(x, weight, stride=stride, padding=padding)

    assert torch.equal(product(x, weight), F.conv2d(x, weight, stride=stride, padding=padding))
    assert torch.autograd.gradcheck(product, (x, weight))
    assert torch.autograd.gradgradcheck(product, (x, weight))


def test_under_autocast_a_filter_of_float32_has_float32_gradients() -> None:
    x = _random(1, 2, 6, 6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = blur(x, fir_kernel(), 1)
    assert y.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient[0, 0, 3, 3], torch.ones(()), atol=0.02, rtol=0.0)


# -- compiled --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "resample",
    [
        lambda x: blur(x, fir_kernel(4.0), 1),
        lambda x: blur(x, fir_kernel(), 2),
        lambda x: blur(x, fir_kernel(), 1, 2),
        lambda x: upsample_image(x, fir_kernel(4.0)),
    ],
    ids=["up", "down", "halve", "upsample_image"],
)
def test_compiled_the_filters_are_other_arithmetic_with_the_same_values_and_gradients(
    resample: Callable[[Tensor], Tensor],
) -> None:
    x = _random(2, 3, 8, 12).double().requires_grad_()
    eager, compiled = resample(x), torch.compile(resample, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager)
    weights = _random(*eager.shape, seed=1).double()
    expected, got = (torch.autograd.grad(y, x, weights)[0] for y in (eager, compiled))
    torch.testing.assert_close(got, expected)
