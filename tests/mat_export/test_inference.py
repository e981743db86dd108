"""Every rewrite alone gives what the training form gives, and so does all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import SMALL
from torch import Tensor, nn

from mat_export import inference
from mat_export.contract import GraphSpec
from mat_export.inference import REWRITES, InferenceGenerator, rewrite_counts
from mat_export.pixels import from_unit, to_unit
from mat_torch import Generator, draw, layers, preset, random_checkpoint
from mat_torch.attention import Block, masked_window_attention
from mat_torch.config import BOTTLENECK

BAR = 1e-5
"""Largest ‖a − b‖ / ‖b‖ between the two forms."""

TINY = preset("mat-tiny-256")

M = TypeVar("M", bound=nn.Module)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small convolutions gain little from a second thread, and wait for it where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomized(layer: M) -> M:
    """The layer with random biases and noise strengths, which begin as zeros and ones."""
    for name, value in layer.named_parameters():
        if name.endswith("bias"):
            value.data += 0.3 * torch.randn_like(value) * (value.data.abs().max() + 1.0)
        if name.endswith("noise_strength"):
            value.data += 0.5 + torch.rand(())
    return layer.eval().requires_grad_(False)


def check_close(result: Tensor, reference: Tensor) -> None:
    assert result.shape == reference.shape
    assert bool(torch.isfinite(reference).all())
    error, size = float((result - reference).norm()), float(reference.norm())
    assert size > 0.0, "nothing was compared"
    assert error <= BAR * size, f"relative error {error / size:.2e}"


# -- gains -----------------------------------------------------------------------------------------


def linear() -> None:
    for activation in (False, True):
        for lr in (1.0, 0.01):
            layer = randomized(layers.Linear(7, 5, activation=activation, lr=lr, bias_init=1.0))
            x = torch.randn(2, 3, 7)
            check_close(inference.Linear.of(layer)(x), layer(x))


def conv_same() -> None:
    for kernel in (1, 3):
        for activation in (False, True):
            layer = randomized(layers.Conv(3, 5, kernel, activation=activation))
            x = torch.randn(2, 3, 7, 6)
            check_close(inference.Conv(layer)(x), layer(x))


def conv_down() -> None:
    layer = randomized(layers.Conv(3, 5, 3, down=2))
    x = torch.randn(2, 3, 8, 6)
    check_close(inference.Conv(layer)(x), layer(x))


def conv_up() -> None:
    for bias in (False, True):
        layer = randomized(layers.Conv(3, 5, 3, up=2, bias=bias))
        x = torch.randn(2, 3, 5, 6)
        check_close(inference.Conv(layer)(x), layer(x))


def conv_gain_without_bias() -> None:
    layer = randomized(layers.Conv(3, 5, 3, bias=False, gain=0.7))
    x = torch.randn(2, 3, 5, 6)
    check_close(inference.Conv(layer)(x), layer(x))


# -- resampling ------------------------------------------------------------------------------------


def subpixel() -> None:
    kernel = layers.fir_kernel(4.0)
    for height, width in ((1, 1), (2, 5), (8, 8)):
        x, weight = torch.randn(2, 3, height, width), torch.randn(4, 3, 3, 3)
        reference = layers.resampled_conv(x, weight, kernel, up=2)
        check_close(inference.SubpixelConv(weight)(x), reference)


def image_upsample() -> None:
    kernel = layers.fir_kernel(4.0)
    for height, width in ((1, 1), (3, 5), (8, 8)):
        x, bias = torch.randn(2, 3, height, width), torch.randn(3)
        reference = layers.upsample_image(x, kernel)
        check_close(inference.ImageUpsample()(x), reference)
        check_close(inference.ImageUpsample(bias=bias)(x), reference + bias[:, None, None])


def blur() -> None:
    x = torch.randn(2, 5, 6, 7)
    reference = layers.blur(x, layers.fir_kernel(), padding=2)
    check_close(inference.Blur(5, (2, 2, 2, 2), gain=1.0)(x), reference)
    reference = layers.blur(F.pad(x, (1, 0, 2, 3)), layers.fir_kernel(4.0), padding=0)
    check_close(inference.Blur(5, (1, 0, 2, 3), gain=4.0)(x), reference)


# -- partial convolution ---------------------------------------------------------------------------


def holes() -> dict[str, Tensor]:
    """Masks [2, 1, 8, 8]."""
    one = torch.ones(2, 1, 8, 8)
    one[:, :, 3, 4] = 0.0
    lone = torch.zeros(2, 1, 8, 8)
    lone[:, :, 0, 7] = 1.0
    return {
        "random": (torch.rand(2, 1, 8, 8) < 0.3).float(),
        "no hole": torch.ones(2, 1, 8, 8),
        "one pixel of hole": one,
        "one pixel kept": lone,
    }


def partial_conv() -> None:
    for down in (1, 2):
        layer = randomized(layers.PartialConv(3, 5, down=down))
        rewritten = inference.PartialConv(layer)
        x = torch.randn(2, 3, 8, 8)
        for mask in holes().values():
            (y, state), (reference, expected) = rewritten(x, mask), layer(x, mask)
            check_close(y, reference)
            assert torch.equal(state, expected)
        check_close(rewritten(x)[0], layer(x)[0])
        assert rewritten(x)[1] is None


def partial_conv_of_nothing_but_hole() -> None:
    for down in (1, 2):
        layer = randomized(layers.PartialConv(3, 5, down=down))
        hole = torch.zeros(2, 1, 8, 8)
        y, state = inference.PartialConv(layer)(torch.randn(2, 3, 8, 8), hole)
        reference, expected = layer(torch.randn(2, 3, 8, 8), hole)
        assert torch.equal(y, reference)
        assert torch.equal(state, expected)
        assert not bool(y.any() or state.any())


# -- tokens ----------------------------------------------------------------------------------------


def validities() -> list[Tensor | None]:
    """Bool [2, 1, 16, 16]: none of it, some, one window only, nothing, all."""
    window = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    window[:, :, :8, 8:] = True
    some = torch.rand(2, 1, 16, 16) < 0.2
    return [None, some, window, torch.zeros_like(window), torch.ones_like(window)]


def query_key() -> None:
    """The attention before its output projection, without the value's bias."""
    for shift in (0, 4):
        block = randomized(Block(12, 3, window=8, shift=shift, grid=16))
        attn, x = block.attn, torch.randn(2, 16, 16, 12)
        unit = F.normalize(x, dim=-1)
        for valid in validities():
            reference = masked_window_attention(
                attn.q(unit) * attn.scale,
                attn.k(unit),
                attn.v(x) - attn.v.bias,
                valid,
                window=8,
                shift=shift,
                heads=3,
            )
            check_close(inference.Attention(block)(x, valid), reference)


