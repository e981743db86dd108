"""Checkpoints of every format give the same weights, and bad files one sentence."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import io
import json
import os
import pickle
import re
import stat
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import SMALL
from torch import Tensor, nn
from training_data import options

from mat_torch.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_discriminator,
    random_checkpoint,
    save_checkpoint,
    weights_digest,
)
from mat_torch.config import PRESETS
from mat_torch.discriminator import Discriminator
from mat_torch.generator import Generator
from mat_torch.sampling import normal
from mat_torch.training_state import TrainingState, save_state


@pytest.fixture(scope="module", autouse=True)
def _small_is_a_preset() -> Iterator[None]:
    """State dicts and pickles do not say their sizes, so these must be among the known ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, SMALL.name, SMALL)
        yield


@pytest.fixture(scope="module")
def small() -> Checkpoint:
    return random_checkpoint(SMALL, 0)


# -- the authors' pickles, from weights of ours ----------------------------------------------------


class _EasyDict(dict[str, Any]):
    pass


_EasyDict.__module__, _EasyDict.__name__, _EasyDict.__qualname__ = (
    "dnnlib.util",
    "EasyDict",
    "EasyDict",
)


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
    raise AssertionError("the authors' loader is never called")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


@contextmanager
def _authors_modules() -> Iterator[None]:
    modules = {
        name: types.ModuleType(name)
        for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }
    vars(modules["torch_utils.persistence"])["_reconstruct_persistent_obj"] = (
        _reconstruct_persistent_obj
    )
    vars(modules["dnnlib.util"])["EasyDict"] = _EasyDict
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


