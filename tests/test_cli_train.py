"""``mat-export train``: a run from the command line, cut and resumed, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import SMALL
from training_data import options
from typer.testing import CliRunner

import cli
from mat_export.contract import UserError
from mat_torch import load_checkpoint
from mat_torch.checkpoint import random_checkpoint, save_checkpoint
from mat_torch.training_options import TRAINING_PRESETS, TrainingError
from mat_torch.training_run import changed
from mat_torch.training_state import read_options


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three small pictures, and a preset that trains on them in seconds."""
    quick = options(images=8, log_every=4, grid_every=8)
    monkeypatch.setitem(TRAINING_PRESETS, "quick", quick)
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 255, (140, 150 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def train(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["train", "--workers", "0", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_a_run_logs_saves_and_gives_a_model(pictures: Path, tmp_path: Path) -> None:
    run, model = tmp_path / "run", tmp_path / "model.safetensors"
    code, said = train("--data", pictures, "--preset", "quick", "-o", run, "--export", model)
    assert code == 0, said
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["images"] == 8
    assert list((run / "grids").glob("*.png"))
    assert load_checkpoint(model).config == SMALL


def test_it_goes_on_where_it_stopped(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    common = ["--data", pictures, "--preset", "quick", "-o", run]
    assert train(*common, "--images", 4)[0] == 0
    with pytest.raises(UserError, match="already holds a run"):
        train(*common)
    code, said = train(*common, "--resume")
    assert code == 0, said
    assert len((run / "log.jsonl").read_text().splitlines()) == 2


def test_a_model_is_fine_tuned_as_the_network_it_is(pictures: Path, tmp_path: Path) -> None:
    first, tuned = tmp_path / "first.safetensors", tmp_path / "tuned.safetensors"
    given = random_checkpoint(replace(SMALL, name="given", mapping_layers=3), 1)
    save_checkpoint(given, first)
    common = ["--data", pictures, "--preset", "quick", "--init", first]
    code, said = train(*common, "-o", tmp_path / "run", "--set", "learning_rate=0", "--images", 4)
    assert code == 0, said
    assert "begins with first.safetensors, a new discriminator" in said
    # Nothing was learnt: what comes out is what went in, but for the average w.
    code, said = train(
        *common, "-o", tmp_path / "run", "--set", "learning_rate=0", "--resume", "--export", tuned
    )
    assert code == 0, said
    tensors = load_checkpoint(tuned).tensors
    for name, tensor in given.tensors.items():
        if name != "mapping.w_avg":
            torch.testing.assert_close(tensors[name], tensor.half().float(), rtol=0, atol=0)
    # With the run's own checkpoint its discriminator comes along.
    run = max((tmp_path / "run" / "checkpoints").iterdir())
    code, said = train(*common[:-1], run, "-o", tmp_path / "second", "--images", 4)
    assert code == 0, said
    assert "its discriminator" in said
    with pytest.raises(UserError, match="is of given, and the run is of mat-tiny-256"):
        train(*common, "-o", tmp_path / "third", "--network", "mat-tiny-256")


def test_fine_tuning_has_no_warm_up_and_a_full_average(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = options(images=4, warm_up=400, ema_ramp_up=0.05, reconstruction_weight=1.0, compile=True)
    monkeypatch.setitem(TRAINING_PRESETS, "warm", warm)
    save_checkpoint(random_checkpoint(SMALL, 1), tmp_path / "first.safetensors")
    common = ["--data", pictures, "--preset", "warm", "--init", tmp_path / "first.safetensors"]
    assert train(*common, "-o", tmp_path / "run")[0] == 0
    found, origin = read_options(tmp_path / "run" / "checkpoints" / "checkpoint-000000000004.pt")
    assert (found.warm_up, found.ema_ramp_up, found.compile) == (0, None, False)
    assert origin is not None
    assert origin.startswith("first.safetensors, weights ")
    # So it goes on, with or without the file; what is asked for is done all the same.
    (tmp_path / "first.safetensors").unlink()
    code, said = train(*common, "-o", tmp_path / "run", "--images", 8, "--resume")
    assert code == 0, said
    assert "goes on from checkpoint-000000000004.pt, --init is not read" in said
    assert train(*common[:4], "-o", tmp_path / "run", "--images", 12, "--resume")[0] == 0
    with pytest.raises(UserError, match="warm_up was 0 and is now 8"):
        train(*common[:4], "-o", tmp_path / "run", "--resume", "--set", "warm_up=8")


def test_a_run_does_not_go_on_with_other_masks_or_pictures(pictures: Path, tmp_path: Path) -> None:
    common = ["--data", pictures, "--preset", "quick", "-o", tmp_path / "run"]
    assert train(*common, "--images", 4, "--masks", "mixed", "--share", "0.5:1")[0] == 0
    with pytest.raises(UserError, match=r"share was .* masks was 'mixed' and is now 'large'"):
        train(*common, "--resume")
    shutil.copy(pictures / "0.png", pictures / "9.png")
    with pytest.raises(UserError, match="pictures was 3 and is now 4"):
        train(*common, "--resume", "--masks", "mixed", "--share", "0.5:1")


def test_pictures_that_are_damaged_or_small_are_told_of_at_once(
    pictures: Path, tmp_path: Path
) -> None:
    (pictures / "torn.png").write_bytes((pictures / "0.png").read_bytes()[:300])
    Image.new("RGB", (100, 140)).save(pictures / "narrow.png")
    code, said = train("--data", pictures, "--preset", "quick", "-o", tmp_path / "run")
    assert code == 0, said
    lines = [line.strip() for line in said.splitlines()]
    start = lines.index("5 pictures")
    assert lines[start + 1] == "damaged pictures, passed over: 1 (torn.png)"
    assert lines[start + 2] == "smaller than 128×128, padded by reflection: 1 (narrow.png)"
    assert said.count("torn.png") == 1


def test_parts_of_the_network_can_be_left_out(pictures: Path, tmp_path: Path) -> None:
    model = tmp_path / "plain.safetensors"
    common = ["--data", pictures, "--preset", "quick", "--images", 4, "-o", tmp_path / "run"]
    code, said = train(*common, "--set", "attention=plain", "--export", model)
    assert code == 0, said
    assert load_checkpoint(model).config == replace(SMALL, attention="plain")
    with pytest.raises(UserError, match="attention is 'masked' or 'plain', got 'none'"):
        train(*common, "--set", "attention=none")


def test_which_perceptual_loss_serves_is_said(pictures: Path, tmp_path: Path) -> None:
    common = ["--data", pictures, "--preset", "quick", "--images", 4, "-o", tmp_path / "run"]
    code, said = train(*common, "--set", "perceptual_weight=0.1")
    assert code == 0, said
    assert "perceptual loss: EfficientNet-Lite0 (the published one is VGG-19)" in said


def test_of_several_processes_one_speaks(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    common = ["--data", pictures, "--preset", "quick", "--images", 4, "-o", tmp_path / "run"]
    code, said = train(*common, "--export", tmp_path / "model.safetensors")
    assert (code, said) == (0, "")
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "large"], "unknown training preset 'large'"),
        (["--set", "batch=many"], "batch is a whole number, got 'many'"),
        (["--set", "size=3"], "sets nothing"),
        (["--set", "betas=0.5"], "betas is a pair"),
        (["--network", "mat-64"], "unknown preset 'mat-64'; known: mat-512"),
        (["--share", "0.5"], "--share is LOW:HIGH"),
        (["--share", "0.9:0.1"], "share is a range of shares within 0 … 1"),
        (["--jitter", "2"], "jitter is at least 0 and less than 1, got 2"),
        (
            ["--set", "perceptual_weight=0.1", "--vgg", "absent.pth"],
            r"absent.pth: cannot be read \(No such file",
        ),
        (["--init", "absent.pkl"], "absent.pkl: there is no such file"),
        (["--export", "absent/model.safetensors"], "cannot be written: no such file or directory"),
    ],
)
def test_bad_settings_are_a_sentence(
    pictures: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    preset = [] if "--preset" in arguments else ["--preset", "quick"]
    with pytest.raises(UserError, match=words):
        train("--data", pictures, "-o", tmp_path / "run", *preset, *arguments)


def test_an_empty_folder_is_a_sentence(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no picture in '"):
        train("--data", tmp_path / "empty", "--preset", "quick", "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_value_can_be_set() -> None:
    published = TRAINING_PRESETS["published"]
    assert changed(published, ["batch=8", "betas=0.5,0.9"]).betas == (0.5, 0.9)
    assert changed(published, ["ema_ramp_up=none"]).ema_ramp_up is None
    assert changed(published, ["images=25_000_000"]).images == 25_000_000
    assert changed(published, ["tensorboard=yes"]).tensorboard is True
    with pytest.raises(TrainingError, match="true or false"):
        changed(published, ["bf16=maybe"])
