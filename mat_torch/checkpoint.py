"""Checkpoints: a generator's weights with its configuration, from and to files.

Three kinds of file are read, told apart by what is in them: safetensors (ours carry their
configuration), PyTorch state dicts (zip or legacy), and the authors' pickles, which are read as
data (see `mat_torch.pickle_reader`). Whatever the file, the same weights have the same digest.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor

from mat_torch.config import CHOICES, PRESETS, ConfigError, GeneratorConfig
from mat_torch.discriminator import Discriminator
from mat_torch.generator import Generator
from mat_torch.pickle_reader import (
    Module,
    PickleError,
    load_weights_only,
    module_tensors,
    read_pickle,
    shown,
)
from mat_torch.sampling import normal

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "load_checkpoint",
    "load_discriminator",
    "random_checkpoint",
    "save_checkpoint",
    "weights_digest",
]

_DEFAULT_KEY = "G_ema"
_WRAPPERS = (_DEFAULT_KEY, "ema", "state_dict", "params_ema", "model", "generator")
"""Under which of these a .pth file may hold its state dict; the first one found counts."""

_DISCRIMINATOR_KEYS = ("D", "discriminator")
"""Its name in the authors' pickles, and in our checkpoints of training runs."""

_CONSTANTS = (".resample_filter", ".attn_mask")
"""Tensors of the published files that follow from the configuration."""

_CONFIG_KEY = "mat.config"
_DIGEST_KEY = "mat.digest"
_LISTED = 8
_MAX_SIZE = 2**20
"""Upper limit of every number in a file's configuration, so that no shape overflows."""


class CheckpointError(ValueError):
    """A file that gives no generator. One sentence says what was got and what to do."""


class _NoNetworkError(CheckpointError):
    """A file that holds networks, but not this one."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one generator.

    Attributes:
        config: Its sizes.
        tensors: Every entry of its state dict by name: float32, contiguous, finite, on the CPU.
        digest: SHA-256 of the weights (see `weights_digest`), the same for every file format.
        source: Where they came from, for people to read.
    """

    config: GeneratorConfig
    tensors: dict[str, Tensor]
    digest: str
    source: str

    def build(self) -> Generator:
        """A generator with a copy of these weights, in eval mode, its parameters trainable."""
        # Its initial weights are overwritten: drawing them must not move the caller's randomness.
        with torch.random.fork_rng(devices=[]):
            generator = Generator(self.config)
        generator.load_state_dict(self.tensors)
        return generator.eval()


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 as 64 hex digits, over ``name[shape]`` and the float32 little-endian bytes of each.

    Args:
        tensors: Name → tensor of any floating type, on the CPU. Their order does not matter.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to(torch.float32).numpy()
        digest.update(f"{name}[{','.join(map(str, values.shape))}]\n".encode())
        digest.update(np.ascontiguousarray(values, dtype="<f4").data)
    return digest.hexdigest()


