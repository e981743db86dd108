"""Each ablation of the paper builds, learns and keeps what it must; the published network stays."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cli
from mat_export.contract import GraphSpec, UserError
from mat_export.export import build_model, export_onnx
from mat_export.inference import InferenceGenerator
from mat_export.inspection import describe
from mat_torch import ablations, layers
from mat_torch.ablations import ConvBlock, LayerNormBlock, LinearHead, PatchExpand, PatchMerge
from mat_torch.attention import Block, mask_propagation
from mat_torch.checkpoint import (
    CheckpointError,
    load_checkpoint,
    random_checkpoint,
    save_checkpoint,
)
from mat_torch.config import CHOICES, PRESETS, ConfigError, GeneratorConfig, preset
from mat_torch.generator import Generator
from mat_torch.sampling import draw

SMALL = GeneratorConfig(
    "test-128",
    128,
    latent_dim=8,
    token_dim=12,
    heads=2,
    depths=(2, 2, 1, 1, 1),
    base_channels=1024,
    max_channels=16,
    mapping_layers=2,
)
EACH = [{name: other} for name, (_, other) in CHOICES.items()]
ONE_FIELD = pytest.mark.parametrize("change", EACH, ids=lambda c: "=".join(*c.items()))


def variants() -> Iterator[dict[str, str]]:
    """Every combination of choices that is a network."""
    for values in itertools.product(*CHOICES.values()):
        change = dict(zip(CHOICES, values, strict=True))
        if change["body"] == "transformer" or (change["attention"], change["block"]) == (
            "masked",
            "mat",
        ):
            yield change


def configured(change: dict[str, str], config: GeneratorConfig = SMALL) -> GeneratorConfig:
    return dataclasses.replace(config, **change)  # type: ignore[arg-type]


def built(change: dict[str, str]) -> Generator:
    return random_checkpoint(configured(change), 0).build()


def inputs_of(
    config: GeneratorConfig, seed: int = 0, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Arguments of Generator.forward: noise with a large hole, a kept pixel inside of it."""
    height, width = size or (config.resolution, config.resolution)
    drawn = {
        name: torch.from_numpy(array)
        for name, array in draw(config, (seed, seed + 1), height, width, noise=True).items()
    }
    image = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    mask = torch.ones(2, 1, height, width)
    mask[:, :, 16:112, 8:104] = 0.0
    mask[1, :, 64, 64] = 1.0
    noise = {name: drawn.pop(name) for name in list(drawn) if name.startswith("noise")}
    return {"image": image, "mask": mask, "truncation": 0.7, **drawn, "noise": noise}


