"""The model computes what the authors' networks do, on the vectors of tests/data."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mat_torch.attention import Block
from mat_torch.config import PRESETS, GeneratorConfig
from mat_torch.generator import Generator

_DATA = Path(__file__).parents[1] / "data"
_BAR = 1e-5  # two correct FP32 implementations differ by about 2e-6
_BLOCKS = ("w8", "w8s4", "w16", "w16s8", "w16full")
_TAPS = ("conv_first", "enc_conv.0", "enc_conv.1", *(f"tran.{i}" for i in range(5)))
_NOT_OURS = (".resample_filter", ".attn_mask")  # follow from the configuration

Arrays = dict[str, NDArray[Any]]


def _load(name: str) -> Arrays:
    with np.load(_DATA / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def _relative_error(value: Tensor | NDArray[Any], reference: NDArray[Any]) -> float:
    """``‖a − b‖/‖b‖``."""
    value = np.asarray(value)
    assert value.shape == reference.shape
    difference = value.astype(np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64)))


def published_weights(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """The deterministic weights of the reference vectors: each tensor from its name's CRC-32."""
    weights = {}
    for name, shape in shapes:
        bits = np.random.PCG64(zlib.crc32(name.encode()))
        a = np.random.Generator(bits).standard_normal(shape, dtype=np.float32)
        if name.endswith(("noise_strength", "w_avg")):
            a = 0.1 * a
        elif name.endswith("noise_const"):
            pass
        elif name.endswith("affine.bias"):
            a = 1.0 + 0.1 * a
        elif name.startswith("mapping."):
            a = (100.0 if name.endswith("weight") else 5.0) * a
        elif name.endswith("bias"):
            a = 0.1 * a
        weights[name] = torch.from_numpy(np.asarray(a, dtype=np.float32))
    return weights


def _published_shapes(resolution: int) -> dict[str, tuple[int, ...]]:
    lines = (_DATA / f"generator_{resolution}_names.txt").read_text().splitlines()
    entries = [line.split() for line in lines]
    return {
        name: tuple(map(int, shape)) for name, *shape in entries if not name.endswith(_NOT_OURS)
    }


def _uninitialised(config: GeneratorConfig) -> Generator:
    """A generator without data, whose weights are about to be replaced."""
    with torch.device("meta"):
        return Generator(config)


def _generator(resolution: int) -> Generator:
    with torch.random.fork_rng(devices=[]):
        generator = Generator(PRESETS[f"mat-{resolution}"])
    generator.load_state_dict(published_weights(_published_shapes(resolution).items()))
    return generator.eval()


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [256, 512])
def test_the_state_dict_has_the_published_names_and_shapes_and_no_others(resolution: int) -> None:
    published = _published_shapes(resolution)
    ours = _uninitialised(PRESETS[f"mat-{resolution}"]).state_dict()
    assert len(published) > 300
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == published


# -- transformer blocks ----------------------------------------------------------------------------


@cache
def _block_vectors(tag: str) -> Arrays:
    return _load(f"block_{tag}")


def _run_block(tag: str, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, L, C] and their validity [B, L, 1] after the block of this tag."""
    vectors = _block_vectors(tag)
    side = int(vectors["resolution"])
    window, shift = int(vectors["window"]), int(vectors["shift"])
    block = Block(180, 6, window=window, shift=shift, grid=side).eval()
    prefix = f"block.{tag}."
    weights = published_weights((prefix + k, tuple(t.shape)) for k, t in block.state_dict().items())
    block.load_state_dict({name.removeprefix(prefix): t for name, t in weights.items()})
    x = torch.unflatten(torch.from_numpy(vectors["x"]), 1, (side, side))
    valid = None if mask is None else mask.reshape(-1, 1, side, side)
    with torch.no_grad():
        y, valid = block(x, valid)
    return y.flatten(1, 2), None if valid is None else valid.permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize("tag", _BLOCKS)
def test_a_block_matches_with_its_mask(tag: str) -> None:
    vectors = _block_vectors(tag)
    y, valid = _run_block(tag, torch.from_numpy(vectors["mask"]).bool())
    assert valid is not None
    np.testing.assert_array_equal(valid.numpy(), vectors["mask_out"].astype(bool))
    assert _relative_error(y[:, :: int(vectors["stride"])], vectors["y"]) <= _BAR


@pytest.mark.parametrize("tag", _BLOCKS)
def test_a_block_matches_without_a_mask(tag: str) -> None:
    vectors = _block_vectors(tag)
    y, valid = _run_block(tag, None)
    assert valid is None
    assert _relative_error(y[:, :: int(vectors["stride"])], vectors["y_nomask"]) <= _BAR


def test_the_blocks_cover_windows_with_and_without_a_valid_token() -> None:
    """After a block a token is valid just where its window had a valid one."""
    outcomes = {tag: set(np.unique(_block_vectors(tag)["mask_out"])) for tag in _BLOCKS}
    assert outcomes == {tag: {0, 1} for tag in _BLOCKS[:4]} | {"w16full": {1}}


# -- generators ------------------------------------------------------------------------------------


def _inputs(vectors: Arrays) -> dict[str, Any]:
    def gate(name: str) -> Tensor:
        shape = tuple(int(n) for n in vectors[f"{name}_shape"])
        bits = np.unpackbits(vectors[name], count=int(np.prod(shape)))
        return torch.from_numpy(bits.reshape(shape)).float()

    return {
        "image": torch.from_numpy(vectors["image_u8"]).float() / 127.5 - 1.0,
        "mask": torch.from_numpy(vectors["mask_u8"]).float(),
        "z": torch.from_numpy(vectors["z"]),
        "truncation": torch.tensor([float(vectors["psi"])]),
        "gate_tokens": gate("fuse1"),
        "gate_bottleneck": gate("fuse2"),
    }


def _assert_pictures_match(output: Tensor, coarse: Tensor, vectors: Arrays) -> None:
    """Both pictures at the bar, over all pixels and over those of the hole alone."""
    stride = int(vectors["stride"])
    hole = np.broadcast_to(
        vectors["mask_u8"][..., ::stride, ::stride] == 0, vectors["output"].shape
    )
    assert hole.any()
    for value, name in ((output, "output"), (coarse, "stage1")):
        strided = value[..., ::stride, ::stride].numpy()
        assert _relative_error(strided, vectors[name]) <= _BAR, name
        assert _relative_error(strided[hole], vectors[name][hole]) <= _BAR, name


@dataclass
class _Taps:
    """What each layer of stage one gave, by the names and in the layout of the reference taps."""

    values: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, name: str, result: tuple[Tensor, Tensor | None]) -> None:
        """Remember a layer's features and mask; those of the transformer as tokens [B, L, C]."""
        for tensor, kept in zip(result, (self.values, self.masks), strict=True):
            if tensor is not None:
                tokens = name.startswith("tran.")
                kept[name] = tensor.flatten(2).transpose(1, 2) if tokens else tensor