def load_checkpoint(path: str | os.PathLike[str], *, key: str = _DEFAULT_KEY) -> Checkpoint:
    """Read a generator's weights. Nothing in the file is ever executed.

    Args:
        path: A safetensors file, a PyTorch state dict (also with ``module.`` before every name, or
            under one of the keys G_ema, ema, state_dict, params_ema, model, generator), a
            checkpoint of a training run of ours (its average), or a pickle as the authors publish
            them. The name of the file does not matter.
        key: Which network of a pickle to read, ``G`` or ``G_ema``; likewise for a state dict that
            holds several. A file with one network only does not need it.

    Raises:
        CheckpointError: If the file cannot be read, is none of these, asks for code, holds no
            generator of a known size, or a tensor is missing, surplus, misshapen, no floating
            type, or not finite.
    """
    path = Path(path)
    try:
        contents = _read(path, key)
        tensors = _by_name(contents.tensors)
        config = contents.config or _recognise(tensors)
        _require_fit(tensors, _expected(config), config.name)
        weights = {name: _float32(name, tensors[name]) for name in _expected(config)}
        digest = weights_digest(weights)
        if contents.digest not in (None, digest):
            raise CheckpointError(
                "the weights do not match the digest recorded beside them, so the file is damaged "
                "or was edited; convert the original checkpoint again"
            )
    except (PickleError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Checkpoint(config, weights, digest, path.name)


def load_discriminator(
    path: str | os.PathLike[str], config: GeneratorConfig
) -> dict[str, Tensor] | None:
    """Read the discriminator beside a generator, as `load_checkpoint` reads that.

    Args:
        path: A pickle as the authors publish them, a checkpoint of a training run of ours, or any
            other file that `load_checkpoint` reads; most hold none.
        config: The generator's, which gives the discriminator's sizes.

    Returns:
        Every entry of its state dict by name, float32 on the CPU; None: there is none.

    Raises:
        CheckpointError: If the file cannot be read, or its discriminator is damaged or another's.
    """
    path = Path(path)
    with torch.device("meta"):
        discriminator = Discriminator(config)
    expected = {name: tuple(tensor.shape) for name, tensor in discriminator.state_dict().items()}
    try:
        for key in _DISCRIMINATOR_KEYS:
            try:
                tensors = _by_name(_read(path, key).tensors)
            except _NoNetworkError:
                continue
            if not _is_discriminator(tensors):  # a file of one network, which needs no key
                continue
            _require_fit(tensors, expected, f"the discriminator of {config.name}")
            return {name: _float32(name, tensors[name]) for name in expected}
    except (PickleError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return None


def save_checkpoint(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Write a safetensors file with the configuration and digest in its metadata.

    The file appears complete or not at all: it is written under another name in the same folder
    and then renamed.

    Args:
        checkpoint: What to write.
        path: Where to; an existing file is replaced.
        dtype: Type of the stored weights. ``float16`` rounds them, so the digest recorded, and
            found again on loading, is that of the rounded weights.

    Raises:
        CheckpointError: If the weights do not fit the configuration, exceed float16, or the file
            cannot be written.
    """
    path = Path(path)
    try:
        _require_fit(checkpoint.tensors, _expected(checkpoint.config), checkpoint.config.name)
        arrays = {name: _stored(name, t, dtype) for name, t in checkpoint.tensors.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error
    digest = weights_digest({name: torch.from_numpy(array) for name, array in arrays.items()})
    metadata = {"format": "pt", _CONFIG_KEY: checkpoint.config.to_json(), _DIGEST_KEY: digest}
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        # Not save_file, which makes files that only their owner may read.
        with temporary.open("xb") as file:
            file.write(safetensors.numpy.save(arrays, metadata))
            # On disk before it has its name, so that a crash of the machine leaves no empty file.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}); choose a folder that exists and has space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def random_checkpoint(config: GeneratorConfig, seed: int) -> Checkpoint:
    """Untrained weights that exercise every path: no tensor is zero, activations stay in range.

    Each tensor is ``normal(seed, "weights." + name)``, scaled by the kind of its name.

    Args:
        config: Sizes of the generator.
        seed: In [0, 2⁶⁴). A seed gives the same weights everywhere, for good.

    Raises:
        ValueError: If the seed is out of range.
    """
    weights = {}
    for name, shape in _expected(config).items():
        # NumPy 1 and 2 differ in what a Python float makes of a float32: float32 all the way.
        factor, offset = map(np.float32, _scale(name))
        values = factor * normal(seed, f"weights.{name}", shape) + offset
        weights[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    source = f"{config.name}, random weights, seed {seed}"
    return Checkpoint(config, weights, weights_digest(weights), source)


def _scale(name: str) -> tuple[float, float]:
    """Factor and offset for the draws of this kind of tensor (learning rates are equalized)."""
    if name.endswith(("noise_strength", "w_avg")):
        return 0.1, 0.0
    if name.endswith(("affine.bias", "norm1.weight", "norm2.weight")):
        return 0.1, 1.0  # the neutral style is 1, and so is a norm's scale
    if name.startswith("mapping."):
        return (100.0 if name.endswith("weight") else 5.0), 0.0  # learning rate 0.01
    return (0.1 if name.endswith("bias") else 1.0), 0.0


# -- files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Contents:
    """What a file holds: tensors by name, and what it says about itself."""

    tensors: Mapping[Any, Any]
    config: GeneratorConfig | None = None
    digest: str | None = None


def _read(path: Path, key: str) -> _Contents:
    if "\0" in str(path):  # Python says so with a bare ValueError
        raise CheckpointError("no file can have this name; check the path")
    try:
        # A pipe or a device would wait for ever, or never end.
        if not stat.S_ISREG(path.stat().st_mode):
            what = "a folder" if path.is_dir() else "no regular file"
            raise CheckpointError(f"this is {what}; give the path of a checkpoint file")
        with path.open("rb") as file:
            return _read_open(path, file, key)
    except FileNotFoundError as error:
        raise CheckpointError("there is no such file; check the path") from error
    except OSError as error:
        raise CheckpointError(f"the file cannot be read ({error.strerror})") from error


# A legacy torch archive begins with a pickle of this number, a pickled long of ten bytes.
_TORCH_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


def _read_open(path: Path, file: IO[bytes], key: str) -> _Contents:
    """Tell the format by the first bytes, and read it."""
    head = file.read(64)
    file.seek(0)
    if not head:
        raise CheckpointError("the file is empty; fetch it again")
    if head.startswith(b"PK\x03\x04") or _TORCH_MAGIC in head[:32]:
        loaded = load_weights_only(file)
        tensors = _state_dict(loaded, key)
        return _Contents(tensors, _run_config(loaded, len(tensors)))
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return _read_safetensors(path)
    if head.startswith(b"\x80"):
        return _Contents(_network(read_pickle(file), key))
    raise CheckpointError(
        "this is no checkpoint (or it is cut short): safetensors, a PyTorch state dict or one of "
        f"the authors' pickles is needed, and it begins with {head[:12]!a}"
    )


def _read_safetensors(path: Path) -> _Contents:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies, for the tensors are otherwise a view of a file that anyone may change.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library raises its own, and those of torch
        raise CheckpointError(
            "the safetensors file is damaged or cut short; fetch it again"
        ) from error
    text = metadata.get(_CONFIG_KEY)
    config = None if text is None else _config(text, len(tensors))
    return _Contents(tensors, config, metadata.get(_DIGEST_KEY))


def _config(text: str, tensors: int) -> GeneratorConfig:
    """The configuration in a file's metadata, if it can be the one of this many tensors."""
    try:
        config = GeneratorConfig.from_json(text)
    except ConfigError as error:
        raise CheckpointError(f"its '{_CONFIG_KEY}' is no usable configuration: {error}") from error
    fields = {k: v for k, v in asdict(config).items() if k not in ("name", *CHOICES)}
    numbers = [*fields.pop("depths"), *fields.pop("windows"), *fields.values()]
    if max(numbers) > _MAX_SIZE:
        raise CheckpointError(f"its '{_CONFIG_KEY}' has whole numbers over {_MAX_SIZE}")
    # A line of text could otherwise ask for a network of a million layers.
    if sum(config.depths) + config.mapping_layers > tensors:
        raise CheckpointError(f"its '{_CONFIG_KEY}' has more layers than it has tensors")
    return config


def _state_dict(loaded: object, key: str) -> Mapping[Any, Any]:
    """The state dict in what a torch archive holds: itself, or under a key."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"the file holds a {type(loaded).__name__} instead of a state dict; "
            "save generator.state_dict()"
        )
    if any(isinstance(value, Tensor) for value in loaded.values()):
        return loaded
    for name in _WRAPPERS if key == _DEFAULT_KEY else (key,):
        if isinstance(loaded.get(name), Mapping):
            inner: Mapping[Any, Any] = loaded[name]
            return inner
    raise _NoNetworkError(
        f"the file holds no state dict under '{key}'; it has {_listed(map(str, loaded))}"
    )


def _run_config(loaded: object, tensors: int) -> GeneratorConfig | None:
    """The configuration in the options of a checkpoint of `train`; None for other files."""
    options = loaded.get("options") if isinstance(loaded, Mapping) else None
    text = options.get("config") if isinstance(options, Mapping) else None
    return _config(text, tensors) if isinstance(text, str) else None


def _network(loaded: object, key: str) -> Mapping[Any, Any]:
    """The tensors of one network of the authors' pickle."""
    networks = {}
    if isinstance(loaded, dict):
        networks = {str(name): value for name, value in loaded.items() if isinstance(value, Module)}
    if not networks:
        raise CheckpointError("the pickle holds no networks; one of the authors' files is needed")
    if key not in networks:
        raise _NoNetworkError(
            f"the pickle holds no network '{key}'; choose one of {_listed(networks)}"
        )
    return module_tensors(networks[key])


# -- names and shapes ------------------------------------------------------------------------------

_ENCODER = re.compile(r"synthesis\.enc\.EncConv_Block_([0-9]{1,5})x\1\.")


_Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Shape of every entry of a network's state dict, by name."""


@functools.lru_cache(maxsize=16)
def _expected(config: GeneratorConfig) -> _Shapes:
    """Name → shape of every entry of a generator's state dict."""
    with torch.device("meta"):
        generator = Generator(config)
    return {name: tuple(tensor.shape) for name, tensor in generator.state_dict().items()}


def _by_name(contents: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors by the names of our state dict: prefix stripped, constants left out."""
    prefix = "module."
    names = [name for name in contents if isinstance(name, str)]
    start = len(prefix) if names and all(name.startswith(prefix) for name in names) else 0
    tensors = {}
    for name, value in contents.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"the entry {shown(str(name))} is a {type(value).__name__}; "
                "a state dict has tensors only, by name"
            )
        if name.endswith(_CONSTANTS):
            continue
        if (
            value.layout is not torch.strided
            or value.is_quantized
            or value.is_nested
            or value.device.type != "cpu"
        ):
            raise CheckpointError(f"the tensor {shown(name)} is sparse, quantized or without data")
        tensors[name[start:]] = value
    return tensors


def _is_discriminator(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(("Dis.", "Dis_stg1.")) for name in tensors)


def _recognise(tensors: Mapping[str, Tensor]) -> GeneratorConfig:
    """The preset of the native size in the names whose names and shapes fit best."""
    sizes = {int(match[1]) for match in map(_ENCODER.match, tensors) if match}
    if not sizes:
        if _is_discriminator(tensors):
            raise CheckpointError("this is a discriminator; choose a generator, such as 'G_ema'")
        raise CheckpointError(
            "this is no MAT generator, whose tensors are named synthesis.enc.EncConv_Block_…; "
            f"it has {_listed(tensors) or 'no tensors'}"
        )
    native = max(sizes)
    candidates = [config for config in PRESETS.values() if config.resolution == native]
    if not candidates:
        known = sorted({config.resolution for config in PRESETS.values()})
        raise CheckpointError(
            f"its native size is {native}; {' and '.join(map(str, known))} are known, and other "
            f"sizes need a safetensors file with '{_CONFIG_KEY}'"
        )
    return min(candidates, key=lambda config: len(_differences(tensors, _expected(config)).all))


@dataclass(frozen=True)
class _Differences:
    """Names that keep tensors from being those of a configuration."""

    missing: list[str]
    surplus: list[str]
    misshapen: list[str]

    @property
    def all(self) -> list[str]:
        return [*self.missing, *self.surplus, *self.misshapen]


def _differences(tensors: Mapping[str, Tensor], expected: _Shapes) -> _Differences:
    return _Differences(
        missing=[name for name in expected if name not in tensors],
        surplus=[name for name in tensors if name not in expected],
        misshapen=[
            n for n, shape in expected.items() if n in tensors and tensors[n].shape != shape
        ],
    )


def _require_fit(tensors: Mapping[str, Tensor], expected: _Shapes, network: str) -> None:
    differences = _differences(tensors, expected)
    if not differences.all:
        return
    shapes = [f"{n} {[*tensors[n].shape]} not {[*expected[n]]}" for n in differences.misshapen]
    parts = [
        f"{len(names)} {kind} ({_listed(names)})"
        for kind, names in (
            ("missing", differences.missing),
            ("surplus", differences.surplus),
            ("misshapen", shapes),
        )
        if names
    ]
    raise CheckpointError(
        f"its tensors are not those of {shown(network)}: {'; '.join(parts)}; "
        "use a whole checkpoint of that network"
    )


def _listed(names: Iterable[str]) -> str:
    """The first few names, quoted where a file could have made them up, and how many more."""
    names = list(names)
    text = ", ".join(
        n if n.isascii() and n.isprintable() and len(n) < 200 else shown(n) for n in names[:_LISTED]
    )
    return text + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


# -- values ----------------------------------------------------------------------------------------


def _float32(name: str, tensor: Tensor) -> Tensor:
    """The tensor as float32, contiguous."""
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"the tensor {name} is {str(tensor.dtype).removeprefix('torch.')}; "
            "weights are floating-point numbers"
        )
    values = tensor.detach().to(torch.float32).contiguous()
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(
            f"the tensor {name} is not finite in float32 (NaN or infinite); "
            "take a checkpoint from before training diverged"
        )
    return values


def _stored(name: str, tensor: Tensor, dtype: str) -> Any:
    """The array that a file of this type holds."""
    if dtype not in ("float32", "float16"):
        raise CheckpointError(f"weights are stored as float32 or float16, not {dtype}")
    values = _float32(name, tensor.cpu())
    if dtype == "float16":
        values = values.to(torch.float16)
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"the tensor {name} exceeds float16 (65504); store float32")
    return values.numpy()
