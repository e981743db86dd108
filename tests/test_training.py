"""A training step computes its equations; a run resumes to the bit and survives what befalls it."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import SMALL
from torch import Tensor, nn
from torch._inductor.exc import CppCompileError
from training_data import Loaders, batch_of, l1, options, seasoned_state

from mat_torch.checkpoint import load_checkpoint, random_checkpoint
from mat_torch.config import preset
from mat_torch.distributed import World
from mat_torch.layers import ModulatedConv, StyleConv, ToRGB
from mat_torch.training import picture_columns, train
from mat_torch.training_draws import Draws, draw_for_training
from mat_torch.training_graphs import Replayed
from mat_torch.training_log import Meter, RunLog, format_line, picture_grid
from mat_torch.training_options import (
    TRAINING_PRESETS,
    TrainingError,
    TrainingOptions,
    training_preset,
)
from mat_torch.training_state import (
    InitialWeights,
    TrainingState,
    export_ema,
    latest_checkpoint,
    load_state,
    prune_checkpoints,
    read_options,
    save_state,
)
from mat_torch.training_step import (
    StepReport,
    StyledGenerator,
    _too_large,
    prepare,
    train_step,
)

_CPU = torch.device("cpu")


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by path."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {k: v for key in values for k, v in _flat(values[key], f"{prefix}/{key}").items()}


def _differences(a: TrainingState, b: TrainingState) -> list[str]:
    """Where two states differ in any bit."""
    first, second = _flat(a.to_dict()), _flat(b.to_dict())
    assert first.keys() == second.keys()
    assert len(first) > 600
    return [
        name
        for name, value in first.items()
        if not (
            torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        )
    ]


def _copies(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def _changed(network: nn.Module, before: dict[str, Tensor]) -> set[str]:
    now = network.state_dict()
    return {name for name in before if not torch.equal(before[name], now[name])}


def _step(state: TrainingState, **arguments: Any) -> StepReport:
    images, batch = state.counters.images, state.options.batch
    numbers = list(range(images, images + batch))
    return train_step(state, prepare(state, World()), batch_of(numbers), **arguments)


def _gradients(state: TrainingState, **arguments: Any) -> dict[str, Tensor]:
    """A step's gradients by name, as the optimizers meet them."""
    found: dict[str, Tensor] = {}
    for network, optimizer in (
        (state.generator, state.generator_adam),
        (state.discriminator, state.discriminator_adam),
    ):

        def note(*_: Any, network: nn.Module = network) -> None:
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None, name
                found[f"{type(network).__name__}.{name}"] = parameter.grad.clone()

        optimizer.register_step_pre_hook(note)
    report = _step(state, **arguments)
    assert not report.skipped
    return found


# -- options ---------------------------------------------------------------------------------------


