"""The scripts that measure the shipped model: what they find, keep, refuse and show."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from skimage import data as skimage_data
from small import SMALL
from training_data import options

from mat_export.contract import UserError
from mat_export.evaluating import EvaluationSet
from mat_torch import random_checkpoint, save_checkpoint
from mat_torch.scores import Evaluation, Scores
from mat_torch.training_state import TrainingState, save_state

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

Load = Callable[[str], Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """A script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "coffee", "chelsea"):
        pixels = getattr(skimage_data, name)()[:256, :256]
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small-000300.safetensors"
    save_checkpoint(random_checkpoint(SMALL, 1), path, dtype="float16")
    return path


def scores(frechet: float, psnr: float) -> Scores:
    found: dict[str, Any] = {field.name: None for field in fields(Scores)}
    found |= {"label": "all", "pictures": 9, "hole_ratio": 0.4, "psnr_whole": 30.0}
    found |= dict.fromkeys(("ssim", "ssim_whole", "l1", "l1_whole"), 0.5)
    return Scores(**{**found, "frechet": frechet, "psnr": psnr})


def evaluation(name: str, frechet: float, psnr: float) -> Evaluation:
    overall = scores(frechet, psnr)
    return Evaluation(name, "F", "0", "distance", None, 0, 1, overall, (overall,), ())


# -- the table and the bars -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frechet", "psnr", "missed"),
    [
        (9.9, 19.1, []),
        (10.1, 19.1, ["untrained"]),
        (26.0, 19.1, ["Stokes", "untrained"]),
        (31.0, 18.9, ["Telea", "Stokes", "untrained", "PSNR"]),
    ],
)
def test_the_bars_are_those_of_the_issue(
    load: Load, frechet: float, psnr: float, missed: list[str]
) -> None:
    untrained = evaluation("untrained", 100.0, 5.0)
    classical = [evaluation("Telea", 60.0, 20.0), evaluation("Stokes", 50.0, 21.0)]
    bars = load("quality").bars(evaluation("model", frechet, psnr), untrained, classical)
    assert len(bars) == 4
    assert [b.what for b in bars if not b.passed] == [
        b.what for b in bars if any(word in b.what for word in missed)
    ]
    assert sum(not b.passed for b in bars) == len(missed)


