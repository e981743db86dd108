"""The generator is a pure function that trains, compiles and keeps what it is told to keep."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mat_torch.checkpoint import random_checkpoint
from mat_torch.config import ConfigError, GeneratorConfig, preset
from mat_torch.generator import Generator
from mat_torch.sampling import draw

_TINY = preset("mat-tiny-256")
# The smallest network of the same topology, where a test needs many runs.
_SMALL = GeneratorConfig(
    "test-128",
    128,
    latent_dim=8,
    token_dim=12,
    heads=2,
    base_channels=1024,
    max_channels=16,
    mapping_layers=2,
)

Inputs: TypeAlias = dict[str, Any]


@pytest.fixture(scope="module")
def tiny() -> Generator:
    return random_checkpoint(_TINY, 0).build().requires_grad_(False)


@pytest.fixture(scope="module")
def small() -> Generator:
    return random_checkpoint(_SMALL, 0).build().requires_grad_(False)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _mask(batch: int, height: int, width: int) -> Tensor:
    """A large hole with stray pixels inside, and stray holes outside; another in each image."""
    mask = (_random(batch, 1, height, width, seed=7) > 0.02).float()
    for b in range(batch):
        top, left = height // 8 * (b + 1), width // 4
        hole = mask[b, :, top : top + height // 2, left : left + width // 2]
        hole.copy_(1.0 - hole)
    return mask


def _inputs(
    config: GeneratorConfig,
    seeds: tuple[int, ...] = (0,),
    size: tuple[int, int] | None = None,
    *,
    noise: bool = False,
) -> Inputs:
    """Arguments of Generator.forward, those that a seed draws and a picture with a mask."""
    height, width = size or (config.resolution, config.resolution)
    arrays = draw(config, seeds, height, width, noise=noise)
    drawn = {name: torch.from_numpy(array) for name, array in arrays.items()}
    inputs: Inputs = {
        "image": _random(len(seeds), 3, height, width) * 2.0 - 1.0,
        "mask": _mask(len(seeds), height, width),
        "truncation": 1.0,
        **{name: drawn[name] for name in ("z", "gate_tokens", "gate_bottleneck")},
    }
    if noise:
        inputs["noise"] = {name: t for name, t in drawn.items() if name.startswith("noise")}
    return inputs


def _run(generator: Generator, inputs: Inputs, **changes: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        output, coarse = generator(**(inputs | changes))
    return output, coarse


def _same_bits(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.double().norm())


@contextmanager
def _watched(
    root: nn.Module, names: Iterable[str], note: Callable[[str, Any], None], *, before: bool = False
) -> Iterator[None]:
    """Call `note` with each module's name and result (or, before it runs, its first argument)."""

    def after_run(name: str) -> Callable[..., None]:
        return lambda _module, _arguments, result: note(name, result)

    def before_run(name: str) -> Callable[..., None]:
        return lambda _module, arguments: note(name, arguments[0])

    handles = []
    for name in names:
        module = root.get_submodule(name)
        if before:
            handles.append(module.register_forward_pre_hook(before_run(name)))
        else:
            handles.append(module.register_forward_hook(after_run(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- what goes in and comes out --------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_run(tiny: Generator) -> tuple[Inputs, tuple[Tensor, Tensor]]:
    inputs = _inputs(_TINY)
    return inputs, _run(tiny, inputs)


def test_kept_pixels_come_back_exactly_and_the_hole_is_filled(
    tiny_run: tuple[Inputs, tuple[Tensor, Tensor]],
) -> None:
    inputs, pictures = tiny_run
    kept = inputs["mask"].bool().expand(-1, 3, -1, -1)
    for picture in pictures:
        assert picture.shape == inputs["image"].shape
        assert picture.dtype == torch.float32
        assert bool(picture.isfinite().all())
        assert torch.equal(picture[kept], inputs["image"][kept])
        assert not (picture[~kept] == inputs["image"][~kept]).any()


def test_the_same_inputs_give_the_same_bits(
    tiny: Generator, tiny_run: tuple[Inputs, tuple[Tensor, Tensor]]
) -> None:
    inputs, pictures = tiny_run
    assert _same_bits(_run(tiny, inputs), pictures)


def test_what_lies_under_the_hole_does_not_matter(
    tiny: Generator, tiny_run: tuple[Inputs, tuple[Tensor, Tensor]]
) -> None:
    inputs, pictures = tiny_run
    for seed in (1, 2):
        other = _random(*inputs["image"].shape, seed=seed) * 2.0 - 1.0
        image = torch.where(inputs["mask"].bool(), inputs["image"], other)
        assert not torch.equal(image, inputs["image"])
        assert _same_bits(_run(tiny, inputs, image=image), pictures)


def test_running_changes_neither_weights_nor_inputs_nor_the_callers_randomness(
    small: Generator,
) -> None:
    inputs = _inputs(_SMALL, noise=True)
    tensors = [inputs[name] for name in inputs if isinstance(inputs[name], Tensor)]
    tensors += [*small.state_dict().values(), *inputs["noise"].values()]
    before = [tensor.clone() for tensor in tensors]
    state = torch.random.get_rng_state()
    _run(small, inputs)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, tensors, before))


def test_training_mode_computes_the_same(small: Generator) -> None:
    inputs = _inputs(_SMALL)
    expected = _run(small, inputs)
    small.train()
    trained = _run(small, inputs)
    small.eval()
    assert _same_bits(trained, expected)


def test_an_image_does_not_depend_on_the_others_of_its_batch(small: Generator) -> None:
    inputs = _inputs(_SMALL, (5, 6), noise=True)
    together = _run(small, inputs)
    for i in range(2):
        one = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        one["noise"] = {name: t[i : i + 1] for name, t in inputs["noise"].items()}
        for picture, alone in zip(together, _run(small, one), strict=True):
            assert _relative_error(picture[i : i + 1], alone) < 1e-5


def test_a_picture_without_a_hole_comes_back_as_it_was(small: Generator) -> None:
    inputs = _inputs(_SMALL)
    for picture in _run(small, inputs, mask=torch.ones_like(inputs["mask"])):
        assert torch.equal(picture, inputs["image"])


def test_a_picture_that_is_all_hole_is_filled_with_finite_values(small: Generator) -> None:
    inputs = _inputs(_SMALL)
    nothing = torch.zeros_like(inputs["mask"])
    pictures = _run(small, inputs, mask=nothing)
    assert all(bool(picture.isfinite().all()) for picture in pictures)
    blank = _run(small, inputs, mask=nothing, image=torch.zeros_like(inputs["image"]))
    assert _same_bits(pictures, blank)


def test_every_random_input_matters(small: Generator) -> None:
    inputs, other = _inputs(_SMALL, (1,), noise=True), _inputs(_SMALL, (2,), noise=True)
    expected = _run(small, inputs)[0]
    for name in ("z", "gate_tokens", "gate_bottleneck"):
        assert not torch.equal(_run(small, inputs, **{name: other[name]})[0], expected), name
    for name in inputs["noise"]:
        noise = inputs["noise"] | {name: other["noise"][name]}
        assert not torch.equal(_run(small, inputs, noise=noise)[0], expected), name


# -- truncation and noise --------------------------------------------------------------------------


def test_z_is_irrelevant_at_zero_truncation(small: Generator) -> None:
    inputs, other = _inputs(_SMALL, (1,)), _inputs(_SMALL, (2,))
    expected = _run(small, inputs, truncation=0.0)
    assert _same_bits(_run(small, inputs, truncation=0.0, z=other["z"]), expected)
    assert not _same_bits(_run(small, inputs, truncation=0.5, z=other["z"]), expected)


def test_truncation_is_a_number_or_a_tensor_of_one(small: Generator) -> None:
    inputs = _inputs(_SMALL)
    expected = _run(small, inputs, truncation=0.5)
    assert _same_bits(_run(small, inputs, truncation=torch.tensor([0.5])), expected)


def _constants(generator: Generator) -> dict[str, Tensor]:
    """The noise constants of a checkpoint under the names of the noise inputs."""
    buffers = dict(generator.synthesis.dec.named_buffers())
    names = {"noise_16": "Dec_16x16.conv1.noise_const"}
    for r in generator.config.encoder_resolutions[:-1]:
        names |= {f"noise_{r}_{i}": f"Dec_{r}x{r}.conv{i}.noise_const" for i in (0, 1)}
    return {name: buffers[buffer][None, None] for name, buffer in names.items()}


def test_absent_noise_is_the_checkpoints_constant(small: Generator) -> None:
    constants, inputs = _constants(small), _inputs(_SMALL)
    assert constants.keys() == _SMALL.noise_resolutions.keys()
    expected = _run(small, inputs)
    assert _same_bits(_run(small, inputs, noise=constants), expected)
    one = {"noise_32_1": constants["noise_32_1"]}
    assert _same_bits(_run(small, inputs, noise=one), expected)


# -- sizes -----------------------------------------------------------------------------------------


def test_tiny_fills_a_picture_of_256_by_512(tiny: Generator) -> None:
    inputs = _inputs(_TINY, size=(256, 512), noise=True)
    output, coarse = _run(tiny, inputs)
    kept = inputs["mask"].bool().expand(-1, 3, -1, -1)
    for picture in (output, coarse):
        assert picture.shape == (1, 3, 256, 512)
        assert bool(picture.isfinite().all())
        assert torch.equal(picture[kept], inputs["image"][kept])


def test_any_multiple_of_the_native_size_is_filled(small: Generator) -> None:
    inputs = _inputs(_SMALL, (0, 1), (256, 128), noise=True)
    output, _ = _run(small, inputs)
    assert output.shape == (2, 3, 256, 128)
    assert bool(output.isfinite().all())


def test_off_the_native_size_noise_is_needed_and_what_is_missing_is_listed(
    small: Generator,
) -> None:
    inputs = _inputs(_SMALL, size=(128, 256), noise=True)
    noise = inputs.pop("noise")
    everything = ", ".join(noise)
    with pytest.raises(ValueError, match=rf"fit 128x128 only; at 128x256 .*missing: {everything}"):
        _run(small, inputs)
    del noise["noise_64_0"]
    with pytest.raises(ValueError, match=r"\(missing: noise_64_0\)"):
        _run(small, inputs, noise=noise)


@pytest.mark.parametrize("size", [(64, 128), (128, 192), (129, 128), (127, 127)])
def test_a_size_that_is_no_multiple_is_an_error(size: tuple[int, int], small: Generator) -> None:
    inputs = _inputs(_SMALL, noise=True)
    image, mask = torch.zeros(1, 3, *size), torch.ones(1, 1, *size)
    with pytest.raises(ConfigError, match=f"multiples of 128, got {size[0]}x{size[1]}"):
        _run(small, inputs, image=image, mask=mask)


# -- gates and styles ------------------------------------------------------------------------------

_SIZES = [(128, 128), (128, 256), (256, 128)]


def _mixture(
    generator: Generator, inputs: Inputs, features: str, square: str, mixed: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What the first two modules of these names gave, and what the third was given."""
    values: dict[str, Tensor] = {}

    def note(name: str, value: Any) -> None:
        values[name] = value[0] if isinstance(value, tuple) else value

    root = generator.synthesis
    with (
        _watched(root, (features, square), note),
        _watched(root, (mixed,), note, before=True),
    ):
        _run(generator, inputs)
    return values[features].double(), values[square], values[mixed].double()


def _resized_line(values: Tensor, size: int) -> Tensor:
    """[B, n] → [B, size], linearly between half-pixel centres, the ends held."""
    n = values.shape[1]
    positions = (np.arange(size) + 0.5) * n / size - 0.5
    lines = [np.interp(positions, np.arange(n), line) for line in values.double().numpy()]
    return torch.from_numpy(np.stack(lines))


@pytest.mark.parametrize("size", _SIZES)
def test_the_token_gate_chooses_between_token_and_style(
    size: tuple[int, int], small: Generator
) -> None:
    inputs = _inputs(_SMALL, (3, 4), size, noise=True)
    names = "first_stage.tran.2", "first_stage.to_square", "first_stage.down_conv"
    features, square, mixed = _mixture(small, inputs, *names)
    tokens = features.flatten(2).transpose(1, 2)
    style = _resized_line(square, tokens.shape[1])[:, :, None].expand_as(tokens)
    expected = torch.where(inputs["gate_tokens"].bool(), tokens, style)
    assert not torch.equal(expected, tokens)
    result = mixed.flatten(2).transpose(1, 2)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", _SIZES)
def test_the_bottleneck_gate_chooses_between_feature_and_style(
    size: tuple[int, int], small: Generator
) -> None:
    inputs = _inputs(_SMALL, (3, 4), size, noise=True)
    names = "enc.EncConv_Block_16x16", "to_square", "to_style"
    features, square, mixed = _mixture(small, inputs, *names)
    height, width = features.shape[-2:]
    # Bilinear: along the rows, then along the columns.
    a = _resized_line(square.reshape(2 * 16, 16), width).reshape(2, 16, width).transpose(1, 2)
    a = _resized_line(a.reshape(2 * width, 16), height).reshape(2, width, height).transpose(1, 2)
    expected = torch.where(inputs["gate_bottleneck"].bool(), features, a[:, None])
    assert not torch.equal(expected, features)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", ["gate_tokens", "gate_bottleneck"])
def test_gates_switch_sources_off_altogether(gate: str, small: Generator) -> None:
    """All ones: the style's square has no influence. All zeros: the features have none."""
    inputs = _inputs(_SMALL)
    square, features = {
        "gate_tokens": ("first_stage.to_square", "first_stage.tran.2.conv"),
        "gate_bottleneck": ("to_square", "enc.EncConv_Block_16x16.conv1"),
    }[gate]

    def double(_module: nn.Module, _arguments: object, result: Any) -> Any:
        return (2.0 * result[0], result[1]) if isinstance(result, tuple) else 2.0 * result

    for opened, source, matters in [
        (True, square, False),
        (True, features, True),
        (False, square, True),
        (False, features, False),
    ]:
        values = {gate: torch.full_like(inputs[gate], float(opened))}
        expected = _run(small, inputs, **values)
        handle = small.synthesis.get_submodule(source).register_forward_hook(double)
        changed = _run(small, inputs, **values)
        handle.remove()
        assert _same_bits(changed, expected) is not matters, (opened, source)


def test_every_layer_has_the_w_of_its_number(small: Generator) -> None:
    """Style mixing: 16 has w_0 and w_1, r = 2ⁿ has w_{2n−9} … w_{2n−7}, stage one the last."""
    count, width = _SMALL.num_ws, _SMALL.latent_dim
    ws = torch.arange(float(count))[None, :, None].expand(1, count, width)
    seen: dict[str, set[float]] = {}

    def note(name: str, style: Tensor) -> None:
        seen[name] = set(style[:, :width].flatten().tolist())

    layers = [name for name, _ in small.synthesis.dec.named_modules() if name.endswith(".affine")]
    names = ("to_square", "first_stage.ws_style", *(f"dec.{name}" for name in layers))
    inputs = _inputs(_SMALL)
    rest = (inputs[name] for name in ("gate_tokens", "gate_bottleneck"))
    with torch.no_grad(), _watched(small.synthesis, names, note, before=True):
        small.synthesis(inputs["image"], inputs["mask"], ws, *rest)
    assert seen == {
        "first_stage.ws_style": {7.0},
        "to_square": {0.0},
        "dec.Dec_16x16.conv1.conv.affine": {0.0},
        "dec.Dec_16x16.toRGB.conv.affine": {1.0},
        "dec.Dec_32x32.conv0.conv.affine": {1.0},
        "dec.Dec_32x32.conv1.conv.affine": {2.0},
        "dec.Dec_32x32.toRGB.conv.affine": {3.0},
        "dec.Dec_64x64.conv0.conv.affine": {3.0},
        "dec.Dec_64x64.conv1.conv.affine": {4.0},
        "dec.Dec_64x64.toRGB.conv.affine": {5.0},
        "dec.Dec_128x128.conv0.conv.affine": {5.0},
        "dec.Dec_128x128.conv1.conv.affine": {6.0},
        "dec.Dec_128x128.toRGB.conv.affine": {7.0},
    }


# -- masks of stage one ----------------------------------------------------------------------------


_MASKED = re.compile(r"conv_first|enc_conv\.\d|tran\.\d\.(downsample|blocks\.\d|conv)")


@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize("kind", ["mixed", "all hole", "no hole", "one pixel"])
def test_the_mask_states_are_the_masks_that_the_layers_hand_on(
    kind: str, size: tuple[int, int], small: Generator
) -> None:
    inputs = _inputs(_SMALL, (0, 1), size, noise=True)
    if kind != "mixed":
        inputs["mask"].fill_(float(kind == "no hole"))
    if kind == "one pixel":
        inputs["mask"][1, 0, -1, 50] = 1.0
    seen: dict[str, Tensor] = {}

    def note(name: str, result: tuple[Tensor, Tensor | None]) -> None:
        if result[1] is not None:
            seen[name] = result[1].float()

    stage = small.synthesis.first_stage
    names = [name for name, _ in stage.named_modules() if _MASKED.fullmatch(name)]
    with _watched(stage, names, note):
        _run(small, inputs)
    states = small.mask_states(inputs["mask"])
    assert list(states) == list(seen)
    assert len(states) == 10
    for name, mask in seen.items():
        assert set(torch.unique(mask).tolist()) <= {0.0, 1.0}
        assert torch.equal(states[name], mask), name


# -- training --------------------------------------------------------------------------------------


def _gradients(generator: Generator, inputs: Inputs) -> dict[str, Tensor]:
    """Gradients of the sum of both pictures by parameter; each has one, and it is finite."""
    generator.zero_grad()
    output, coarse = generator(**inputs)
    (output.sum() + coarse.sum()).backward()
    gradients = {}
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert bool(parameter.grad.isfinite().all()), name
        gradients[name] = parameter.grad.clone()
    return gradients


def _assert_gradients_reach_all(gradients: dict[str, Tensor]) -> None:
    """Nonzero for every parameter but the keys' biases, which have none by their nature.

    A key bias adds q·b to all logits of a query alike, and a softmax does not change when all its
    logits grow alike: what is left is rounding.
    """
    for name, gradient in gradients.items():
        if name.endswith("attn.k.bias"):
            queries = gradients[name.replace("attn.k.", "attn.q.")]
            assert float(gradient.norm()) <= 1e-4 * float(queries.norm()), name
        else:
            nonzero = float((gradient != 0.0).float().mean())
            assert nonzero > 0.9, f"only {nonzero:.1%} of the gradient of {name} is not zero"


def test_gradients_reach_every_parameter() -> None:
    generator = random_checkpoint(_TINY, 0).build().train()
    _assert_gradients_reach_all(_gradients(generator, _inputs(_TINY)))


def test_gradients_reach_every_parameter_as_training_starts() -> None:
    """With the initial weights: no noise strength, no bias, an average w of zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = Generator(_SMALL)
    assert not any(
        tensor.any() for name, tensor in generator.state_dict().items() if "strength" in name
    )
    _assert_gradients_reach_all(_gradients(generator, _inputs(_SMALL)))


def test_gradients_reach_the_kept_pixels_and_none_the_hole(small: Generator) -> None:
    inputs = _inputs(_SMALL)
    image = inputs["image"].clone().requires_grad_()
    output, coarse = small(**(inputs | {"image": image}))
    (output.square().sum() + coarse.square().sum()).backward()
    assert image.grad is not None
    kept = inputs["mask"].bool().expand(-1, 3, -1, -1)
    assert not image.grad[~kept].any()
    assert bool(image.grad[kept].all())


@pytest.fixture
def graphs() -> Iterator[list[GraphModule]]:
    """Where a backend may note the graphs of a fresh compiler."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def test_torch_compile_takes_the_training_forward_pass_as_one_graph(
    graphs: list[GraphModule],
) -> None:
    """With fullgraph=True, a graph break is an error."""

    def note(graph: GraphModule, _inputs: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    generator = random_checkpoint(_TINY, 0).build().train()
    inputs = _inputs(_TINY)
    compiled = torch.compile(generator, fullgraph=True, backend=note)
    output, coarse = compiled(**inputs)
    assert len(graphs) == 1
    assert output.requires_grad
    # The filters are other arithmetic in a graph: apart by rounding.
    for picture, eager in zip((output, coarse), _run(generator, inputs), strict=True):
        assert _relative_error(picture.detach(), eager.detach()) < 1e-5


@pytest.mark.usefixtures("graphs")
def test_compiled_training_has_the_gradients_of_eager_training() -> None:
    generator = random_checkpoint(_SMALL, 0).build().train()
    inputs = _inputs(_SMALL, (0, 1))
    expected = _gradients(generator, inputs)
    compiled = torch.compile(generator, fullgraph=True, backend="aot_eager")
    gradients = _gradients(cast(Generator, compiled), inputs)
    assert len(gradients) == len(expected)
    for name, gradient in gradients.items():
        if not name.endswith("attn.k.bias"):  # rounding alone
            assert _relative_error(gradient, expected[name.removeprefix("_orig_mod.")]) < 1e-4, name


class _OneDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails where an operator touches a tensor on another device: a copy is a synchronisation."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.device.type != self.device:
                raise AssertionError(f"{func} touches a tensor on {leaf.device}")
        return result


@pytest.mark.parametrize("size", [(256, 256), (256, 512)])
@pytest.mark.parametrize("training", [False, True])
def test_the_host_never_waits_for_a_value_in_the_forward_pass(
    training: bool, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta tensors have no values: an item(), a bool() or a nonzero() of one is an error.

    And the forward pass makes no tensor from Python numbers, which is a copy to the device.
    """
    with torch.device("meta"):
        generator = Generator(_TINY).train(training)
    inputs = tree_map_only(Tensor, lambda t: t.to("meta"), _inputs(_TINY, size=size, noise=True))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor is made from Python values")

    for name in ("tensor", "as_tensor", "from_numpy", "scalar_tensor"):
        monkeypatch.setattr(torch, name, refuse)
    with _OneDevice("meta") as mode:
        for truncation in (0.5, torch.ones(1, device="meta")):
            output, _ = generator(**(inputs | {"truncation": truncation}))
    assert output.device.type == "meta"
    assert output.requires_grad
    assert mode.calls > 1000