def fused_block() -> None:
    for shift in (0, 4):
        block = randomized(Block(12, 3, window=8, shift=shift, grid=16))
        x = torch.randn(2, 16, 16, 12)
        for valid in validities():
            (y, state), (reference, expected) = (
                inference.FusedBlock(block)(x, valid),
                block(x, valid),
            )
            check_close(y, reference)
            if valid is None:
                assert state is None
                assert expected is None
            else:
                assert torch.equal(state, expected)


# -- styles ----------------------------------------------------------------------------------------


def modulated_weights(conv: layers.ModulatedConv, style: Tensor) -> Tensor:
    """[B, out, in, k, k] as the training form uses them, in double precision."""
    affine = conv.affine
    s = style.double() @ (affine.weight.double() * affine.weight_gain).T + affine.bias.double()
    weight = conv.weight.double() * conv.weight_gain * s[:, None, :, None, None]
    if conv.demodulate:
        norm = weight.square().sum(dim=(2, 3, 4), keepdim=True)
        weight = weight * torch.rsqrt(norm + layers.DEMODULATION_EPS)
    return weight


def style_bank() -> None:
    """Scale and factor of each layer, whatever their order and shapes, are its own."""
    shapes = [(6, 3, 1), (6, 8, 3), (4, 6, 3), (4, 3, 1), (6, 8, 3), (2, 4, 3), (8, 3, 1)]
    convs = [
        randomized(layers.ModulatedConv(cin, out, k, 5, demodulate=k == 3))
        for cin, out, k in shapes
    ]
    style = torch.randn(3, 5)
    bank = inference.StyleBank(convs)(style)
    assert len(bank) == len(convs)
    for conv, (scale, factor) in zip(convs, bank, strict=True):
        gain = layers.LRELU_GAIN if conv.demodulate else 1.0
        own = (
            inference.bounded_weight(conv)[0]
            if conv.demodulate
            else conv.weight[0] * conv.weight_gain
        )
        weight = own * scale[:, None, :, :, :]
        reference = modulated_weights(conv, style).float() * gain
        check_close(weight * factor[:, :, None], reference)


