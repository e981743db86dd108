"""The discriminator computes what the authors' does, and judges batches dealt in parts alike."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small import SMALL
from torch import Tensor

from mat_torch.config import preset
from mat_torch.discriminator import Discriminator, minibatch_deviation
from mat_torch.losses import gradient_penalty

_DATA = Path(__file__).parent / "data"
_BAR = 1e-5  # two correct FP32 implementations differ by about 2e-6


def _published_shapes(resolution: int) -> dict[str, tuple[int, ...]]:
    lines = (_DATA / f"discriminator_{resolution}_names.txt").read_text().splitlines()
    entries = [line.split() for line in lines]
    return {
        name: tuple(map(int, shape))
        for name, *shape in entries
        if not name.endswith(".resample_filter")
    }


def _published_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Each tensor from its name's CRC-32, as the vectors were made; biases a tenth."""
    weights = {}
    for name, shape in shapes.items():
        bits = np.random.PCG64(zlib.crc32(name.encode()))
        values = np.random.Generator(bits).standard_normal(shape, dtype=np.float32)
        weights[name] = torch.from_numpy(values) * (0.1 if name.endswith("bias") else 1.0)
    return weights


def _initialised(resolution: int = SMALL.resolution, seed: int = 0) -> Discriminator:
    config = SMALL if resolution == SMALL.resolution else preset(f"mat-{resolution}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Discriminator(config)


def _pictures(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    shape = (batch, 3, SMALL.resolution, SMALL.resolution)
    image, coarse = (torch.rand(shape, generator=source) * 2.0 - 1.0 for _ in range(2))
    return image, coarse, (torch.rand(batch, 1, *shape[2:], generator=source) > 0.5).float()


def _relative_error(value: Tensor, expected: Tensor | NDArray[Any]) -> float:
    expected = torch.as_tensor(expected).double()
    assert value.shape == expected.shape
    return float((value.detach().double() - expected).norm() / expected.norm())


# -- the published networks ------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [256, 512])
def test_the_state_dict_has_the_published_names_and_shapes_and_no_others(resolution: int) -> None:
    published = _published_shapes(resolution)
    with torch.device("meta"):
        ours = Discriminator(preset(f"mat-{resolution}")).state_dict()
    assert len(published) > 60
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == published


def test_logits_and_r1_match_the_published_network() -> None:
    with np.load(_DATA / "discriminator_256.npz") as file:
        vectors = {name: file[name] for name in file.files}
    network = _initialised(256)
    network.load_state_dict(_published_weights(_published_shapes(256)))
    image, coarse = (
        (torch.from_numpy(vectors[name]).float() / 127.5 - 1.0).requires_grad_()
        for name in ("image_u8", "stage1_u8")
    )
    logits = network(image, coarse, torch.from_numpy(vectors["mask_u8"]).float())
    for value, name in zip(logits, ("logits", "logits_stage1"), strict=True):
        assert _relative_error(value, vectors[name]) <= _BAR, name
    gradients = torch.autograd.grad(logits[0].sum() + logits[1].sum(), (image, coarse))
    r1, r1_coarse = (g.square().sum(dim=(1, 2, 3)) for g in gradients)
    assert _relative_error(r1, vectors["r1"]) <= _BAR
    # Of image 2 a value before a leaky ReLU is within rounding of zero, and the reference fell on
    # the other side of it: 4.78872e-5, where FP64 gives 4.78666e-5 as this does.
    others = [0, 1, 3]
    assert _relative_error(r1_coarse[others], vectors["r1_stage1"][others]) <= _BAR
    assert _relative_error(r1_coarse, vectors["r1_stage1"]) <= 1e-3


# -- groups ----------------------------------------------------------------------------------------


def test_the_deviation_is_that_of_groups_of_four_a_quarter_of_the_batch_apart() -> None:
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    y = minibatch_deviation(x)
    assert torch.equal(y[:, :3], x)
    for first in (0, 1):
        group = x[first::2].double()
        expected = (group.var(dim=0, correction=0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(y[first::2, 3].double(), expected.expand(4, 4, 4))
    assert not torch.equal(y[0, 3], y[1, 3])


def test_parts_dealt_in_turn_are_judged_as_the_whole_batch_is() -> None:
    network, inputs = _initialised(), _pictures(16)
    whole = network(*inputs)
    for parts in (2, 4):
        for i in range(parts):
            part = network(*(x[i::parts] for x in inputs))
            for mine, all_of_them in zip(part, whole, strict=True):
                torch.testing.assert_close(mine, all_of_them[i::parts], rtol=1e-5, atol=1e-6)
    # Neighbours are other groups, and the groups do matter.
    assert not torch.allclose(network(*(x[:8] for x in inputs))[0], whole[0][:8], atol=1e-6)


def test_fewer_than_four_images_are_one_group_and_other_batches_are_refused() -> None:
    network = _initialised()
    for batch in (1, 2, 3):
        assert network(*_pictures(batch))[0].shape == (batch, 1)
    with pytest.raises(ValueError, match="at most 4 or a multiple of it, got 6"):
        network(*_pictures(6))


# -- heads -----------------------------------------------------------------------------------------


def test_each_head_sees_its_own_image_and_the_mask() -> None:
    network = _initialised()
    image, coarse, mask = _pictures(4)
    other, other_coarse, other_mask = _pictures(4, seed=1)
    first, second = network(image, coarse, mask)
    a, b = network(other, coarse, mask)
    assert torch.equal(b, second)
    assert not torch.equal(a, first)
    a, b = network(image, other_coarse, mask)
    assert torch.equal(a, first)
    assert not torch.equal(b, second)
    a, b = network(image, coarse, other_mask)
    assert not torch.equal(a, first)
    assert not torch.equal(b, second)


def test_gradients_reach_every_parameter() -> None:
    network = _initialised()
    logits, logits_coarse = network(*_pictures(4))
    (logits.sum() + logits_coarse.sum()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_the_gradient_penalty_trains_all_but_the_last_biases() -> None:
    network = _initialised()
    image, _, mask = _pictures(4)
    penalty, penalty_coarse = gradient_penalty(network, image, mask)
    assert penalty.shape == penalty_coarse.shape == (4,)
    (penalty.sum() + penalty_coarse.sum()).backward()  # type: ignore[no-untyped-call]
    without = {name for name, p in network.named_parameters() if p.grad is None}
    assert {"fc1.bias", "fc1_stg1.bias"} >= without
    trained = [name for name, p in network.named_parameters() if p.grad is not None]
    assert {n.split(".")[0] for n in trained} >= {"Dis", "Dis_stg1", "fc0", "fc0_stg1", "fc1"}


def test_under_autocast_logits_are_float32_and_close() -> None:
    network, inputs = _initialised(), _pictures(4)
    expected = network(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(*inputs)
    for value, exact in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        assert not torch.equal(value, exact)
        assert _relative_error(value, exact.detach()) < 0.2


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="test-128 takes 128x128 pixels, got 64x128"):
        _initialised()(torch.zeros(1, 3, 64, 128), torch.zeros(1, 3, 64, 128), torch.zeros(1, 1))