def same_bits(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def run(generator: Generator, inputs: dict[str, Any], **changes: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        output, coarse = generator(**(inputs | changes))
    return output, coarse


# -- fields ----------------------------------------------------------------------------------------


def test_the_published_choices_are_the_defaults_and_left_out_of_json() -> None:
    text = preset("mat-512").to_json()
    assert text == (
        '{"base_channels": 32768, "depths": [2, 3, 4, 3, 2], "heads": 6, "latent_dim": 512, '
        '"mapping_layers": 8, "max_channels": 512, "name": "mat-512", "resolution": 512, '
        '"token_dim": 180, "windows": [8, 16, 16, 16, 8]}'
    )
    published = {name: choice for name, (choice, _) in CHOICES.items()}
    spelled_out = GeneratorConfig.from_json(json.dumps(json.loads(text) | published))
    assert spelled_out == GeneratorConfig.from_json(text) == preset("mat-512")
    assert spelled_out.to_json() == text


def test_no_preset_is_an_ablation() -> None:
    assert not any(config.ablations for config in PRESETS.values())


def test_the_metadata_of_published_graphs_has_no_choices() -> None:
    fields = json.loads(GraphSpec(preset("mat-256")).to_json())
    assert fields["config"] == json.loads(preset("mat-256").to_json())
    assert not CHOICES.keys() & fields["config"].keys()


@pytest.mark.parametrize("change", variants(), ids=lambda c: "-".join(c.values()))
def test_every_combination_survives_json_and_names_what_it_changes(change: dict[str, str]) -> None:
    config = configured(change)
    assert GeneratorConfig.from_json(config.to_json()) == config
    changed = {name: value for name, value in change.items() if value != CHOICES[name][0]}
    assert config.ablations == changed
    assert json.loads(config.to_json()).items() >= changed.items()
    assert len(json.loads(config.to_json())) == 10 + len(changed)
    for name, value in changed.items():
        assert f"{name}='{value}'" in config.describe_ablations()


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["other", "", None, 0, ["plain"]])
def test_any_other_choice_is_an_error_that_lists_both(name: str, value: Any) -> None:
    first, second = CHOICES[name]
    expected = re.escape(f"{name} is '{first}' or '{second}', got {value!r}")
    with pytest.raises(ConfigError, match=expected):
        dataclasses.replace(SMALL, **{name: value})
    text = json.dumps(json.loads(SMALL.to_json()) | {name: value})
    with pytest.raises(ConfigError, match=expected):
        GeneratorConfig.from_json(text)


@pytest.mark.parametrize("change", [{"attention": "plain"}, {"block": "layernorm"}])
def test_a_body_of_convolutions_has_no_attention_to_configure(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"has no attention .* leave attention and block"):
        configured({"body": "convolution", **change})


# -- the networks ----------------------------------------------------------------------------------


@ONE_FIELD
def test_kept_pixels_come_back_and_what_lies_under_the_hole_does_not_matter(
    change: dict[str, str],
) -> None:
    generator, inputs = built(change), inputs_of(SMALL)
    kept = inputs["mask"].bool().expand(-1, 3, -1, -1)
    pictures = run(generator, inputs)
    for picture in pictures:
        assert picture.shape == inputs["image"].shape
        assert bool(picture.isfinite().all())
        assert torch.equal(picture[kept], inputs["image"][kept])
        assert not (picture[~kept] == inputs["image"][~kept]).any()
    image = torch.where(kept, inputs["image"], inputs["image"].flip(0))
    assert same_bits(run(generator, inputs, image=image), pictures)
    # And it is another network than the published one.
    assert not same_bits(run(built({}), inputs), pictures)


@ONE_FIELD
def test_all_hole_and_no_hole_are_filled_and_kept(change: dict[str, str]) -> None:
    generator, inputs = built(change), inputs_of(SMALL)
    for picture in run(generator, inputs, mask=torch.ones_like(inputs["mask"])):
        assert torch.equal(picture, inputs["image"])
    for picture in run(generator, inputs, mask=torch.zeros_like(inputs["mask"])):
        assert bool(picture.isfinite().all())


def gradients_reach_all(generator: Generator, inputs: dict[str, Any]) -> None:
    """Finite for every parameter, and not zero but for the keys' biases, which have none."""
    output, coarse = generator(**inputs)
    (output.square().mean() + coarse.square().mean()).backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert bool(parameter.grad.isfinite().all()), name
        if not name.endswith("attn.k.bias"):
            nonzero = float((parameter.grad != 0.0).float().mean())
            assert nonzero > 0.9, f"only {nonzero:.1%} of the gradient of {name} is not zero"


@ONE_FIELD
def test_gradients_reach_every_parameter_as_training_starts(change: dict[str, str]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = Generator(configured(change)).train()
    gradients_reach_all(generator, inputs_of(SMALL))


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "plain", "block": "layernorm", "style": "none", "tokens": "linear"},
        {"body": "convolution", "style": "none", "tokens": "linear"},
    ],
    ids=["transformer", "convolution"],
)
def test_gradients_reach_every_parameter_of_combinations(change: dict[str, str]) -> None:
    gradients_reach_all(built(change).train(), inputs_of(SMALL))