def modulation(up: int, scale: float = 1.0, noise: bool = True, weight_scale: float = 1.0) -> None:
    """One StyleConv with the style it gets from a bank, its styles and weights scaled."""
    layer = layers.StyleConv(6, 5, 4, up=up, noise_resolution=8 * up if noise else None)
    randomized(layer)
    if not noise:
        layer.bias.zero_()  # next to it, what tiny styles leave would not count
    layer.conv.affine.weight.mul_(scale)
    layer.conv.affine.bias.mul_(scale)
    layer.conv.weight.mul_(weight_scale)
    x, style = torch.randn(2, 6, 8, 8), torch.randn(2, 4)
    ((s, factor),) = inference.StyleBank([layer.conv])(style)
    check_close(inference.StyleConv(layer)(x, s, factor), layer(x, style))
    assert float(s.abs().max()) <= 1.0


def style_conv() -> None:
    modulation(up=1)
    modulation(up=2)


def rgb(scale: float = 1.0) -> None:
    for first in (True, False):
        layer = randomized(layers.ToRGB(6, 4))
        if scale != 1.0:
            layer.bias.zero_()
        layer.conv.affine.weight.mul_(scale)
        layer.conv.affine.bias.mul_(scale)
        x, style = torch.randn(2, 6, 8, 8), torch.randn(2, 4)
        previous = None if first else scale * torch.randn(2, 3, 4, 4)
        # No stage consists of ToRGB layers alone.
        beside = layers.ModulatedConv(6, 5, 3, 4)
        _, (s, magnitude) = inference.StyleBank([beside, layer.conv])(style)
        result = inference.ToRGB(layer, first=first)(x, s, magnitude, previous)
        check_close(result, layer(x, style, previous))
        assert float(s.abs().max()) <= 1.0


def to_rgb() -> None:
    rgb()


def large_styles() -> None:
    modulation(up=1, scale=1e4)
    modulation(up=2, scale=1e4)
    rgb(scale=1e4)


def scaled_weights() -> None:
    """However large or small a demodulated layer's weights are, the graph's are of norm 1."""
    for scale in (1e4, 1e-2, 1e-6):
        for up in (1, 2):
            modulation(up=up, weight_scale=scale, noise=scale > 1)
    conv = randomized(layers.ModulatedConv(6, 5, 3, 4))
    conv.weight.mul_(1e4)
    weight, norm = inference.bounded_weight(conv)
    norms = weight.flatten(1).norm(dim=1)
    assert float(norms.max()) == pytest.approx(1.0, rel=1e-6)
    check_close(weight * norm, conv.weight[0] * conv.weight_gain)


def aligned_channels() -> None:
    """Stage one gives the same image with more channels, and the original keeps its own."""
    config = preset("mat-tiny-256")
    stage = random_checkpoint(config, 0).build().synthesis.first_stage
    wider = inference.align_channels(stage)
    assert config.token_dim == stage.conv_first.conv.weight.shape[0] == 90
    widths = [conv.conv.weight.shape[:2] for conv in (wider.conv_first, *wider.enc_conv)]
    assert widths == [(96, 4), (96, 96), (90, 96)]
    assert wider.get_parameter("dec_conv.0.conv0.conv.weight").shape[1:3] == (96, 90)
    r = config.resolution
    image, mask = torch.rand(1, 3, r, r) * 2 - 1, (torch.rand(1, 1, r, r) > 0.7).float()
    gate = (torch.rand(1, 256, 90) > 0.5).float()
    inputs = (image, mask, torch.randn(1, config.latent_dim), gate)
    check_close(wider(*inputs), stage(*inputs))