def test_the_defaults_are_the_published_values() -> None:
    published = training_preset("published")
    assert published.config == preset("mat-512")
    assert (published.learning_rate, published.betas, published.eps) == (1e-3, (0.0, 0.99), 1e-8)
    assert (published.batch, published.images) == (32, 50_000_000)
    assert (published.ema_half_life, published.ema_ramp_up) == (10_000, None)
    assert (published.r1_gamma, published.r1_interval) == (10, 16)
    assert (published.style_mixing, published.truncation) == (0.5, 0.5)
    assert (published.w_avg_decay, published.perceptual_weight) == (0.995, 0.1)
    assert training_preset("small").config == preset("mat-tiny-256")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch is a whole number from 1 to 1048576, got 0"),
        ({"batch": 6}, "a batch of 6 does not divide"),
        ({"batch": 16, "accumulate": 8}, "8 micro-batches each.*try a batch of 32"),
        ({"batch": True}, "batch is a whole number"),
        ({"style_mixing": 1.5}, "style_mixing is a number from 0 to 1, got 1.5"),
        ({"learning_rate": float("nan")}, "learning_rate is a number"),
        ({"betas": (0.0, 1.0)}, "betas are in"),
        ({"betas": 0.9}, "betas is a pair"),
        ({"warm_up": 8, "perceptual_weight": 0.0}, "a warm-up of 8 images has nothing to learn"),
        ({"config": "mat-512"}, "config is a GeneratorConfig, got str"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        options(**changes)


def test_options_survive_a_file_and_an_unknown_preset_lists_the_known() -> None:
    for settings in (*TRAINING_PRESETS.values(), options(ema_ramp_up=0.05)):
        text = json.dumps(settings.to_dict())
        assert TrainingOptions.from_dict(json.loads(text)) == settings
    with pytest.raises(TrainingError, match="no options of a training run"):
        TrainingOptions.from_dict({"config": "{}"})
    with pytest.raises(TrainingError, match="known: published, small"):
        training_preset("large")


# -- draws -----------------------------------------------------------------------------------------


def _draws(numbers: list[int], purpose: str = "generator", seed: int = 0) -> Draws:
    return draw_for_training(SMALL, seed, purpose, numbers, style_mixing=0.5, device=_CPU)


def _tensors(draws: Draws) -> dict[str, Tensor]:
    return {
        f.name: getattr(draws, f.name) for f in fields(draws) if f.name != "noise"
    } | draws.noise


def test_a_samples_draws_depend_on_its_number_purpose_and_seed_alone() -> None:
    together, alone = _tensors(_draws([3, 4, 5])), _tensors(_draws([4]))
    for name, values in together.items():
        assert torch.equal(values[1:2], alone[name]), name
    for other in (_draws([5]), _draws([4], "discriminator"), _draws([4], seed=1)):
        for name, values in _tensors(other).items():
            assert name == "cutoff" or not torch.equal(values, alone[name]), name


def test_draws_have_the_shapes_and_distributions_that_training_means() -> None:
    draws = _draws(list(range(400)))
    assert draws.z.shape == (400, 2, SMALL.latent_dim)
    assert abs(float(draws.z.mean())) < 0.1
    assert float(draws.z.std()) == pytest.approx(1.0, abs=0.05)
    for gate, shape in ((draws.gate_tokens, (256, 4)), (draws.gate_bottleneck, (4, 16, 16))):
        assert gate.shape == (400, *shape)
        assert set(gate.flatten().tolist()) == {0.0, 1.0}
        assert float(gate.mean()) == pytest.approx(0.5, abs=0.01)
    assert {name: tuple(t.shape[1:]) for name, t in draws.noise.items()} == {
        name: (1, r, r) for name, r in SMALL.noise_resolutions.items()
    }
    # Half of the images mix, at any layer but the first.
    mixed = draws.cutoff[draws.cutoff < SMALL.num_ws]
    assert 160 <= len(mixed) <= 240
    assert set(mixed.tolist()) == set(range(1, SMALL.num_ws))


def test_latents_mix_at_the_cutoff_and_are_truncated_towards_the_average() -> None:
    generator = random_checkpoint(SMALL, 0).build()
    seen: list[Tensor] = []
    generator.synthesis.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[2]))
    draws = _draws([0, 1])
    cutoff = torch.tensor([3, SMALL.num_ws])
    batch = batch_of([0, 1])
    with torch.no_grad():
        *_, w = StyledGenerator(generator, 0.5)(
            batch["image"].float(),
            batch["mask"].float(),
            draws.z,
            cutoff,
            draws.gate_tokens,
            draws.gate_bottleneck,
            draws.noise,
        )
        first, second = generator.mapping(draws.z[:, 0]), generator.mapping(draws.z[:, 1])
    torch.testing.assert_close(w, first)
    average = generator.mapping.w_avg
    for image in (0, 1):
        for layer in range(SMALL.num_ws):
            w = first[image] if layer < cutoff[image] else second[image]
            torch.testing.assert_close(seen[0][image, layer], average + 0.5 * (w - average))


# -- the generator in training ---------------------------------------------------------------------


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize(("kernel", "up"), [(3, 1), (3, 2), (1, 1)])
def test_scaling_activations_is_modulating_weights(kernel: int, up: int, demodulate: bool) -> None:
    source = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        layer = ModulatedConv(5, 7, kernel, 6, up=up, demodulate=demodulate).double()
    x = torch.randn(3, 5, 8, 8, generator=source, dtype=torch.float64)
    style = torch.randn(3, 6, generator=source, dtype=torch.float64)
    expected = layer(x, style)
    layer.scale_activations = True
    torch.testing.assert_close(layer(x, style), expected, rtol=1e-10, atol=1e-12)


def _inputs(numbers: list[int]) -> tuple[Any, ...]:
    draws, batch = _draws(numbers), batch_of(numbers)
    gates = draws.gate_tokens.bfloat16(), draws.gate_bottleneck.bfloat16()
    image = batch["image"].float() / 127.5 - 1.0
    return image, batch["mask"].float(), draws.z, draws.cutoff, *gates, draws.noise


def test_under_autocast_features_are_16_bits_and_pictures_and_styles_are_not() -> None:
    state = seasoned_state(options(bf16=True))
    kinds: dict[type, set[torch.dtype]] = {StyleConv: set(), ToRGB: set()}
    for module in state.generator.modules():
        if type(module) in kinds:
            module.register_forward_hook(lambda m, _a, y: kinds[type(m)].add(y.dtype))
    network, inputs = StyledGenerator(state.generator, 0.5), _inputs([0, 1])
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            output, coarse, w = network(*inputs)
        assert kinds == {StyleConv: {torch.bfloat16}, ToRGB: {torch.float32}}
        exact, exact_coarse, exact_w = network(*(x.float() for x in inputs[:3]), *inputs[3:])
    assert output.dtype == torch.float32
    kept = inputs[1].bool().expand(-1, 3, -1, -1)
    assert torch.equal(output[kept], inputs[0][kept])
    assert torch.equal(w, exact_w)  # the mapping network is float32 throughout
    for value, reference in ((output, exact), (coarse, exact_coarse)):
        error = (value - reference)[~kept].norm() / reference[~kept].norm()
        assert 0.0 < float(error) < 0.05