def test_methods_are_measured_and_rows_are_kept(
    load: Load, photographs: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load("quality")
    monkeypatch.setattr(script, "CHUNK", 4)
    words = [str(photographs), "-o", str(tmp_path), "--model", str(weights), "--workers", "0"]
    words += ["--count", "6", "--answers", "2", "--batch", "4"]
    assert script.main(words) == 1  # an untrained model meets no bar
    report = json.loads((tmp_path / "quality.json").read_text())
    names = ["test-128", "untrained", "Telea", "Navier-Stokes"]
    blurred = ["photograph, blurred 1", "photograph, blurred 3"]
    assert [method["name"] for method in report["methods"]] == [*names, *blurred]
    distances = [method["overall"]["frechet"] for method in report["methods"]]
    assert 0.0 < distances[4] < distances[5] < min(distances[:4])
    assert report["passed"] is False
    assert len(report["crops"]["perceptual"]) == 6
    assert report["methods"][0]["overall"]["diversity"] > 0.0
    page = (tmp_path / "quality.md").read_text()
    assert "6 crops of 3 held-out photographs" in page
    assert page.count("MISSED") == sum(not bar["passed"] for bar in report["bars"])
    assert "Navier-Stokes, all" in page
    assert script.markdown(report) + "\n" == page

    # A second run measures nothing again, and finds the same.
    monkeypatch.setattr(script, "measure", None)
    assert script.main(words) == 1
    again = json.loads((tmp_path / "quality.json").read_text())
    assert again["methods"] == report["methods"]


def test_rows_of_other_crops_are_not_taken(
    load: Load,
    photographs: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = load("quality")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "settings.json").write_text(json.dumps({"count": 5, "seed": 0}))
    words = [str(photographs), "-o", str(tmp_path), "--model", str(weights), "--count", "6"]
    assert script.main([*words, "--workers", "0"]) == 2
    said = capsys.readouterr().err
    assert "error: " in said
    assert "another count" in said
    assert not (tmp_path / "quality.json").exists()


def test_snapshots_make_a_curve(
    load: Load, photographs: Path, weights: Path, tmp_path: Path
) -> None:
    state = TrainingState.start(options())
    state.counters.images = 2000
    later = save_state(state, tmp_path)
    words = [str(photographs), "-o", str(tmp_path), "--curve", str(later), str(weights)]
    assert load("quality").main([*words, "--count", "4", "--workers", "0"]) == 0
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert [point["images"] for point in curve["points"]] == [300, 2000]
    assert all(point["frechet"] > 0.0 for point in curve["points"])


def test_a_snapshot_has_to_say_its_images(load: Load) -> None:
    script = load("quality")
    assert script.images_of(Path("run2/checkpoint-000000200000.pt")) == 200_000
    assert script.images_of(Path("mat-tiny-256-400000.safetensors")) == 400_000
    with pytest.raises(UserError, match="how many images"):
        script.images_of(Path("ema.safetensors"))


# -- crops held for several methods ---------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_held_crops_are_those_that_would_be_drawn(photographs: Path, workers: int) -> None:
    drawn, held = (EvaluationSet(photographs, 64, 5, seed=4) for _ in range(2))
    held.hold(workers)
    for i in (3, 0, 4):
        assert np.array_equal(held.picture(i), drawn.picture(i))
        assert np.array_equal(held.mask(i), drawn.mask(i))
    assert len(list(held.pictures(range(1, 3)))) == 2
    assert held.photographs == ("astronaut.png", "chelsea.png", "coffee.png")


# -- the sheet ------------------------------------------------------------------------------------


def test_a_sheet_shows_best_worst_and_what_is_between(load: Load) -> None:
    script = load("samples")
    distances = [float((7 * i) % 50) for i in range(50)]
    ratios = [0.1 if distance in (0.0, 49.0) else 0.4 for distance in distances]
    best, between, worst = script.chosen(distances, ratios)
    assert [distances[i] for i in best] == [1.0, 2.0, 3.0, 4.0]  # 0 has too small a hole
    assert [distances[i] for i in worst] == [45.0, 46.0, 47.0, 48.0]
    assert len(set(between)) == 24
    assert min(distances[i] for i in between) == 5.0
    assert max(distances[i] for i in between) == 44.0
    with pytest.raises(UserError, match="32 crops with holes of 20% or more, and 20 were"):
        script.chosen(distances[:20], [0.5] * 20)


def test_the_sheet_is_drawn_from_the_report(
    load: Load,
    photographs: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = load("samples")
    settings = {"count": 40, "masks": "large", "seed": 2, "share": [0.5, 1.0], "truncation": 1.0}
    digest = script.read_checkpoint(weights).digest
    report = {
        "model": {"digest": digest},
        "settings": settings,
        "photographs": ["astronaut.png", "chelsea.png", "coffee.png"],
        "crops": {"hole_ratio": [0.4] * 40, "perceptual": [i / 40 for i in range(40)]},
    }
    path = tmp_path / "quality.json"
    path.write_text(json.dumps(report))
    words = [str(path), str(photographs), "--model", str(weights), "--cell", "24", "-o"]
    assert script.main([*words, str(tmp_path / "sheet.jpg"), "--limit-kb", "200"]) == 0
    sheet = Image.open(tmp_path / "sheet.jpg")
    assert sheet.width == 12 * 28 + 4
    assert (tmp_path / "sheet.jpg").stat().st_size < 200_000
    capsys.readouterr()
    for change, says in (
        ({"model": {"digest": "0" * 64}}, "other weights"),
        ({"photographs": ["coffee.png"]}, "other photographs"),
    ):
        path.write_text(json.dumps({**report, **change}))
        assert script.main([*words, str(tmp_path / "no.jpg")]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "no.jpg").exists()


def test_a_sample_keeps_what_is_kept(load: Load, photographs: Path) -> None:
    script = load("samples")
    data = EvaluationSet(photographs, 64, 3)
    report = {
        "settings": {"seed": 0},
        "crops": {"hole_ratio": [0.25] * 3, "perceptual": [0.5] * 3},
    }

    def noise(image: Any, mask: Any, seeds: Any) -> Any:
        return np.random.default_rng(seeds[0]).uniform(-1, 1, image.shape).astype(np.float32)

    sample = script.sample(report, data, noise, 1, 2)
    photograph, hole, *answers = sample.pictures
    keep = data.mask(1)[0] > 0.5
    assert sample.caption == "1: 0.50, 25 % hole"
    assert (hole[~keep] == script.HOLE).all()
    for pixels in (hole, *answers):
        assert np.array_equal(pixels[keep], photograph[keep])
    assert not np.array_equal(*answers)


# -- the curves -----------------------------------------------------------------------------------


def log_of(folder: Path, lines: int) -> None:
    """A log whose losses fall."""
    entries = [
        {
            "step": i,
            "images": 100 * i,
            "loss_generator": 2.0 / i,
            "gradient_generator": 1000.0 / i,
            "images_per_second": 50.0,
            "waiting_share": 0.1,
        }
        for i in range(1, lines + 1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_a_run_is_plotted_and_its_figures_written(load: Load, tmp_path: Path) -> None:
    script = load("training_curves")
    log_of(tmp_path, 1000)
    point = {"frechet": 9.0, "perceptual": 0.5, "psnr": 15.0}
    curve = {"model": "small", "frechet": "distance"}
    curve["points"] = [{"images": n, **point} for n in (50_000, 100_000)]  # type: ignore[assignment]
    (tmp_path / "curve.json").write_text(json.dumps(curve))
    state = TrainingState.start(replace(options(), learning_rate=0.5))
    state.counters.images = 100_000
    save_state(state, tmp_path / "checkpoints")
    words = [
        str(tmp_path),
        "-o",
        str(tmp_path / "c.svg"),
        "--quality",
        str(tmp_path / "curve.json"),
    ]
    words += ["--json", str(tmp_path / "run.json"), "--command", "mat-export train"]
    assert script.main(words) == 0
    tree = ElementTree.parse(tmp_path / "c.svg")
    lines = tree.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 5  # two of the log, three of the snapshots
    assert all(len(line.attrib["points"].split()) <= 200 for line in lines)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["options"]["learning_rate"] == 0.5
    assert found["counters"]["images"] == 100_000
    assert found["hours"] == pytest.approx(100_000 / 50 / 3600)
    assert found["commands"] == ["mat-export train"]


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), ("", "no lines"), ("{", "cannot be read")]
)
def test_a_log_that_is_none_is_said(
    load: Load, content: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    assert load("training_curves").main([str(tmp_path), "-o", str(tmp_path / "c.svg")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "c.svg").exists()
