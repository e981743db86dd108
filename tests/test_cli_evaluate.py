"""``mat-export evaluate``: methods side by side on the same crops, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from skimage import data
from typer.testing import CliRunner

import cli
from mat_export.contract import UserError
from mat_export.evaluating import EvaluationSet, runner_fill
from mat_export.runners import OrtRunner


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.jpg")
    return folder


def evaluate(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_a_model_stands_beside_classical_methods(
    photographs: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    target = tmp_path / "figures.json"
    said = evaluate("--data", photographs, "--model", tiny_onnx, "--baselines", "--json", target)
    names = [tiny_onnx.name, "Telea", "Navier-Stokes"]
    assert all(name in said for name in names)
    assert "FID" not in said.replace("no FID", "")  # the features are not Inception's
    figures = json.loads(target.read_text())
    assert [entry["name"] for entry in figures] == names
    untrained, telea, _ = (entry["overall"]["psnr"] for entry in figures)
    assert telea > untrained + 5.0


def test_crops_and_masks_are_those_of_the_seed(photographs: Path) -> None:
    a, b = (EvaluationSet(photographs, 64, 4, seed=1) for _ in range(2))
    for one, other in zip(a.pictures(), b.pictures(), strict=True):
        assert np.array_equal(one, other)
        assert one.shape == (3, 64, 64)
        assert -1.0 <= one.min() < one.max() <= 1.0
    masks = list(a.masks())
    assert len(a) == len(masks) == 4
    assert all(set(np.unique(mask)) == {0.0, 1.0} for mask in masks)
    other_seed = next(EvaluationSet(photographs, 64, 4, seed=2).pictures())
    assert not np.array_equal(other_seed, next(a.pictures()))


def test_a_fixed_batch_is_filled_up(tiny_onnx: Path) -> None:
    with OrtRunner(tiny_onnx) as runner:
        fill = runner_fill(runner)
        side = runner.spec.config.resolution
        image = np.zeros((3, 3, side, side), np.float32)
        mask = np.ones((3, 1, side, side), np.float32)
        mask[:, :, :40, :40] = 0.0
        together = fill(image, mask, [1, 2, 1])
        alone = fill(image[:1], mask[:1], [2])
    assert together.shape == image.shape
    assert np.array_equal(together[0], together[2])
    assert not np.array_equal(together[0], together[1])
    assert np.array_equal(together[1], alone[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--features", "absent.pth"], r"absent.pth: cannot be read \(No such file"),
        (["--model", "absent.onnx"], "there is no file 'absent.onnx'"),
        (["--json", "absent/figures.json"], "cannot be written: no such file or directory"),
    ],
)
@pytest.mark.usefixtures("stand_in")
def test_bad_input_is_a_sentence(photographs: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        evaluate("--data", photographs, *arguments)


def test_an_empty_folder_is_a_sentence(tmp_path: Path, tiny_onnx: Path) -> None:
    with pytest.raises(UserError, match="there is no picture in '"):
        evaluate("--data", tmp_path, "--model", tiny_onnx)