def test_a_style_too_large_for_the_sum_of_its_squares_in_16_bits_is_demodulated() -> None:
    """Norms are float32 sums: in bfloat16 the small weights beside the large vanish."""
    with torch.random.fork_rng(devices=[]):
        layer = ModulatedConv(64, 8, 3, 4)
    layer.scale_activations = True
    x = torch.ones(1, 64, 8, 8)
    for scale in (1e-3, 1.0, 1e6):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = layer(x, torch.full((1, 4), scale))
        with torch.no_grad():
            expected = layer(x, torch.full((1, 4), scale))
        assert y.dtype == torch.bfloat16
        assert float((y - expected).norm() / expected.norm()) < 0.02


def test_torch_compile_takes_the_training_networks_as_one_graph_each() -> None:
    torch.compiler.reset()
    state = seasoned_state(options(bf16=True))
    graphs: list[Any] = []

    def note(graph: Any, _inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        forward: Callable[..., Any] = graph.forward
        return forward

    network, inputs = StyledGenerator(state.generator, 0.5), _inputs([0, 1, 2, 3])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output, coarse, _ = torch.compile(network, fullgraph=True, backend=note)(*inputs)
        # Other arithmetic in the filters: apart by rounding to bfloat16.
        _assert_near(output, network(*inputs)[0], 0.02)
        critic = torch.compile(state.discriminator, fullgraph=True, backend=note)
        logits = critic(output, coarse, inputs[1])
        _assert_near(logits[0], state.discriminator(output, coarse, inputs[1])[0], 0.02)
    assert len(graphs) == 2
    torch.compiler.reset()


def _assert_near(value: Tensor, expected: Tensor, relative: float) -> None:
    assert (value - expected).norm() < relative * expected.norm()


def test_a_compiled_step_has_the_gradients_of_an_eager_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """R1, which differentiates twice, goes past the compiler, which cannot."""
    torch.compiler.reset()
    expected = _gradients(seasoned_state(options()))
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda network, **_: compiler(network, backend="aot_eager")
    )
    found = _gradients(seasoned_state(options(compile=True)))
    torch.compiler.reset()
    for kind in ("Generator", "Discriminator"):
        mine = {name: g for name, g in expected.items() if name.startswith(kind)}
        _assert_same(mine, found, 1e-4)