class _Persistent:
    """A module reduced to what the authors' code leaves of it in a pickle."""

    def __init__(self, class_name: str, source: str, state: dict[str, Any]) -> None:
        self.meta = _EasyDict(
            type="class", version=6, module_src=source, class_name=class_name, state=state
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct_persistent_obj, (self.meta,)


def _persistent(module: nn.Module, source: str) -> Any:
    """The tree of a generator of ours as the authors' classes hold it, constants included."""
    children = OrderedDict(
        (name, None if child is None else _persistent(child, source))
        for name, child in module._modules.items()
    )
    if type(module) in (nn.Sequential, nn.ModuleList):
        container = type(module)().eval()
        container._modules.update(children)
        return container
    state = {name: value for name, value in vars(module).items() if name.startswith("_")}
    # What we derive, and so do not save, theirs holds under these names.
    derived = sorted(module._non_persistent_buffers_set)
    buffers = OrderedDict((n, b) for n, b in module._buffers.items() if n not in derived)
    for name, published in zip(derived, ("resample_filter", "attn_mask"), strict=False):
        buffers[published] = module._buffers[name]
    state |= {
        "training": False,
        "_buffers": buffers,
        "_non_persistent_buffers_set": set(),
        "_modules": OrderedDict(children, act=nn.GELU(), softmax=nn.Softmax(dim=-1)),
        "weight_gain": np.sqrt(np.float64(0.5)),
        "size": (64, 64),
    }
    return _Persistent(type(module).__name__, source, state)


def _discriminator(source: str) -> _Persistent:
    weight = nn.Parameter(torch.ones(4, 4, 1, 1))
    first = _Persistent("Conv", source, {"_parameters": OrderedDict(weight=weight)})
    stem = _Persistent("Stem", source, {"_modules": OrderedDict(conv=first)})
    blocks = nn.Sequential()
    blocks._modules["0"] = stem  # type: ignore[assignment]
    return _Persistent("D", source, {"_modules": OrderedDict(Dis=blocks)})


def _authors_pickle(
    g_ema: Checkpoint,
    g: Checkpoint | None = None,
    source: str = "raise SystemExit",
    d: nn.Module | None = None,
) -> bytes:
    contents = {
        "G": _persistent((g or g_ema).build(), source),
        "D": _discriminator(source) if d is None else _persistent(d, source),
        "G_ema": _persistent(g_ema.build().requires_grad_(False), source),
        "training_set_kwargs": _EasyDict(path="data.zip", resolution=128, xflip=True),
        "augment_pipe": None,
    }
    with _authors_modules():
        return pickle.dumps(contents, 4)


# -- files of each format --------------------------------------------------------------------------


def _torch_file(value: object, *, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def _safetensors_file(checkpoint: Checkpoint, path: Path) -> bytes:
    save_checkpoint(checkpoint, path)
    return path.read_bytes()


_FORMATS = ("safetensors", "zip", "legacy", "pickle")


@pytest.fixture(scope="module")
def files(small: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The small network in each format."""
    folder = tmp_path_factory.mktemp("formats")
    return {
        "safetensors": _safetensors_file(small, folder / "a"),
        "zip": _torch_file(small.tensors),
        "legacy": _torch_file(small.tensors, zipped=False),
        "pickle": _authors_pickle(small),
    }


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _refusal(path: Path, **options: str) -> str:
    """The message with which a file is refused, one line without the path."""
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint(path, **options)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def _written(folder: Path, data: bytes) -> Path:
    path = folder / "file"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", _FORMATS)
def test_every_format_gives_the_same_checkpoint(
    kind: str, files: dict[str, bytes], small: Checkpoint, tmp_path: Path
) -> None:
    loaded = load_checkpoint(_written(tmp_path, files[kind]))
    assert loaded.config == small.config
    assert loaded.digest == small.digest
    assert loaded.source == "file"
    assert _equal(loaded.tensors, small.tensors)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.pkl", "a"])
@pytest.mark.parametrize("kind", _FORMATS)
def test_the_format_is_in_the_content_not_the_name(
    kind: str, name: str, files: dict[str, bytes], small: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(files[kind])
    assert load_checkpoint(str(path)).digest == small.digest


def test_a_pickle_of_the_tiny_preset_loads_equal_and_is_recognised(tmp_path: Path) -> None:
    tiny = random_checkpoint(PRESETS["mat-tiny-256"], 3)
    sentinel = tmp_path / "ran"
    source = f"open({str(sentinel)!r}, 'w').close()"
    loaded = load_checkpoint(_written(tmp_path, _authors_pickle(tiny, source=source)))
    assert loaded.config == tiny.config
    assert loaded.digest == tiny.digest
    assert _equal(loaded.tensors, tiny.tensors)
    assert not sentinel.exists()


# -- which network of a file -----------------------------------------------------------------------


def test_key_picks_the_network_of_a_pickle(small: Checkpoint, tmp_path: Path) -> None:
    other = random_checkpoint(SMALL, 1)
    path = _written(tmp_path, _authors_pickle(small, g=other))
    assert load_checkpoint(path).digest == small.digest
    assert load_checkpoint(path, key="G_ema").digest == small.digest
    assert load_checkpoint(path, key="G").digest == other.digest


def test_an_unknown_key_lists_the_networks(files: dict[str, bytes], tmp_path: Path) -> None:
    message = _refusal(_written(tmp_path, files["pickle"]), key="generator")
    assert "'generator'" in message
    assert "G, D, G_ema" in message
    assert "training_set_kwargs" not in message


def test_a_discriminator_is_refused_as_one(files: dict[str, bytes], tmp_path: Path) -> None:
    assert "discriminator" in _refusal(_written(tmp_path, files["pickle"]), key="D")


@pytest.mark.parametrize("kind", ["pickle", "a run's", "D"])
def test_the_discriminator_beside_a_generator_is_read_too(
    kind: str, small: Checkpoint, tmp_path: Path
) -> None:
    network = Discriminator(SMALL)
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    if kind == "pickle":
        data = _authors_pickle(small, d=network)
    else:
        name = "D" if kind == "D" else "discriminator"
        data = _torch_file({"ema": small.tensors, name: state})
    path = _written(tmp_path, data)
    loaded = load_discriminator(path, SMALL)
    assert loaded is not None
    assert _equal(loaded, state)
    assert load_checkpoint(path).digest == small.digest


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_file_of_one_network_has_no_discriminator(
    kind: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    assert load_discriminator(_written(tmp_path, files[kind]), SMALL) is None


def test_a_discriminator_that_does_not_fit_is_refused(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    path = _written(tmp_path, files["pickle"])
    with pytest.raises(CheckpointError, match="the discriminator of test-128"):
        load_discriminator(path, SMALL)
    path.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_discriminator(path, SMALL)


@pytest.mark.parametrize(
    "wrapper", ["G_ema", "ema", "state_dict", "params_ema", "model", "generator"]
)
def test_a_state_dict_may_lie_under_a_usual_key(
    wrapper: str, small: Checkpoint, tmp_path: Path
) -> None:
    path = _written(tmp_path, _torch_file({"step": 5, wrapper: small.tensors}))
    assert load_checkpoint(path).digest == small.digest


def test_key_picks_among_state_dicts(small: Checkpoint, tmp_path: Path) -> None:
    other = random_checkpoint(SMALL, 1)
    path = _written(tmp_path, _torch_file({"G": other.tensors, "G_ema": small.tensors}))
    assert load_checkpoint(path).digest == small.digest
    assert load_checkpoint(path, key="G").digest == other.digest
    assert "G, G_ema" in _refusal(path, key="H")


def test_of_a_training_run_the_average_is_read(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, name="no preset", mapping_layers=2)
    state = TrainingState.start(options(config=config))
    with torch.no_grad():
        state.ema.mapping.w_avg.fill_(0.5)
    path = save_state(state, tmp_path)
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == config
    assert all(torch.equal(checkpoint.tensors[n], t) for n, t in state.ema.state_dict().items())
    trained = load_checkpoint(path, key="generator").tensors
    assert any(not torch.equal(trained[n], t) for n, t in checkpoint.tensors.items())


def test_the_prefix_of_parallel_training_is_stripped(small: Checkpoint, tmp_path: Path) -> None:
    prefixed = {f"module.{name}": tensor for name, tensor in small.tensors.items()}
    path = _written(tmp_path, _torch_file({"state_dict": prefixed}))
    assert load_checkpoint(path).digest == small.digest


def test_a_prefix_on_some_names_only_is_not_stripped(small: Checkpoint, tmp_path: Path) -> None:
    tensors = dict(small.tensors)
    tensors["module.mapping.w_avg"] = tensors.pop("mapping.w_avg")
    message = _refusal(_written(tmp_path, _torch_file(tensors)))
    assert "1 missing (mapping.w_avg)" in message
    assert "1 surplus (module.mapping.w_avg)" in message


def test_constants_of_the_published_files_are_ignored(small: Checkpoint, tmp_path: Path) -> None:
    constants = {
        "synthesis.first_stage.conv_first.conv.resample_filter": torch.full((4, 4), torch.nan),
        "synthesis.first_stage.tran.0.blocks.1.attn_mask": torch.zeros(1, dtype=torch.int64),
    }
    path = _written(tmp_path, _torch_file(small.tensors | constants))
    assert load_checkpoint(path).digest == small.digest


def test_safetensors_without_metadata_are_a_state_dict(small: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "plain"
    safetensors.torch.save_file(small.tensors, path)
    assert load_checkpoint(path).config == small.config


def test_a_file_of_ours_needs_no_preset(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, name="mine", latent_dim=6)
    save_checkpoint(random_checkpoint(config, 0), tmp_path / "file")
    assert load_checkpoint(tmp_path / "file").config == config


# -- what does not fit -----------------------------------------------------------------------------


def test_missing_surplus_and_misshapen_tensors_are_each_listed(
    small: Checkpoint, tmp_path: Path
) -> None:
    tensors = dict(small.tensors)
    del tensors["mapping.w_avg"]
    tensors["mapping.extra"] = torch.ones(1)
    tensors["mapping.fc0.bias"] = torch.ones(5)
    message = _refusal(_written(tmp_path, _torch_file(tensors)))
    assert "test-128" in message
    assert "1 missing (mapping.w_avg)" in message
    assert "1 surplus (mapping.extra)" in message
    assert "1 misshapen (mapping.fc0.bias [5] not [4])" in message


def test_long_lists_are_cut_and_counted(small: Checkpoint, tmp_path: Path) -> None:
    names = {f"extra.{i:03}": torch.ones(1) for i in range(100)}
    message = _refusal(_written(tmp_path, _torch_file(small.tensors | names)))
    assert "100 surplus (extra.000," in message
    assert "extra.007 and 92 more" in message
    assert "extra.008" not in message


def test_names_in_a_file_cannot_forge_the_message(small: Checkpoint, tmp_path: Path) -> None:
    names = {"a\nAll is well.\x1b[2J": torch.ones(1), "b" * 10_000: torch.ones(1)}
    message = _refusal(_written(tmp_path, _torch_file(small.tensors | names)))
    assert message.isprintable()
    assert len(message) < 1000


def test_the_preset_that_fits_best_is_the_one_compared(tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in Generator(PRESETS["mat-tiny-256"]).state_dict().items()}
    tensors = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    del tensors["mapping.w_avg"]
    message = _refusal(_written(tmp_path, _torch_file(tensors)))
    assert "those of 'mat-tiny-256': 1 missing (mapping.w_avg);" in message


def test_an_unknown_native_size_is_named(small: Checkpoint, tmp_path: Path) -> None:
    tensors = {name.replace("128x128", "4096x4096"): t for name, t in small.tensors.items()}
    message = _refusal(_written(tmp_path, _torch_file(tensors)))
    assert "4096" in message
    assert "256 and 512" in message


def test_another_network_is_no_generator(tmp_path: Path) -> None:
    message = _refusal(_written(tmp_path, _torch_file({"conv1.weight": torch.ones(1)})))
    assert "no MAT generator" in message
    assert "conv1.weight" in message


_W_AVG = "mapping.w_avg"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.ones(4, dtype=torch.int64), "int64"),
        (torch.ones(4, dtype=torch.complex64), "complex64"),
        (torch.tensor([1.0, 2.0, torch.nan, 4.0]), "not finite"),
        (torch.tensor([1.0, 2.0, torch.inf, 4.0]), "not finite"),
        (torch.tensor([1.0, 2.0, 1e300, 4.0], dtype=torch.float64), "not finite"),
        (torch.ones(4).to_sparse(), "sparse"),
        (torch.ones(4, device="meta"), "without data"),
        ([1.0] * 4, "list"),
    ],
)
def test_values_that_are_no_weights_are_refused_by_name(
    value: object, expected: str, small: Checkpoint, tmp_path: Path
) -> None:
    message = _refusal(_written(tmp_path, _torch_file(small.tensors | {_W_AVG: value})))
    assert _W_AVG in message
    assert expected in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_become_float32(
    dtype: torch.dtype, small: Checkpoint, tmp_path: Path
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in small.tensors.items()}
    loaded = load_checkpoint(_written(tmp_path, _torch_file(tensors)))
    assert {tensor.dtype for tensor in loaded.tensors.values()} == {torch.float32}
    assert _equal(loaded.tensors, {name: t.to(torch.float32) for name, t in tensors.items()})


def test_strided_parameters_become_plain_contiguous_tensors(
    small: Checkpoint, tmp_path: Path
) -> None:
    tensors: dict[str, Tensor] = {
        name: nn.Parameter(tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor)
        for name, tensor in small.tensors.items()
    }
    loaded = load_checkpoint(_written(tmp_path, _torch_file(tensors)))
    assert loaded.digest == small.digest
    assert all(t.is_contiguous() and not t.requires_grad for t in loaded.tensors.values())


# -- files that are none ---------------------------------------------------------------------------


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    assert "no such file" in _refusal(tmp_path / "absent")
    assert "check the path" in _refusal(tmp_path / "a\0b")


def test_a_folder_is_said_to_be_one(tmp_path: Path) -> None:
    assert "folder" in _refusal(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in _refusal(tmp_path / "pipe")


def test_a_file_that_may_not_be_read_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _written(tmp_path, b"abc")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read (Permission denied)" in _refusal(path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"a", "no checkpoint"),
        (b"<!DOCTYPE html><html>", "it begins with b'<!DOCTYPE ht'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it begins with b'version http'"),
        (bytes(range(200, 256)) * 20, "no checkpoint"),
        (b"PK\x03\x04" + b"\x00" * 100, "archive is damaged"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{" + b" " * 100, "safetensors file is damaged"),
        (b"\xff" * 7 + b"\x7f{}", "no checkpoint"),
        (b"\x80\x04garbage", "pickle"),
        (pickle.dumps([1, 2], 4), "no networks"),
        (pickle.dumps({"G_ema": 1}, 4), "no networks"),
        (_torch_file([1, 2]), "holds a list"),
        (_torch_file(torch.ones(1)), "holds a Tensor"),
        (_torch_file({"a": 1, "b": {}}), "it has a, b"),
        (_torch_file({}), "no state dict"),
        (_torch_file({"model": {}}), "no tensors"),
        (_torch_file({"a": torch.ones(1), 1: torch.ones(1)}), "'1'"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_a_sentence(
    data: bytes, expected: str, tmp_path: Path
) -> None:
    assert expected in _refusal(_written(tmp_path, data))


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return builtins.eval, (f"open({self.path!r}, 'w').close()",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_payload_is_refused_by_name_and_does_not_run(
    kind: str, small: Checkpoint, tmp_path: Path
) -> None:
    sentinel = tmp_path / "ran"
    contents = {"G_ema": small.tensors, "extra": _Payload(sentinel)}
    data = {
        "zip": lambda: _torch_file(contents),
        "legacy": lambda: _torch_file(contents, zipped=False),
        "pickle": lambda: pickle.dumps(contents, 4),
    }[kind]()
    assert "eval" in _refusal(_written(tmp_path, data))
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no usable configuration"),
        ("[1]", "no usable configuration"),
        ("[" * 100_000, "no usable configuration"),
        ({"resolution": 100}, "no usable configuration"),
        ({"heads": 0}, "no usable configuration"),
        ({"surprise": 1}, "no usable configuration"),
        ({"resolution": 2**40}, "whole numbers"),
        ({"max_channels": 2.0}, "whole numbers"),
        ({"depths": [2, 1, 1, 1, "a"]}, "whole numbers"),
        ({"depths": [2, 1, 1, 1, -1]}, "whole numbers"),
        ({"name": ["test"]}, "is text"),
        ({"mapping_layers": 2**20}, "more layers"),
        ({"depths": [2**20] * 5}, "more layers"),
        ({"latent_dim": 5}, "misshapen"),
        ({"latent_dim": 2**20}, "misshapen"),
    ],
)
def test_a_configuration_in_a_file_is_not_trusted(
    text: str | dict[str, object], expected: str, small: Checkpoint, tmp_path: Path
) -> None:
    if isinstance(text, dict):
        text = json.dumps(json.loads(SMALL.to_json()) | text)
    path = tmp_path / "file"
    safetensors.torch.save_file(small.tensors, path, {"mat.config": text})
    assert expected in _refusal(path)


# -- any damage at all -----------------------------------------------------------------------------

_FUZZ = settings(max_examples=50, deadline=None, database=None)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "file"


@pytest.mark.parametrize("kind", _FORMATS)
@_FUZZ
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused_in_a_sentence(
    kind: str, cut: float, files: dict[str, bytes], scratch: Path
) -> None:
    data = files[kind]
    scratch.write_bytes(data[: int(cut * len(data))])
    assert _refusal(scratch).isprintable()


@pytest.mark.parametrize("kind", _FORMATS)
@_FUZZ
@given(data=st.data())
def test_a_file_with_changed_bytes_loads_or_is_refused_in_a_sentence(
    kind: str, data: st.DataObject, files: dict[str, bytes], scratch: Path
) -> None:
    changed = bytearray(files[kind])
    size = len(changed)
    # The structure is at both ends, save in pickles, and most of the rest is weights.
    position = st.integers(0, 3000) | st.integers(size - 3000, size - 1) | st.integers(0, size - 1)
    for at, bits in data.draw(st.lists(st.tuples(position, st.integers(1, 255)), min_size=1)):
        changed[at] ^= bits
    scratch.write_bytes(changed)
    try:
        loaded = load_checkpoint(scratch)
    except CheckpointError:
        return
    assert loaded.digest == weights_digest(loaded.tensors)
    assert all(bool(tensor.isfinite().all()) for tensor in loaded.tensors.values())


_MAGIC = [
    b"",
    b"PK\x03\x04",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
    b"\x80\x04",
    b"\x80\x05\x95",
]


@_FUZZ
@given(start=st.sampled_from([*_MAGIC, b"\x20" + b"\x00" * 7 + b"{"]), rest=st.binary())
def test_any_bytes_are_refused_in_a_sentence(start: bytes, rest: bytes, scratch: Path) -> None:
    scratch.write_bytes(start + rest)
    assert _refusal(scratch).isprintable()


def test_changed_weights_are_noticed_by_their_digest(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    changed = bytearray(files["safetensors"])
    changed[-4] ^= 1
    assert "digest" in _refusal(_written(tmp_path, bytes(changed)))


# -- saving ----------------------------------------------------------------------------------------


def test_the_metadata_of_a_saved_file_describes_it(small: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(small, path)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "mat.config": SMALL.to_json(),
            "mat.digest": small.digest,
        }


def test_float16_files_hold_the_rounded_weights_and_their_digest(
    small: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(small, path, dtype="float16")
    rounded = {name: t.to(torch.float16).to(torch.float32) for name, t in small.tensors.items()}
    loaded = load_checkpoint(path)
    assert _equal(loaded.tensors, rounded)
    assert loaded.digest == weights_digest(rounded) != small.digest
    save_checkpoint(loaded, path, dtype="float16")
    assert load_checkpoint(path).digest == loaded.digest


def test_weights_beyond_float16_are_refused_not_stored_as_infinity(
    small: Checkpoint, tmp_path: Path
) -> None:
    large = dataclasses.replace(small, tensors=small.tensors | {_W_AVG: torch.full((4,), 7e4)})
    with pytest.raises(CheckpointError, match=r"mapping\.w_avg exceeds float16"):
        save_checkpoint(large, tmp_path / "a", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_do_not_fit_their_configuration_are_not_saved(
    small: Checkpoint, tmp_path: Path
) -> None:
    partial = dataclasses.replace(small, tensors={_W_AVG: small.tensors[_W_AVG]})
    with pytest.raises(CheckpointError, match="missing"):
        save_checkpoint(partial, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_type_is_refused(small: Checkpoint, tmp_path: Path) -> None:
    dtype: Any = "int8"
    with pytest.raises(CheckpointError, match="float32 or float16, not int8"):
        save_checkpoint(small, tmp_path / "a", dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tensors_that_share_memory_can_be_saved(
    dtype: Literal["float32", "float16"], small: Checkpoint, tmp_path: Path
) -> None:
    tied = dict(small.tensors)
    tied["mapping.fc0.bias"] = tied[_W_AVG]
    checkpoint = dataclasses.replace(small, tensors=tied)
    save_checkpoint(checkpoint, tmp_path / "a", dtype=dtype)
    loaded = load_checkpoint(tmp_path / "a").tensors
    assert torch.equal(loaded["mapping.fc0.bias"], loaded[_W_AVG])


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_else(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _written(tmp_path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(small, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("target", ["absent/file", "."])
def test_a_place_that_takes_no_file_is_an_error(
    target: str, small: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(small, tmp_path / target)
    assert list(tmp_path.iterdir()) == []


def test_a_saved_file_has_the_permissions_of_any_new_file(
    small: Checkpoint, tmp_path: Path
) -> None:
    save_checkpoint(small, tmp_path / "a")
    (tmp_path / "b").write_bytes(b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"}
    assert len(modes) == 1


# -- weights ---------------------------------------------------------------------------------------


def test_build_gives_trainable_parameters_in_eval_mode(small: Checkpoint) -> None:
    generator = small.build()
    assert not generator.training
    assert all(parameter.requires_grad for parameter in generator.parameters())
    assert generator.config == small.config
    assert _equal(dict(generator.state_dict()), small.tensors)


def test_training_a_built_generator_leaves_the_checkpoint_alone(small: Checkpoint) -> None:
    with torch.no_grad():
        for tensor in small.build().state_dict().values():
            tensor.zero_()
    assert weights_digest(small.tensors) == small.digest


def test_build_leaves_the_randomness_of_its_caller_alone(small: Checkpoint) -> None:
    state = torch.random.get_rng_state()
    small.build()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_digest_is_defined_by_names_shapes_and_values() -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(1.0)}
    text = b"a[]\n" + np.float32(1).tobytes() + b"b[2,3]\n" + np.arange(6, dtype="<f4").tobytes()
    assert weights_digest(tensors) == hashlib.sha256(text).hexdigest()


_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "shape": lambda t: t.reshape(-1, 1),
    "sign of zero": lambda t: t * -0.0,
    "value": lambda t: t + 1.0,
}


@pytest.mark.parametrize("change", _CHANGES)
def test_any_change_changes_the_digest(change: str) -> None:
    before = {"a": torch.zeros(4)}
    assert weights_digest({"a": _CHANGES[change](before["a"])}) != weights_digest(before)


def test_random_weights_follow_the_recipe(small: Checkpoint) -> None:
    recipe = [
        (r".*noise_strength|.*w_avg", 0.1, 0.0),
        (r".*noise_const", 1.0, 0.0),
        (r".*affine\.bias", 0.1, 1.0),
        (r"mapping\..*weight", 100.0, 0.0),
        (r"mapping\..*bias", 5.0, 0.0),
        (r".*bias", 0.1, 0.0),
        (r".*", 1.0, 0.0),
    ]
    used = set()
    for name, tensor in small.tensors.items():
        pattern, factor, offset = next(rule for rule in recipe if re.fullmatch(rule[0], name))
        used.add(pattern)
        draws = torch.from_numpy(np.asarray(normal(0, f"weights.{name}", tensor.shape)))
        torch.testing.assert_close(tensor, draws * factor + offset, rtol=1e-6, atol=1e-6)
        assert bool(tensor.any()), f"{name} is zero"
    assert len(used) == len(recipe)


def test_random_weights_are_those_of_their_seed(small: Checkpoint) -> None:
    again, other = random_checkpoint(SMALL, 0), random_checkpoint(SMALL, 1)
    assert again.digest == small.digest != other.digest
    assert small.source == "test-128, random weights, seed 0"


def test_a_seed_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match="seed"):
        random_checkpoint(SMALL, -1)