@contextmanager
def _tapped(generator: Generator) -> Iterator[_Taps]:
    taps = _Taps()

    def hook(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, result: taps.keep(name, result)

    stage = generator.synthesis.first_stage
    handles = [stage.get_submodule(name).register_forward_hook(hook(name)) for name in _TAPS]
    yield taps
    for handle in handles:
        handle.remove()


def _sample(tensor: Tensor) -> NDArray[Any]:
    step = max(1, tensor.numel() // 4096)
    return tensor.flatten()[::step][:4096].numpy()


@pytest.fixture(scope="module")
def generator_256() -> Generator:
    return _generator(256)


@pytest.fixture(scope="module")
def run_256(generator_256: Generator) -> tuple[Tensor, Tensor, _Taps]:
    """Output, coarse image and taps on the vectors of generator_256."""
    with torch.no_grad(), _tapped(generator_256) as taps:
        output, coarse = generator_256(**_inputs(_load("generator_256")))
    return output, coarse, taps


def test_the_256_generator_matches_without_truncation(
    run_256: tuple[Tensor, Tensor, _Taps],
) -> None:
    output, coarse, _ = run_256
    _assert_pictures_match(output, coarse, _load("generator_256"))


@pytest.mark.parametrize("name", _TAPS)
def test_every_layer_of_stage_one_matches(name: str, run_256: tuple[Tensor, Tensor, _Taps]) -> None:
    vectors, value = _load("generator_256"), run_256[2].values[name]
    assert value.shape == tuple(vectors[f"tap:{name}.shape"])
    assert _relative_error(_sample(value), vectors[f"tap:{name}.sample"]) <= _BAR


@pytest.mark.parametrize("name", _TAPS[:5])
def test_every_mask_of_stage_one_matches_exactly(
    name: str, run_256: tuple[Tensor, Tensor, _Taps]
) -> None:
    vectors, mask = _load("generator_256"), run_256[2].masks[name]
    assert mask.shape == tuple(vectors[f"tap:{name}_mask.shape"])
    np.testing.assert_array_equal(_sample(mask), vectors[f"tap:{name}_mask.sample"])


def test_no_layer_from_stage_two_on_has_a_mask(run_256: tuple[Tensor, Tensor, _Taps]) -> None:
    assert tuple(run_256[2].values) == _TAPS
    assert tuple(run_256[2].masks) == _TAPS[:5]
    assert not any(f"tap:{name}_mask.sample" in _load("generator_256") for name in _TAPS[5:])


def test_the_256_generator_matches_with_truncation(generator_256: Generator) -> None:
    vectors = _load("generator_256_psi05")
    assert vectors["psi"] == 0.5
    with torch.no_grad():
        output, coarse = generator_256(**_inputs(vectors))
    _assert_pictures_match(output, coarse, vectors)


def test_the_512_generator_matches_without_noise() -> None:
    vectors = _load("generator_512_nonoise")
    generator = _generator(512)
    sides = generator.config.noise_resolutions
    silence = {name: torch.zeros(1, 1, side, side) for name, side in sides.items()}
    with torch.no_grad():
        output, coarse = generator(**_inputs(vectors), noise=silence)
    _assert_pictures_match(output, coarse, vectors)