def test_replayed_steps_are_the_same_steps() -> None:
    """A CUDA graph is a function run again on the memory of its first inputs: so is this."""

    def record(run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run

    settings = options(r1_interval=2, perceptual_weight=0.1, warm_up=4)
    states = [seasoned_state(settings) for _ in range(2)]
    plain, replayed = (prepare(state, World(device=state.device)) for state in states)
    recorded = {
        name: Replayed(states[1].generator.parameters(), record)
        for name in ("perceptual", "loss_generator+perceptual")
    }
    for name in ("loss_discriminator", "loss_discriminator+r1"):
        recorded[name] = Replayed(states[1].discriminator.parameters(), record)
    replayed = replace(replayed, replayed=recorded)
    for first in (0, 4, 8, 12, 16):
        batch = batch_of([*range(first, first + 4)])
        one, other = (
            train_step(state, networks, batch, perceptual=l1)
            for state, networks in zip(states, (plain, replayed), strict=True)
        )
        assert one == other
    for mine, its in zip(states[0].ema.parameters(), states[1].ema.parameters(), strict=True):
        assert torch.equal(mine, its)


# -- a step ----------------------------------------------------------------------------------------


def test_a_step_updates_every_parameter_and_leaves_the_callers_randomness_alone() -> None:
    state = seasoned_state(options())
    before = [_copies(n) for n in (state.generator, state.discriminator, state.ema)]
    randomness = torch.random.get_rng_state()
    report = _step(state)
    assert torch.equal(torch.random.get_rng_state(), randomness)
    assert not report.skipped
    assert report.scalars.keys() == {
        *("loss_generator", "gradient_generator"),
        *("loss_discriminator", "gradient_discriminator", "r1"),
    }
    assert all(np.isfinite(value) and value > 0.0 for value in report.scalars.values())
    for network, copies in zip((state.generator, state.discriminator), before, strict=False):
        still = copies.keys() - _changed(network, copies)
        assert all(name.endswith("noise_const") for name in still), still
    assert "mapping.w_avg" in _changed(state.ema, before[2])
    assert (state.counters.images, state.counters.steps, state.counters.skipped) == (4, 1, 0)
    for network in (state.generator, state.discriminator):
        assert all(parameter.grad is None for parameter in network.parameters())


def test_warming_up_leaves_the_discriminator_alone_until_its_images_are_through() -> None:
    state = seasoned_state(
        options(warm_up=8, perceptual_weight=0.5, reconstruction_weight=2.0, r1_interval=1)
    )
    generator, discriminator = _copies(state.generator), _copies(state.discriminator)
    for _ in range(2):
        report = _step(state, perceptual=l1)
        assert report.scalars.keys() == {"perceptual", "reconstruction", "gradient_generator"}
        assert not report.skipped
    assert {"mapping.w_avg", "synthesis.to_square.weight"} <= _changed(state.generator, generator)
    assert not _changed(state.discriminator, discriminator)
    report = _step(state, perceptual=l1)
    assert {"loss_generator", "loss_discriminator", "r1"} <= report.scalars.keys()
    assert _changed(state.discriminator, discriminator) == discriminator.keys()
    assert (state.counters.images, state.counters.steps) == (12, 3)


def test_gradients_are_cut_to_their_limit_before_adam_sees_them() -> None:
    limit = 1e-4
    free, cut = (seasoned_state(options(gradient_limit=value)) for value in (None, limit))
    for state in (free, cut):
        _step(state)
    # After one step from zero moments: v = (1 - β₂)·g².
    moments = [
        torch.cat(
            [values["exp_avg_sq"].flatten() for values in state.generator_adam.state.values()]
        )
        for state in (free, cut)
    ]
    first = 0.01 * limit**2
    assert moments[0].max() > 10 * first
    torch.testing.assert_close(moments[1], moments[0].clamp(max=first))


def test_the_generators_step_computes_no_gradients_of_the_discriminator() -> None:
    state = seasoned_state(options(perceptual_weight=0.1))
    seen: list[bool] = []

    def look(output: Tensor, image: Tensor) -> Tensor:
        seen.extend(p.requires_grad for p in state.discriminator.parameters())
        return l1(output, image)

    _step(state, perceptual=look)
    assert seen
    assert not any(seen)


def test_the_gradients_are_those_of_the_losses() -> None:
    """Against the equations written out: float32, no mixing, the gradients of autograd alone."""
    settings = options(
        perceptual_weight=0.5, reconstruction_weight=2.0, style_mixing=0.0, r1_interval=3
    )
    state, other = seasoned_state(settings), seasoned_state(settings)
    found = _gradients(state, perceptual=l1)
    batch = batch_of([0, 1, 2, 3])
    image, mask = batch["image"].float() / 127.5 - 1.0, batch["mask"].float()

    softplus: Any = torch.nn.functional.softplus

    def pictures(network: Any, purpose: str) -> Any:
        d = _draws([0, 1, 2, 3], purpose)
        gates = d.gate_tokens, d.gate_bottleneck
        return network(image, mask, d.z[:, 0], 0.5, *gates, d.noise)

    output, coarse = pictures(other.generator, "generator")
    logits = other.discriminator(output, coarse, mask)
    loss: Any = sum(softplus(-x).mean() for x in logits) + 0.5 * l1(output, image)
    loss = loss + 2.0 * ((output - image).abs().mean() + (coarse - image).abs().mean())
    loss.backward()
    # The discriminator's fakes come from the updated generator.
    output, coarse = (x.detach() for x in pictures(state.generator, "discriminator"))
    real, real_coarse = image.clone().requires_grad_(), image.clone().requires_grad_()
    fakes = other.discriminator(output, coarse, mask)
    photographs = other.discriminator(real, real_coarse, mask)
    loss = sum(softplus(x).mean() for x in (*fakes, *(-y for y in photographs)))
    slopes = torch.autograd.grad(
        sum(x.sum() for x in photographs), (real, real_coarse), create_graph=True
    )
    r1 = sum(slope.square().sum(dim=(1, 2, 3)).mean() for slope in slopes)
    other.discriminator.zero_grad()
    (loss + 3 * 10.0 / 2.0 * r1).backward()
    for network in (other.generator, other.discriminator):
        _assert_same(
            {
                f"{type(network).__name__}.{name}": parameter.grad
                for name, parameter in network.named_parameters()
            },
            found,
            1e-4 if network is other.discriminator else 1e-5,
        )


def _assert_same(expected: dict[str, Any], found: dict[str, Tensor], bar: float) -> None:
    """Relative to each network's whole gradient, and to each tensor's own a little less strictly.

    But for key biases, whose gradient is rounding alone: softmax does not see them.
    """
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert float(error / whole) <= bar, name
        if not name.endswith("attn.k.bias"):
            assert float(error / gradient.norm().clamp(min=1e-3 * whole)) <= 20.0 * bar, name


def test_r1_joins_every_so_many_steps_and_not_without_a_weight() -> None:
    state = seasoned_state(options(r1_interval=2))
    assert ["r1" in _step(state).scalars for _ in range(3)] == [True, False, True]
    assert "r1" not in _step(seasoned_state(options(r1_gamma=0.0))).scalars


def test_micro_batches_give_the_gradients_of_the_whole_batch() -> None:
    whole, parts = (seasoned_state(options(batch=8, accumulate=n)) for n in (1, 2))
    expected, found = _gradients(whole), _gradients(parts)
    for kind in ("Generator", "Discriminator"):
        mine = {name: g for name, g in expected.items() if name.startswith(kind)}
        _assert_same(mine, found, 1e-5)
    torch.testing.assert_close(
        parts.generator.mapping.w_avg, whole.generator.mapping.w_avg, rtol=1e-5, atol=1e-7
    )


def test_bfloat16_trains_and_keeps_float32_weights() -> None:
    state = seasoned_state(options(bf16=True))
    reports = [_step(state) for _ in range(2)]
    assert not any(report.skipped for report in reports)
    assert all(p.dtype == torch.float32 for p in state.generator.parameters())


def test_the_average_w_follows_the_batch_mean() -> None:
    state = seasoned_state(options(w_avg_decay=0.9))
    before = state.generator.mapping.w_avg.clone()
    with torch.no_grad():
        w = state.generator.mapping(_draws([0, 1, 2, 3]).z[:, 0])
    _step(state)
    expected = 0.9 * before + 0.1 * w.mean(dim=0)
    torch.testing.assert_close(state.generator.mapping.w_avg, expected)


@pytest.mark.parametrize(
    ("half_life", "ramp_up", "images", "decay"),
    [(4.0, None, 4, 0.5), (8.0, None, 400, 0.5**0.5), (4.0, 0.25, 8, 0.25), (4.0, 1.0, 100, 0.5)],
)
def test_the_average_generator_forgets_half_in_a_half_life(
    half_life: float, ramp_up: float | None, images: int, decay: float
) -> None:
    state = seasoned_state(options(ema_half_life=half_life, ema_ramp_up=ramp_up))
    before = _copies(state.ema)
    with torch.no_grad():
        for tensor in state.generator.state_dict().values():
            tensor.add_(1.0)
    state.track_ema(images)
    buffers = {name for name, _ in state.ema.named_buffers()}
    for name, tensor in state.ema.state_dict().items():
        share = 1.0 if name in buffers else 1.0 - decay
        torch.testing.assert_close(tensor, before[name] + share, rtol=1e-5, atol=1e-5)


# -- what goes wrong in a step ---------------------------------------------------------------------


def _nan(output: Tensor, _image: Tensor) -> Tensor:
    return output.sum() * float("nan")


def test_a_step_that_is_not_finite_changes_no_weight_and_is_counted() -> None:
    state = seasoned_state(options(perceptual_weight=0.1))
    before = [_copies(n) for n in (state.generator, state.discriminator, state.ema)]
    report = _step(state, perceptual=_nan)
    assert report.skipped
    for network, copies in zip(
        (state.generator, state.discriminator, state.ema), before, strict=True
    ):
        assert not _changed(network, copies)
    assert not state.generator_adam.state_dict()["state"]
    counters = state.counters
    assert (counters.images, counters.skipped, counters.skipped_in_row) == (4, 1, 1)
    assert not _step(state, perceptual=l1).skipped
    assert (counters.skipped, counters.skipped_in_row) == (1, 0)


def test_a_discriminator_whose_gradient_is_not_finite_is_left_as_it_was() -> None:
    state = seasoned_state(options())
    before = _copies(state.discriminator)
    parameter = state.discriminator.fc1.bias
    hook: Any = parameter.register_hook  # torch has no types for it
    handle = hook(lambda gradient: gradient * float("inf"))
    assert _step(state).skipped
    handle.remove()
    assert not _changed(state.discriminator, before)


def test_training_stops_after_so_many_skipped_steps_in_a_row(tmp_path: Path) -> None:
    settings = options(perceptual_weight=0.1, max_skipped=2, images=400)
    with pytest.raises(TrainingError, match=r"2 steps in a row .* after 8 images; resume from an"):
        train(settings, Loaders(), tmp_path, make_perceptual=lambda _device: _nan)


@pytest.mark.parametrize(
    ("batch", "advice"),
    [(4, "try batch=2"), (8, r"try accumulate=2 \(the same result\) or batch=4")],
)
def test_too_little_memory_is_a_sentence_with_the_batch_to_try(batch: int, advice: str) -> None:
    def full(_output: Tensor, _image: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    state = seasoned_state(options(batch=batch, perceptual_weight=0.1))
    with pytest.raises(TrainingError, match=f"out of memory with {batch} images at once; {advice}"):
        _step(state, perceptual=full)


@pytest.mark.parametrize(
    ("batch", "accumulate"), [(1, 1), (4, 1), (8, 1), (12, 1), (16, 1), (16, 4), (32, 8), (48, 4)]
)
def test_what_is_advised_can_be_set_and_is_smaller(batch: int, accumulate: int) -> None:
    state = seasoned_state(options())
    state.options = replace(state.options, batch=batch, accumulate=accumulate)
    size = state.options.micro_batch(1)
    advice = re.findall(r"(batch|accumulate)=(\d+)", str(_too_large(state, World())))
    assert advice or size <= 4
    for name, value in advice:
        changed = {"batch": batch, "accumulate": accumulate, name: int(value)}
        tried = replace(state.options, batch=changed["batch"], accumulate=changed["accumulate"])
        assert tried.micro_batch(1) < size


def test_too_little_memory_before_the_first_step_is_a_sentence(tmp_path: Path) -> None:
    def full(_device: torch.device) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(TrainingError, match="cpu has no memory for the networks"):
        train(options(perceptual_weight=0.1), Loaders(), tmp_path, make_perceptual=full)


def test_a_compiler_that_fails_is_a_sentence_with_the_way_round_it() -> None:
    def fails(_output: Tensor, _image: Tensor) -> Tensor:
        raise CppCompileError(["g++", "kernel.cpp"], "g++: not found\nmore")

    state = seasoned_state(options(perceptual_weight=0.1))
    with pytest.raises(TrainingError, match=r"^torch.compile failed \(.*\); --set compile=false"):
        _step(state, perceptual=fails)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {**b, "number": b["number"] + 4}, r"samples 4, 5, 6 … 7 where .* 0, 1, 2 … 3"),
        (lambda b: {**b, "image": b["image"][:2]}, r"'image' is \[2, 3, 128, 128\]; this run"),
        (lambda b: {"image": b["image"], "number": b["number"]}, "'mask' is none"),
    ],
)
def test_data_of_another_step_or_shape_is_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    state = seasoned_state(options())
    with pytest.raises(TrainingError, match=message):
        train_step(state, prepare(state, World()), change(batch_of([0, 1, 2, 3])))