@ONE_FIELD
def test_training_under_bfloat16_keeps_gradients_finite(change: dict[str, str]) -> None:
    generator, inputs = built(change).train(), inputs_of(SMALL)
    for module in generator.modules():
        if isinstance(module, layers.ModulatedConv):
            module.scale_activations = True  # as training has it
    kinds: set[torch.dtype] = set()
    for module in generator.synthesis.first_stage.tran.modules():
        if isinstance(module, layers.PartialConv):
            module.register_forward_hook(lambda _module, _args, result: kinds.add(result[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        gates = {name: inputs[name].bfloat16() for name in ("gate_tokens", "gate_bottleneck")}
        output, coarse = generator(**(inputs | gates))
    (output.float().square().sum() + coarse.float().square().sum()).backward()
    assert kinds == {torch.bfloat16}  # nothing brings the tokens to float32 on the way
    assert output.dtype == torch.float32
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


@ONE_FIELD
def test_other_sizes_and_batches_work(change: dict[str, str]) -> None:
    generator = built(change)
    inputs = inputs_of(SMALL, size=(256, 128))
    output, _ = run(generator, inputs)
    assert output.shape == (2, 3, 256, 128)
    one = {k: v[1:] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    one["noise"] = {name: values[1:] for name, values in inputs["noise"].items()}
    torch.testing.assert_close(run(generator, one)[0], output[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", variants(), ids=lambda c: "-".join(c.values()))
def test_every_combination_builds_and_runs(change: dict[str, str]) -> None:
    """On meta tensors, which have no values that a forward pass could wait for."""
    with torch.device("meta"):
        generator = Generator(configured(change))
    inputs = inputs_of(SMALL)
    noise = {name: values.to("meta") for name, values in inputs.pop("noise").items()}
    moved = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()}
    output, coarse = generator(**moved, noise=noise)
    assert output.shape == coarse.shape == (2, 3, 128, 128)


@pytest.mark.parametrize(
    "change",
    [
        {"block": "layernorm", "tokens": "linear", "style": "none"},
        {"body": "convolution", "tokens": "linear"},
    ],
    ids=["transformer", "convolution"],
)
def test_torch_compile_takes_the_forward_pass_as_one_graph(change: dict[str, str]) -> None:
    torch.compiler.reset()
    generator, inputs = built(change), inputs_of(SMALL)
    compiled = torch.compile(generator, fullgraph=True, backend="eager")
    with torch.no_grad():
        pictures = compiled(**inputs)
    torch.compiler.reset()
    # The filters are other arithmetic in a graph: apart by rounding.
    for picture, eager in zip(pictures, run(generator, inputs), strict=True):
        assert (picture - eager).norm() < 1e-5 * eager.norm()


def test_the_documented_numbers_of_parameters_are_those_of_the_networks() -> None:
    assert ablations.__doc__ is not None
    rows = re.findall(r"^(\w+)(?: ``(\w+)``)? +([\d,]+) +([\d,]+)$", ablations.__doc__, re.M)
    documented = {
        (field, value): (int(total.replace(",", "")), int(stage.replace(",", "")))
        for field, value, total, stage in rows
    }
    expected = {}
    for change in [{}, *EACH]:
        with torch.device("meta"):  # no data
            generator = Generator(configured(change, preset("mat-512")))
        stages = generator, generator.synthesis.first_stage
        total, stage = (sum(p.numel() for p in module.parameters()) for module in stages)
        (key,) = change.items() or {"published": ""}.items()
        expected[key] = total, stage
    assert documented == expected


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "masked"),
    [
        ({}, True),
        ({"attention": "plain"}, False),
        ({"block": "layernorm"}, True),
        ({"body": "convolution"}, True),
        ({"style": "none"}, True),
        ({"tokens": "linear"}, True),
        ({"attention": "plain", "tokens": "linear"}, False),
    ],
    ids=str,
)
def test_the_mask_reaches_the_first_two_stages_unless_attention_is_plain(
    change: dict[str, str], masked: bool
) -> None:
    generator = built(change)
    seen: list[set[bool]] = [set() for _ in range(5)]
    for i, stage in enumerate(generator.synthesis.first_stage.tran):
        assert isinstance(stage.blocks, nn.ModuleList)
        for module in (*stage.blocks, stage.conv):
            assert isinstance(module, nn.Module)
            module.register_forward_hook(
                lambda _module, arguments, result, i=i: seen[i].update(
                    mask is not None for mask in (arguments[1], result[1])
                )
            )
    run(generator, inputs_of(SMALL))
    assert seen == [{masked}, {masked}, {False}, {False}, {False}]


def test_mask_states_of_an_ablation_are_refused() -> None:
    with pytest.raises(ConfigError, match="this one has attention='plain'"):
        built({"attention": "plain"}).mask_states(torch.ones(1, 1, 128, 128))


def validity() -> Tensor:
    """Bool [2, 1, 16, 16]: a quarter valid in one image, a single token in the other."""
    valid = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    valid[0, :, :8, :8] = True
    valid[1, :, 5, 5] = True
    return valid


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(2, 16, 16, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shift", [0, 4])
def test_the_layernorm_block_masks_keys_and_propagates_as_the_published_one(
    shift: int, tokens: Tensor
) -> None:
    block = LayerNormBlock(12, 2, window=8, shift=shift, grid=16)
    valid = validity()
    y, after = block(tokens, valid)
    assert torch.equal(after, mask_propagation(valid, window=8, shift=shift))
    assert torch.equal(after, Block(12, 2, window=8, shift=shift, grid=16)(tokens, valid)[1])
    # Others than itself see nothing of an invalid token where there is a valid one.
    kept = valid.permute(0, 2, 3, 1)
    changed, _ = block(torch.where(kept, tokens, tokens + 3.0), valid)
    where = kept.expand_as(y)
    torch.testing.assert_close(changed[where], y[where], rtol=1e-5, atol=1e-5)
    unmasked, nothing = block(tokens)
    assert nothing is None
    assert not torch.allclose(unmasked[where], y[where])


def test_the_layernorm_block_is_norms_and_residuals(tokens: Tensor) -> None:
    block = LayerNormBlock(12, 2, window=8, shift=4, grid=16)
    normed = F.layer_norm(tokens, (12,), block.norm1.weight, block.norm1.bias)
    x = tokens + block.attend(normed, None)
    expected = x + block.mlp(F.layer_norm(x, (12,), block.norm2.weight, block.norm2.bias))
    torch.testing.assert_close(block(tokens)[0], expected)
    with torch.no_grad():
        nn.init.zeros_(block.attn.proj.weight)
    nn.init.zeros_(block.mlp.fc2.weight)
    assert torch.equal(block(tokens)[0], tokens)


def test_tokens_of_zeros_leave_the_gradients_of_the_layernorm_block_moderate() -> None:
    """Invalid tokens are zeros, and unit length has a slope of 10¹² there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = LayerNormBlock(12, 2, window=8, shift=0, grid=16)
    tokens = torch.zeros(2, 16, 16, 12)
    tokens[:, :4] = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(0))
    y, _ = block(tokens, (tokens != 0.0).any(dim=-1)[:, None])
    y.square().mean().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) < 100.0, name


def test_the_convolution_block_widens_the_mask_and_keeps_the_rest_at_zero(tokens: Tensor) -> None:
    block, valid = ConvBlock(12), validity()
    x = tokens * valid.permute(0, 2, 3, 1)
    y, after = block(x, valid)
    expected = F.max_pool2d(valid.float(), 5, 1, padding=2) > 0.5
    assert torch.equal(after, expected)
    assert int(after[1].sum()) == 25
    assert not y[~after.permute(0, 2, 3, 1).expand_as(y)].any()
    assert block(x)[1] is None
    # Of unit variance in, of unit variance out.
    wide = ConvBlock(64)
    y, _ = wide(torch.randn(2, 16, 16, 64))
    assert 0.6 < float(y.detach().std()) < 1.5


# -- linear tokens ---------------------------------------------------------------------------------


def test_the_linear_head_projects_patches_and_drops_those_without_a_kept_pixel() -> None:
    head, (pixels, mask) = LinearHead(12, 3), (torch.randn(2, 4, 64, 64), torch.ones(2, 1, 64, 64))
    mask[:, :, :32] = 0.0
    mask[1, :, 3, 3] = 1.0
    maps, valid = head(pixels, mask)
    assert [x.shape[-1] for x in maps] == [64, 32, 16, 8]
    assert valid.shape == (2, 1, 8, 8)
    assert valid.sum(dim=(1, 2, 3)).tolist() == [32.0, 33.0]
    for i, x in enumerate(maps):
        side = 2**i
        layer = head.patch[i]
        assert isinstance(layer, layers.Linear)
        weight = (layer.weight * layer.weight_gain).reshape(12, 4, side, side)
        own = F.max_pool2d(mask, side, side)
        expected = F.conv2d(pixels, weight, layer.bias, stride=side) * own
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_merged_and_expanded_by_linear_layers() -> None:
    x, mask = torch.randn(2, 12, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[:, :, 2, 5] = 1.0
    merge, expand = PatchMerge(12), PatchExpand(12)
    y, valid = merge(x, mask)
    assert y.shape == (2, 12, 4, 4)
    assert valid is not None
    assert torch.equal(valid[0, 0].nonzero(), torch.tensor([[1, 2]]))
    assert not (y * (1.0 - valid)).any()
    weight = (merge.linear.weight * merge.linear.weight_gain).reshape(12, 12, 2, 2)
    whole, nothing = merge(x, None)
    assert nothing is None
    torch.testing.assert_close(whole, F.conv2d(x, weight, stride=2), rtol=1e-4, atol=1e-5)
    up, nothing = expand(y, None)
    assert up.shape == x.shape
    assert nothing is None
    # A token becomes its own four, and no other has a part in them.
    token = up[:, :, 2:4, 4:6].clone()
    torch.testing.assert_close(expand(y * valid, None)[0][:, :, 2:4, 4:6], token)
    with pytest.raises(ValueError, match="without a mask"):
        expand(y, valid)


def test_linear_tokens_have_no_convolution_before_or_between_them() -> None:
    stage = built({"tokens": "linear"}).synthesis.first_stage
    assert stage.tran[0].downsample is None
    for module in (stage.head, *(stage.tran[i].downsample for i in range(1, 5))):
        assert isinstance(module, nn.Module)
        assert not any(isinstance(part, layers.Conv | nn.Conv2d) for part in module.modules())


# -- no styles -------------------------------------------------------------------------------------


def test_without_styles_noise_is_the_only_randomness() -> None:
    generator = built({"style": "none"})
    inputs, other = inputs_of(SMALL, 1), inputs_of(SMALL, 5)
    expected = run(generator, inputs)
    for name in ("z", "gate_tokens", "gate_bottleneck"):
        assert not torch.equal(inputs[name], other[name])
        assert same_bits(run(generator, inputs, **{name: other[name]}), expected), name
    assert same_bits(run(generator, inputs, truncation=0.0), expected)
    for name in inputs["noise"]:
        noise = inputs["noise"] | {name: other["noise"][name]}
        assert not torch.equal(run(generator, inputs, noise=noise)[0], expected[0]), name


def test_without_styles_nothing_makes_or_takes_one() -> None:
    generator = built({"style": "none"})
    assert not list(generator.mapping.parameters())
    names = {name for name, _ in generator.named_parameters()}
    absent = ("affine", "to_style", "to_square", "ws_style", "down_conv")
    assert not [name for name in names if any(part in name for part in absent)]
    # What is left has the names and shapes of the published network.
    published = dict(built({}).named_parameters())
    for name, parameter in generator.named_parameters():
        assert parameter.shape == published[name].shape, name


def test_style_mixing_and_the_average_style_run_as_in_training() -> None:
    """What training does around the network: a w for each layer, and their average tracked."""
    generator, inputs = built({"style": "none"}), inputs_of(SMALL)
    w = generator.mapping(inputs["z"])
    assert w.shape == (2, SMALL.latent_dim)
    generator.mapping.track_average(w)
    ws = torch.stack([w, w.flip(0)] * (SMALL.num_ws // 2), dim=1)
    arguments = [inputs[name] for name in ("gate_tokens", "gate_bottleneck", "noise")]
    pictures = generator.synthesis(inputs["image"], inputs["mask"], ws, *arguments)
    assert same_bits(pictures, run(generator, inputs))


@pytest.mark.parametrize("up", [1, 2])
def test_a_convolution_without_a_style_is_the_plain_one(up: int) -> None:
    x, nothing = torch.randn(2, 6, 8, 8), torch.zeros(2, 0)
    layer = layers.ModulatedConv(6, 5, 3, 0, up=up)
    plain = layers.Conv(6, 5, 3, up=up, activation=False, bias=False)
    plain.weight = nn.Parameter(layer.weight[0])
    expected = plain(x)
    assert torch.equal(layer(x, nothing), expected)
    layer.scale_activations = True  # as training has it
    assert torch.equal(layer(x, nothing), expected)


# -- files and export ------------------------------------------------------------------------------


@ONE_FIELD
def test_files_carry_the_choice_and_give_the_same_network(
    change: dict[str, str], tmp_path: Path
) -> None:
    checkpoint, path = random_checkpoint(configured(change), 3), tmp_path / "ablation.safetensors"
    save_checkpoint(checkpoint, path)
    loaded = load_checkpoint(path)
    assert loaded.config == checkpoint.config
    assert loaded.digest == checkpoint.digest
    inputs = inputs_of(SMALL)
    assert same_bits(run(loaded.build(), inputs), run(checkpoint.build(), inputs))
    (field,) = change.items()
    assert "{}='{}'".format(*field) in describe(path)["network"]


def test_weights_of_one_choice_do_not_load_as_another(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(configured({"style": "none"}), 0)
    path = tmp_path / "mixed.safetensors"
    with pytest.raises(CheckpointError, match=r"missing \("):
        save_checkpoint(dataclasses.replace(checkpoint, config=SMALL), path)


@ONE_FIELD
def test_export_refuses_what_is_not_published_before_any_work(
    change: dict[str, str], tmp_path: Path
) -> None:
    checkpoint, spec = random_checkpoint(configured(change), 0), GraphSpec(configured(change))
    (field,) = change.items()
    expected = "only the published network can be exported and 'test-128' has {}='{}'"
    expected = expected.format(*field)
    steps: list[str] = []
    with pytest.raises(UserError, match=expected):
        export_onnx(checkpoint, tmp_path / "mat.onnx", progress=steps.append)
    with pytest.raises(UserError, match=expected):
        build_model(checkpoint, spec, progress=steps.append)
    with pytest.raises(UserError, match=expected):
        InferenceGenerator(checkpoint.build(), spec)
    assert not steps
    assert not list(tmp_path.iterdir())


def test_the_command_line_refuses_an_ablation_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "ablation.safetensors"
    save_checkpoint(random_checkpoint(configured({"attention": "plain"}), 0), weights)
    arguments = ["onnx", "--checkpoint", str(weights), "-o", str(tmp_path / "mat.onnx")]
    monkeypatch.setattr("sys.argv", ["mat-export", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    (line,) = (line for line in error.splitlines() if line.startswith("error: "))
    assert "only the published network can be exported" in line
    assert [path.name for path in tmp_path.iterdir()] == [weights.name]
