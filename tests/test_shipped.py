"""The model that ships: it is there, it has learned something, and every command takes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
from PIL import Image
from typer.testing import CliRunner

import cli
from mat_export import shipped
from mat_export.contract import UserError
from mat_export.evaluating import runner_fill
from mat_export.runners import TorchRunner, read_checkpoint
from mat_export.suite import PHOTOGRAPHS, photograph
from mat_torch import Checkpoint, load_checkpoint
from mat_torch.config import preset
from mat_torch.metrics import psnr

Run = Callable[..., str]

LARGEST = 16 * 2**20
"""Bytes that the weights may take in the package."""


def command(*arguments: object) -> str:
    """Run a command: what it said."""
    done = CliRunner().invoke(cli.app, [str(each) for each in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder: what it said."""
    monkeypatch.chdir(tmp_path)
    return command


@pytest.fixture
def picture(tmp_path: Path) -> tuple[Path, Path]:
    """A photograph of 96×96 and its mask."""
    keep = np.full((96, 96), 255, np.uint8)
    keep[30:60, 30:60] = 0
    paths = tmp_path / "photo.png", tmp_path / "mask.png"
    for path, pixels in zip(paths, (photograph("coffee", 96, 96), keep), strict=True):
        Image.fromarray(pixels).save(path)
    return paths


# -- the file itself ------------------------------------------------------------------------------


def test_it_is_there_and_small_and_carries_its_configuration() -> None:
    path = shipped.shipped_model()
    assert path.stat().st_size <= LARGEST
    with safetensors.safe_open(path, framework="numpy") as file:
        types = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert types == {"F16"}
        assert json.loads(file.metadata()["mat.config"])["name"] == shipped.PRESET
    assert load_checkpoint(path).config == preset(shipped.PRESET)


def test_it_fills_photographs_better_than_it_did_untrained(tiny_checkpoint: Checkpoint) -> None:
    side = preset(shipped.PRESET).resolution
    images = np.stack([photograph(name, side, side).transpose(2, 0, 1) for name in PHOTOGRAPHS])
    image = (images / np.float32(127.5) - 1.0).astype(np.float32)
    mask = np.ones((len(image), 1, side, side), np.float32)
    mask[:, :, side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 0.0

    def restored(checkpoint: Checkpoint) -> float:
        fill = runner_fill(TorchRunner(checkpoint))
        filled = fill(image * mask, mask, range(len(image))).clip(-1.0, 1.0)
        return float(psnr(filled, image, mask).mean())

    assert restored(read_checkpoint(shipped.SHIPPED)) > restored(tiny_checkpoint) + 5.0


# -- what commands do with it ---------------------------------------------------------------------


def test_export_and_parity_take_it_where_nothing_is_named(
    run: Run, stand_in: Path, tmp_path: Path
) -> None:
    run("onnx")
    manifest = json.loads((tmp_path / "mat.onnx.json").read_text())
    assert manifest["made_from"]["source"] == stand_in.name
    digest = load_checkpoint(stand_in).digest
    assert manifest["made_from"]["checkpoint_digest"] == digest
    # The reference is the shipped model, found by the name of its file.
    assert "parity passed" in run("parity")
    assert digest[:12] in run("info", "mat.onnx")


def test_pictures_are_filled_with_it(
    run: Run, stand_in: Path, picture: tuple[Path, Path], tmp_path: Path
) -> None:
    assert "untrained" not in run("inpaint", *picture, "-o", "filled.png", "--seed", 3)
    run("inpaint", *picture, "-o", "named.png", "--seed", 3, "--model", stand_in)
    filled, named = (Image.open(tmp_path / name) for name in ("filled.png", "named.png"))
    assert np.array_equal(np.asarray(filled), np.asarray(named))


def test_other_commands_take_it_too(
    run: Run, stand_in: Path, picture: tuple[Path, Path], tmp_path: Path
) -> None:
    digest = load_checkpoint(stand_in).digest
    assert digest in run("info")
    run("convert", "-o", "whole.safetensors")
    assert load_checkpoint(tmp_path / "whole.safetensors").digest == digest
    assert stand_in.name in run("bench", "--runs", 1, "--warmup", 0)
    assert shipped.PRESET in run("evaluate", "--data", picture[0].parent, "--count", 2)


def test_untrained_weights_are_still_to_be_had(run: Run, tmp_path: Path) -> None:
    said = run("convert", "-o", "random.safetensors", "--random-weights", 0)
    assert "untrained" in said
    assert load_checkpoint(tmp_path / "random.safetensors").config == preset(shipped.PRESET)


def test_where_it_is_missing_a_sentence_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "absent" / "mat-tiny-256.safetensors")
    with pytest.raises(
        UserError, match=r"missing from this installation .* install mat-export again"
    ):
        shipped.shipped_model()