# -- a run -----------------------------------------------------------------------------------------

_RUN = options(
    images=16,
    r1_interval=2,
    checkpoint_every=8,
    log_every=4,
    grid_every=8,
    grid_images=2,
    keep_last=5,
)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingState, Path, list[str]]:
    """A run of four steps without a cut; never write to it."""
    folder, told = tmp_path_factory.mktemp("whole"), list[str]()
    return train(_RUN, Loaders(), folder, report=told.append), folder, told


def test_a_run_leaves_checkpoints_a_log_and_pictures(
    whole_run: tuple[TrainingState, Path, list[str]],
) -> None:
    state, folder, told = whole_run
    assert state.counters.images == 16
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "checkpoint-000000000008.pt",
        "checkpoint-000000000016.pt",
    ]
    lines = _lines(folder)
    assert [line["images"] for line in lines] == [4, 8, 12, 16]
    assert [("r1" in line) for line in lines] == [True, False, True, False]
    assert all(line["images_per_second"] > 0 <= line["waiting_share"] <= 1 for line in lines)
    assert lines[-1]["seconds_left"] == 0
    assert len(told) == 4
    assert "8 of 16 images" in told[1]
    grids = sorted(path.name for path in (folder / "grids").iterdir())
    assert grids == ["000000000008.png", "000000000016.png"]
    assert Image.open(folder / "grids" / grids[0]).size == (4 * 132 - 4, 2 * 132 - 4)