def tiny_styles() -> None:
    for scale in (1e-3, 1e-6, 1e-10, 1e-14):  # demodulation's 1e-8 takes over on the way
        modulation(up=1, scale=scale, noise=False)
        rgb(scale=scale)


def vanishing_styles() -> None:
    layer = randomized(layers.StyleConv(6, 5, 4))
    layer.conv.affine.weight.zero_()
    layer.conv.affine.bias.zero_()
    x, style = torch.randn(2, 6, 8, 8), torch.randn(2, 4)
    ((s, factor),) = inference.StyleBank([layer.conv])(style)
    check_close(inference.StyleConv(layer)(x, s, factor), layer(x, style))


# -- noise, gates, compositing ---------------------------------------------------------------------


def constant_noise() -> None:
    layer = randomized(layers.StyleConv(6, 5, 4, noise_resolution=8))
    assert layer.noise_strength is not None
    assert layer.noise_const is not None
    rewritten = inference.StyleConv(layer, "const")
    assert isinstance(rewritten.noise, inference.ConstantNoise)
    reference = layer.noise_strength * layer.noise_const * layers.LRELU_GAIN
    check_close(rewritten.noise(None), reference[None, None])
    x, style = torch.randn(2, 6, 8, 8), torch.randn(2, 4)
    ((s, factor),) = inference.StyleBank([layer.conv])(style)
    check_close(rewritten(x, s, factor), layer(x, style))


def gate() -> None:
    """`x·g + a·(1 − g)` at the native grid and, for the two ways to resize, off it."""
    for resize, (h, w) in ((None, (16, 16)), ("linear", (16, 32)), ("bilinear", (32, 16))):
        layer = randomized(layers.Linear(5, BOTTLENECK**2, activation=True))
        x, style = torch.randn(2, 7, h, w), torch.randn(2, 5)
        g = (torch.rand(2, 7, h, w) < 0.5).float()
        a = layer(style)[:, None]
        if resize == "linear":
            a = F.interpolate(a, size=h * w, mode="linear", align_corners=False)
            a = a.view(2, 1, h, w)
        else:
            a = a.view(2, 1, BOTTLENECK, BOTTLENECK)
            if resize == "bilinear":
                a = F.interpolate(a, size=(h, w), mode="bilinear", align_corners=False)
        check_close(inference.GatedStyle(layer, resize)(x, style, g), x * g + a * (1.0 - g))