@pytest.mark.parametrize("with_discriminator", [True, False])
def test_a_run_begins_with_given_weights(with_discriminator: bool) -> None:
    given = random_checkpoint(SMALL, 3)
    other = TrainingState.start(options(seed=9)).discriminator.state_dict()
    initial = InitialWeights(given, other if with_discriminator else None)
    state, random = TrainingState.start(_RUN), TrainingState.start(_RUN)
    state.begin_with(initial)
    for network in (state.generator, state.ema):
        assert all(torch.equal(network.state_dict()[n], t) for n, t in given.tensors.items())
    expected = other if with_discriminator else random.discriminator.state_dict()
    assert all(torch.equal(state.discriminator.state_dict()[n], t) for n, t in expected.items())
    # What is given stays as it is.
    before = {name: tensor.clone() for name, tensor in given.tensors.items()}
    _step(state)
    assert all(torch.equal(given.tensors[name], tensor) for name, tensor in before.items())
    with pytest.raises(TrainingError, match="before its first step"):
        state.begin_with(initial)


def test_a_resumed_run_goes_on_with_its_own_weights(
    whole_run: tuple[TrainingState, Path, list[str]], tmp_path: Path
) -> None:
    initial = InitialWeights(random_checkpoint(SMALL, 3))
    expected = train(replace(_RUN, images=8), Loaders(), tmp_path / "whole", initial=initial)
    assert "/generator/mapping.fc0.weight" in _differences(expected, whole_run[0])
    train(replace(_RUN, images=4), Loaders(), tmp_path / "cut", initial=initial)
    resumed = train(
        replace(_RUN, images=8), Loaders(), tmp_path / "cut", initial=initial, resume=True
    )
    assert _differences(resumed, expected) == []


def test_a_run_cut_before_its_first_checkpoint_resumes_from_what_it_began_with(
    tmp_path: Path,
) -> None:
    initial = InitialWeights(random_checkpoint(SMALL, 3))
    expected = train(replace(_RUN, images=4), Loaders(), tmp_path, initial=initial)
    (tmp_path / "checkpoints" / "checkpoint-000000000004.pt").unlink()
    resumed = train(replace(_RUN, images=4), Loaders(), tmp_path, resume=True)
    assert _differences(resumed, expected) == []
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    found, origin = read_options(newest)
    assert found == replace(_RUN, images=4)
    assert origin is not None
    assert initial.generator.digest in origin


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    run = replace(_RUN, images=4)
    train(run, Loaders(), tmp_path, surroundings={"masks": "large", "share": (0.25, 1.0)})
    with pytest.raises(TrainingError, match="masks was 'large' and is now 'small'; resume with"):
        train(run, Loaders(), tmp_path, surroundings={"masks": "small"}, resume=True)
    again = {"masks": "large", "share": (0.25, 1.0)}
    assert train(run, Loaders(), tmp_path, surroundings=again, resume=True).surroundings == again


def test_weights_of_another_network_start_nothing(tmp_path: Path) -> None:
    initial = InitialWeights(random_checkpoint(preset("mat-tiny-256"), 0))
    with pytest.raises(TrainingError, match="is of mat-tiny-256, and the run is of test-128"):
        train(_RUN, Loaders(), tmp_path / "run", initial=initial)
    assert not (tmp_path / "run").exists()


def test_a_line_for_people_has_the_losses_that_there_are() -> None:
    line = {"images": 8, "skipped": 0, "perceptual": 0.5, "reconstruction": 0.25}
    line |= {"images_per_second": 2.0, "seconds_left": 60.0, "waiting_share": 0.0}
    assert format_line(line, 128).startswith("8 of 128 images · perceptual 0.500 L1 0.250 · 2.0")


def test_a_run_that_was_cut_and_resumed_has_the_bits_of_an_uncut_one(
    whole_run: tuple[TrainingState, Path, list[str]], tmp_path: Path
) -> None:
    expected, folder, _ = whole_run
    first = train(replace(_RUN, images=8), Loaders(), tmp_path)
    assert _differences(first, expected)
    # As if killed in the middle of a later step: what was logged since is cut off again.
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "images": 12}\n{"step": 4, "ima')
    # Loaders and processes of the second half start afresh.
    resumed = train(_RUN, Loaders(), tmp_path, resume=True)
    assert [n for n in _differences(resumed, expected) if n != "/options/images"] == []
    timing = ("images_per_second", "seconds_left", "waiting_share")
    cut, uncut = (
        [{k: v for k, v in line.items() if k not in timing} for line in _lines(where)]
        for where in (tmp_path, folder)
    )
    assert cut == uncut
    for name in ("000000000008.png", "000000000016.png"):
        assert (tmp_path / "grids" / name).read_bytes() == (folder / "grids" / name).read_bytes()


def test_a_folder_that_holds_a_run_is_not_begun_anew(
    whole_run: tuple[TrainingState, Path, list[str]],
) -> None:
    with pytest.raises(TrainingError, match=r"already holds a run \(checkpoint-0+16.pt\); resume"):
        train(_RUN, Loaders(), whole_run[1])


class _Interrupting(Loaders):
    """Sends a signal as the third batch is asked for; its workers may die of it, too."""

    def __init__(self, number: signal.Signals, fail: bool) -> None:
        super().__init__()
        self.number, self.fail = number, fail

    def __call__(self, start: int, rank: int, world: int) -> Iterator[Any]:
        for i, batch in enumerate(super().__call__(start, rank, world)):
            if i == 2:
                os.kill(os.getpid(), self.number)
                if self.fail:
                    raise RuntimeError("DataLoader worker exited unexpectedly")
            yield batch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("fail", [False, True])
def test_an_interruption_saves_and_returns(
    number: signal.Signals, fail: bool, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    settings = replace(_RUN, images=400, grid_every=0, checkpoint_every=400)
    state = train(settings, _Interrupting(number, fail), tmp_path)
    assert signal.getsignal(number) is before
    assert state.counters.images == 8
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == "checkpoint-000000000008.pt"


def test_a_loader_that_fails_by_itself_is_not_taken_for_an_interruption(tmp_path: Path) -> None:
    def broken(_start: int, _rank: int, _world: int) -> Iterator[Any]:
        raise RuntimeError("DataLoader worker exited unexpectedly")
        yield

    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        train(replace(_RUN, grid_every=0), broken, tmp_path)
    with pytest.raises(TrainingError, match="the data ended after 0 images"):
        train(replace(_RUN, grid_every=0), lambda *_: iter(()), tmp_path)


def test_a_perceptual_weight_without_a_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"perceptual_weight is 0\.1 and no perceptual loss"):
        train(options(perceptual_weight=0.1), Loaders(), tmp_path)


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[TrainingState, Path]:
    state = seasoned_state(options())
    _step(state)
    return state, save_state(state, tmp_path / "checkpoints")


def test_a_checkpoint_gives_the_state_back_to_the_bit(
    saved: tuple[TrainingState, Path],
) -> None:
    state, path = saved
    other = TrainingState.start(state.options)
    assert _differences_of_networks(other, state)
    load_state(other, path)
    assert _differences(other, state) == []


def _differences_of_networks(a: TrainingState, b: TrainingState) -> set[str]:
    return _changed(a.generator, _copies(b.generator))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 2e-3}, "learning_rate was 0.001 and is now 0.002; resume with its own"),
        ({"seed": 1, "betas": (0.5, 0.99)}, r"seed was 0 .*; betas was \[0.0, 0.99\]"),
        ({"config": preset("mat-tiny-256")}, "name was 'test-128' and is now 'mat-tiny-256'"),
        ({"batch": 8}, "batch was 4 and is now 8"),
    ],
)
def test_resuming_with_another_recipe_names_the_difference(
    changes: dict[str, Any], message: str, saved: tuple[TrainingState, Path]
) -> None:
    state = seasoned_state(options())
    state.options = options(**changes)
    before = _copies(state.generator)
    with pytest.raises(TrainingError, match=message):
        load_state(state, saved[1])
    assert not _changed(state.generator, before)