def composites() -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Image, mask, coarse RGB, what stage two read, and (output, coarse), stages replaced."""
    config = SMALL
    model = InferenceGenerator(Generator(config), GraphSpec(config, coarse=True))
    image, coarse, fill = (torch.randn(1, 3, 128, 128) for _ in range(3))
    mask = (torch.rand(1, 1, 128, 128) < 0.5).float()
    read: list[Tensor] = []

    def second(x: Tensor, *others: object) -> Tensor:
        read.append(x)
        return fill

    model.first_stage.forward = lambda *inputs: coarse  # type: ignore[method-assign]
    model.second_stage.forward = second  # type: ignore[method-assign, assignment]
    random = {k: torch.from_numpy(v) for k, v in draw(config, [0]).items()}
    results = model(image, mask, truncation=torch.ones(1), **random)
    check_close(results[0], fill * (1.0 - mask) + image * mask)
    return image, mask, coarse, read, list(results)


def composite() -> None:
    image, mask, coarse, _, results = composites()
    check_close(results[1], coarse * (1.0 - mask) + image * mask)
    for result in results:
        assert torch.equal(
            result[(mask > 0.5).expand_as(result)], image[(mask > 0.5).expand_as(image)]
        )


def composite_once() -> None:
    image, mask, coarse, (x,), _ = composites()
    composited = coarse * (1.0 - mask) + image * mask
    # As the training form does it: once at the end of stage one, once more for stage two.
    again = composited * (1.0 - mask) + image * mask
    check_close(x, torch.cat([mask - 0.5, again, image * mask], dim=1))


# -- the table -------------------------------------------------------------------------------------

CHECKS: dict[str, tuple[Callable[[], None], ...]] = {
    "fold-gains": (linear, conv_same, conv_down, conv_up, conv_gain_without_bias),
    "align-channels": (aligned_channels,),
    "modulate-activations": (style_conv, to_rgb),
    "bound-styles": (large_styles, tiny_styles, vanishing_styles),
    "bound-weights": (scaled_weights,),
    "batch-styles": (style_bank,),
    "subpixel-upsampling": (subpixel,),
    "image-upsampling": (image_upsample,),
    "constant-filter": (blur,),
    "count-ratio": (partial_conv, partial_conv_of_nothing_but_hole),
    "merge-query-key": (query_key,),
    "fold-projection": (fused_block,),
    "constant-noise": (constant_noise,),
    "select-gate": (gate,),
    "select-composite": (composite,),
    "composite-once": (composite_once,),
}
"""What shows that a rewrite alone changes nothing."""


@pytest.mark.parametrize(
    ("rewrite", "check"),
    [
        pytest.param(rewrite, check, id=f"{rewrite}-{check.__name__}")
        for rewrite, checks in CHECKS.items()
        for check in checks
    ],
)
@torch.no_grad()
def test_a_rewrite_alone_gives_what_the_training_form_gives(
    rewrite: str, check: Callable[[], None]
) -> None:
    assert rewrite in REWRITES
    check()


def test_every_rewrite_is_shown_alone() -> None:
    assert list(CHECKS) == list(REWRITES)
    assert all(CHECKS.values())


def test_the_log_lists_every_rewrite_and_none_without_a_description() -> None:
    model = InferenceGenerator(Generator(SMALL), GraphSpec(SMALL))
    applied = {name for module in model.modules() for name in getattr(module, "rewrites", ())}
    counts = rewrite_counts(model)
    assert applied == set(REWRITES)
    assert list(counts) == list(REWRITES)
    assert all(counts.values())


def test_a_rewrite_that_was_not_applied_is_not_listed() -> None:
    model = InferenceGenerator(Generator(SMALL), GraphSpec(SMALL, noise="input"))
    assert set(REWRITES) - set(rewrite_counts(model)) == {"constant-noise"}


def test_a_layer_that_the_generator_lacks_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="1x1"):
        inference.Conv(layers.Conv(3, 5, 1, down=2))


def test_noise_as_input_scales_the_callers_maps_and_misses_them_by_name() -> None:
    layer = randomized(layers.StyleConv(6, 5, 4, noise_resolution=8))
    rewritten = inference.StyleConv(layer, "input")
    x, style, noise = torch.randn(2, 6, 8, 8), torch.randn(2, 4), torch.randn(2, 1, 8, 8)
    ((s, factor),) = inference.StyleBank([layer.conv])(style)
    check_close(rewritten(x, s, factor, noise), layer(x, style, noise))
    with pytest.raises(ValueError, match="noise as input"):
        rewritten(x, s, factor, None)


# -- all of them together --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator() -> Generator:
    """mat-tiny-256 with random biases and noise strengths."""
    return random_checkpoint(TINY, 3).build().requires_grad_(False)


Inputs = dict[str, Tensor]


def picture(kept: float, batch: int = 1, height: int = 256, width: int = 256) -> Inputs:
    """Image and mask, of which about a part `kept` is kept, in blocks of 16 pixels."""
    blocks = torch.rand(batch, 1, height // 16, width // 16) < kept
    mask = blocks.float().repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    return {"image": torch.rand(batch, 3, height, width) * 2.0 - 1.0, "mask": mask}


def randomness(
    seeds: list[int], height: int = 256, width: int = 256, noise: bool = False
) -> Inputs:
    arrays = draw(TINY, seeds, height, width, noise=noise)
    return {
        "truncation": torch.tensor([0.7]),
        **{k: torch.from_numpy(v) for k, v in arrays.items()},
    }


def in_order(spec: GraphSpec, inputs: Inputs) -> list[Tensor]:
    return [inputs[tensor.name] for tensor in spec.inputs]


@pytest.mark.parametrize("kept", [0.4, 0.0, 1.0], ids=["some", "nothing", "all"])
@torch.no_grad()
def test_the_whole_network_gives_what_the_training_form_gives(
    generator: Generator, kept: float
) -> None:
    spec = GraphSpec(TINY, batch=2, coarse=True)
    inputs = {**picture(kept, batch=2), **randomness([1, 2])}
    results = InferenceGenerator(generator, spec)(*in_order(spec, inputs))
    for result, reference in zip(results, generator(**inputs), strict=True):
        check_close(result, reference)


@torch.no_grad()
def test_noise_as_input_gives_what_the_training_form_gives_with_it(generator: Generator) -> None:
    spec = GraphSpec(TINY, noise="input")
    inputs = {**picture(0.6), **randomness([1], noise=True)}
    noise = {k: v for k, v in inputs.items() if k.startswith("noise")}
    (result,) = InferenceGenerator(generator, spec)(*in_order(spec, inputs))
    others = {k: v for k, v in inputs.items() if k not in noise}
    check_close(result, generator(**others, noise=noise)[0])


@torch.no_grad()
def test_another_size_gives_what_the_training_form_gives_there(generator: Generator) -> None:
    spec = GraphSpec(TINY, dynamic_size=True, noise="input", coarse=True)
    inputs = {**picture(0.6, height=256, width=512), **randomness([1], 256, 512, noise=True)}
    noise = {k: v for k, v in inputs.items() if k.startswith("noise")}
    results = InferenceGenerator(generator, spec)(*in_order(spec, inputs))
    others = {k: v for k, v in inputs.items() if k not in noise}
    for result, reference in zip(results, generator(**others, noise=noise), strict=True):
        check_close(result, reference)


@torch.no_grad()
def test_bytes_in_and_out_are_the_pixels_arithmetic_around_the_network(
    generator: Generator,
) -> None:
    spec = GraphSpec(TINY, io="uint8", coarse=True)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
    mask = rng.integers(0, 256, (1, 16, 16), dtype=np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    unit, keep = map(torch.from_numpy, to_unit(image, mask))
    inputs = randomness([5])
    reference = generator(unit, keep, **inputs)
    pixels = {"image": torch.from_numpy(image), "mask": torch.from_numpy(mask)}
    results = InferenceGenerator(generator, spec)(*in_order(spec, {**pixels, **inputs}))
    kept = mask >= 128
    for result, expected in zip(
        results, map(from_unit, (r.numpy() for r in reference)), strict=True
    ):
        assert result.dtype == torch.uint8
        assert result.shape == expected.shape
        difference = np.abs(result.numpy().astype(int) - expected)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3  # rounding of the last bit, here and there
        np.testing.assert_array_equal(result.numpy()[kept], image[kept])


@torch.no_grad()
def test_what_lies_under_the_hole_does_not_matter(generator: Generator) -> None:
    spec = GraphSpec(TINY)
    model = InferenceGenerator(generator, spec)
    inputs = {**picture(0.6), **randomness([1])}
    (expected,) = model(*in_order(spec, inputs))
    garbage = torch.tensor([float("nan"), float("inf"), 1e30])[:, None, None]
    inputs["image"] = torch.where(inputs["mask"] > 0.5, inputs["image"], garbage)
    (result,) = model(*in_order(spec, inputs))
    assert torch.equal(result, expected)


def test_the_inference_form_keeps_its_own_copy_of_the_weights() -> None:
    generator = Generator(SMALL)
    model = InferenceGenerator(generator, GraphSpec(SMALL))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in (*generator.parameters(), *generator.buffers()):
            value.add_(1.0)
    after = model.state_dict()
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(value.requires_grad for value in model.parameters())