def test_resuming_may_change_what_leaves_the_weights_alone(
    saved: tuple[TrainingState, Path],
) -> None:
    state = TrainingState.start(options(images=10**6, log_every=7, keep_last=1, tf32=False))
    load_state(state, saved[1])
    assert state.counters.images == 4
    assert state.options.images == 10**6


def test_damaged_missing_and_foreign_checkpoints_are_sentences(
    saved: tuple[TrainingState, Path], tmp_path: Path
) -> None:
    state, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(TrainingError, match=r"damaged or no checkpoint.*resumes from the one bef"):
        load_state(state, path)
    with pytest.raises(TrainingError, match="there is no such checkpoint"):
        load_state(state, tmp_path / "nothing.pt")
    foreign = tmp_path / "foreign.pt"
    contents: tuple[Any, ...] = ({"state_dict": {}}, [1, 2])
    for values in contents:
        torch.save(values, foreign)
        with pytest.raises(TrainingError, match="no checkpoint"):
            load_state(state, foreign)


def test_a_full_disk_keeps_the_old_checkpoint(saved: tuple[TrainingState, Path]) -> None:
    state, path = saved
    content = path.read_bytes()
    _step(state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, hard))
    try:
        with pytest.raises(TrainingError, match=f"cannot be written .*{path.name} is kept; make"):
            save_state(state, path.parent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == content


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    def names() -> list[int]:
        return sorted(int(path.stem.split("-")[1]) for path in tmp_path.glob("checkpoint-*.pt"))

    other = tmp_path / "notes.txt"
    other.touch()
    for images in range(30, 331, 30):
        (tmp_path / f"checkpoint-{images:012}.pt").touch()
        prune_checkpoints(tmp_path, keep_last=2, keep_every=100)
    assert names() == [120, 210, 300, 330]
    deleted = prune_checkpoints(tmp_path, keep_last=1, keep_every=0)
    assert len(deleted) == 3
    assert names() == [330]
    assert other.exists()


@pytest.mark.parametrize("half", [True, False])
def test_the_average_generator_is_exported_for_load_checkpoint(half: bool, tmp_path: Path) -> None:
    state = seasoned_state(options())
    path = tmp_path / "ema.safetensors"
    export_ema(state, path, half=half)
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == SMALL
    for name, tensor in state.ema.state_dict().items():
        assert torch.equal(checkpoint.tensors[name], tensor.half().float() if half else tensor)


def test_an_average_that_float16_cannot_hold_is_not_exported(tmp_path: Path) -> None:
    state = seasoned_state(options())
    with torch.no_grad():
        state.ema.mapping.w_avg.fill_(1e5)
    with pytest.raises(TrainingError, match="exceeds float16"):
        export_ema(state, tmp_path / "ema.safetensors")
    assert list(tmp_path.iterdir()) == []


# -- logs and pictures -----------------------------------------------------------------------------


def test_a_resumed_log_begins_with_the_lines_up_to_its_step(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write({"step": step, "images": 4 * step, "loss": 0.5})
    RunLog(tmp_path, step=2, images=8).write({"step": 3, "images": 12, "loss": 0.25})
    assert [(line["step"], line["loss"]) for line in _lines(tmp_path)] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.25),
    ]


def test_the_meter_gives_means_speed_and_waiting() -> None:
    now = [0.0]
    meter = Meter(lambda: now[0])
    meter.add({"loss": 1.0, "r1": 5.0}, images=32, waited=1.0)
    meter.add({"loss": 3.0}, images=32, waited=0.0)
    now[0] = 4.0
    assert meter.line(images_left=160) == {
        "loss": 2.0,
        "r1": 5.0,
        "images_per_second": 16.0,
        "seconds_left": 10.0,
        "waiting_share": 0.25,
    }
    now[0] = 5.0
    assert meter.line(images_left=160)["images_per_second"] == 0.0


def test_a_grid_shows_input_coarse_output_and_original() -> None:
    state, batch = seasoned_state(options()), batch_of([0, 1])
    columns = picture_columns(state, batch)
    image, mask = batch["image"].float() / 127.5 - 1.0, batch["mask"].float()
    assert torch.equal(columns[0], image * mask)
    assert torch.equal(columns[3], image)
    for filled in columns[1:3]:
        assert torch.equal(filled * mask, image * mask)
        assert not torch.equal(filled, image)
    assert not torch.equal(columns[1], columns[2])
    sheet = picture_grid(columns)
    assert sheet.shape == (2 * 132 - 4, 4 * 132 - 4, 3)
    np.testing.assert_array_equal(sheet[132:, 3 * 132 :], batch["image"][1].permute(1, 2, 0))


def test_tensorboard_is_written_where_asked(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path, tensorboard=True)
    log.write({"step": 1, "images": 4, "loss": 0.5})
    log.grid(np.zeros((8, 8, 3), np.uint8), 4)
    log.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(4, 0.5)]
    assert events.Tags()["images"] == ["pictures"]


def test_tensorboard_asked_for_and_missing_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(TrainingError, match="not installed: pip install tensorboard"):
        train(replace(_RUN, tensorboard=True), Loaders(), tmp_path)
