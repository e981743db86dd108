"""The command line does what its help says; mistakes are one sentence and exit code 2."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from small import SMALL

import cli
from mat_torch import Checkpoint, load_checkpoint, random_checkpoint, save_checkpoint

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run `mat-export` with arguments: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["mat-export", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def picture(tmp_path: Path) -> tuple[Path, Path]:
    """A photograph-like picture of 120×90 and its mask."""
    y, x = np.mgrid[:90, :120]
    pixels = np.stack([x * 2, y * 2, (x + y) % 256], axis=-1).astype(np.uint8)
    keep = np.full((90, 120), 255, np.uint8)
    keep[30:60, 40:80] = 0
    image, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    Image.fromarray(pixels).save(image)
    Image.fromarray(keep).save(mask)
    return image, mask


def one_sentence(code: int, error: str) -> None:
    """What every mistake of the user's must look like."""
    assert code == 2
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert error.rstrip().splitlines()[-1] == lines[0]


# -- export, convert, parity ----------------------------------------------------------------------


def test_onnx_lists_its_rewrites_and_writes_file_and_manifest(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    code, _, error = run(
        "onnx", "--preset", "mat-tiny-256", "--random-weights", 3, "-o", out, "--opset", 17
    )
    assert code == 0, error
    from mat_export.inference import REWRITES

    assert all(name in error for name in REWRITES)
    manifest = json.loads((tmp_path / "out.onnx.json").read_text())
    assert manifest["made_from"]["source"] == "mat-tiny-256, random weights, seed 3"
    assert manifest["opset"] == 17
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx", "out.onnx.json"]


@pytest.mark.usefixtures("stand_in")
def test_onnx_takes_every_option_together(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "all.onnx"
    options = ["--batch", 2, "--size", "dynamic", "--noise", "input", "--io", "uint8", "--coarse"]
    code, _, error = run("onnx", "-o", out, *options, "--opset", 17)
    assert code == 0, error
    code, shown, _ = run("info", out)
    assert code == 0
    words = "".join(shown.split())  # the table folds long lines
    assert "opset17" in words
    assert "imageuint8[2,height,width,3]" in words
    assert "noise_16float32[2,1,height_16,width_16]" in words
    assert "coarseuint8[2,height,width,3]" in words


def test_convert_keeps_the_weights(run: Run, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_checkpoint(tiny_checkpoint, source)
    code, _, error = run("convert", source, "-o", target)
    assert code == 0, error
    assert load_checkpoint(target).digest == tiny_checkpoint.digest


def test_parity_passes_on_the_export_and_writes_its_figures(
    run: Run, small_onnx: Path, tmp_path: Path
) -> None:
    figures, page = tmp_path / "parity.json", tmp_path / "page"
    code, out, error = run("parity", small_onnx, "--json", figures, "--report", page)
    assert code == 0, error
    assert "checkerboard" in out
    assert "parity passed" in error
    assert json.loads(figures.read_text())["passed"] is True
    assert (page / "index.html").stat().st_size > 10_000


def test_parity_exits_with_1_where_models_differ(
    run: Run, small_onnx: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.onnx"
    model = onnx.load(small_onnx)
    for weight in (t for t in model.graph.initializer if len(t.dims) == 4):
        values = numpy_helper.to_array(weight) * np.float32(1.1)
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, other)
    figures = tmp_path / "parity.json"
    code, out, error = run("parity", other, "--reference", small_onnx, "--json", figures)
    assert code == 1
    assert "FAILED" in error
    assert "over 0.0001" in out
    verdict = json.loads(figures.read_text())
    assert verdict["passed"] is False
    assert any("relative error" in text for text in verdict["cases"][0]["failures"])


def test_parity_refuses_a_reference_of_other_weights(
    run: Run, small_onnx: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save_checkpoint(random_checkpoint(SMALL, 9), other)
    code, _, error = run("parity", other, "--reference", small_onnx)
    one_sentence(code, error)
    assert "does not hold the candidate's weights" in error


# -- inpaint, bench, info, doctor -----------------------------------------------------------------


def test_inpaint_fills_and_keeps(
    run: Run, tiny_onnx: Path, picture: tuple[Path, Path], tmp_path: Path
) -> None:
    image, mask = picture
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    out.mkdir()
    code, _, error = run(
        "inpaint", image, mask, "-o", out, "--model", tiny_onnx, "--count", 2, "--sheet", sheet
    )
    assert code == 0, error
    results = sorted(out.iterdir())
    assert len(results) == 2
    before, keep = np.asarray(Image.open(image)), np.asarray(Image.open(mask)) > 0
    answers = [np.asarray(Image.open(path)) for path in results]
    for answer in answers:
        assert (answer[keep] == before[keep]).all()
        assert (answer[~keep] != before[~keep]).any()
    assert (answers[0] != answers[1]).any()
    assert Image.open(sheet).width > 200


def test_a_folder_goes_on_after_a_bad_picture_and_says_so(
    run: Run, tiny_onnx: Path, picture: tuple[Path, Path], tmp_path: Path
) -> None:
    image, mask = picture
    images, masks, out = (tmp_path / name for name in ("images", "masks", "out"))
    for folder in (images, masks):
        folder.mkdir()
    for stem in ("a", "c"):
        (images / f"{stem}.png").write_bytes(image.read_bytes())
        (masks / f"{stem}.png").write_bytes(mask.read_bytes())
    (images / "b.png").write_bytes(image.read_bytes()[:200])
    (masks / "b.png").write_bytes(mask.read_bytes())
    code, _, error = run("inpaint", images, masks, "-o", out, "--model", tiny_onnx)
    assert code == 2
    assert "failed: b.png" in error
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "c.png"]


def test_bench_shows_a_table_and_writes_figures(run: Run, tiny_onnx: Path, tmp_path: Path) -> None:
    figures = tmp_path / "bench.json"
    code, out, error = run("bench", tiny_onnx, "--runs", 2, "--warmup", 0, "--json", figures)
    assert code == 0, error
    assert "p50 ms" in out
    assert len(json.loads(figures.read_text())["models"][0]["milliseconds"]) == 2


def test_info_reads_everything_we_write(
    run: Run, tiny_checkpoint: Checkpoint, tiny_onnx: Path, picture: tuple[Path, Path]
) -> None:
    weights = picture[0].with_name("tiny.safetensors")
    save_checkpoint(tiny_checkpoint, weights)
    for file, words in (
        (tiny_onnx, ("ONNX model", "mat-tiny-256", "gate_tokens", "matches")),
        (Path(f"{tiny_onnx}.json"), ("manifest", "sha256", "mat-tiny-256")),
        (weights, ("checkpoint", "mat-tiny-256", tiny_checkpoint.digest[:12])),
        (picture[0], ("picture", "120×90", "RGB")),
    ):
        code, out, error = run("info", file)
        assert code == 0, error
        assert all(word in out for word in words), (file, out)


def test_doctor_names_what_works(run: Run) -> None:
    code, out, _ = run("doctor")
    assert code == 0
    assert "ONNX Runtime, CPU" in out
    assert "ran a model" in out


# -- bad input ------------------------------------------------------------------------------------

BAD = {
    "missing model": (["parity", "absent.onnx"], "there is no file 'absent.onnx'"),
    "missing checkpoint": (["onnx", "--checkpoint", "absent.pkl"], "there is no file 'absent.pkl'"),
    "garbage checkpoint": (["onnx", "--checkpoint", "garbage.pkl"], "garbage.pkl: the pickle "),
    "garbage model": (["parity", "garbage.onnx"], "is not a readable ONNX model"),
    "unknown preset": (["onnx", "--preset", "mat-1024"], "mat-512, mat-256, mat-tiny-256"),
    "preset without weights": (["onnx", "--preset", "mat-256"], "--random-weights"),
    "two sources": (["onnx", "--checkpoint", "garbage.pkl", "--preset", "mat-256"], "not both"),
    "negative seed of weights": (["onnx", "--random-weights", "-1"], "a seed is a whole number"),
    "batch of nothing": (["onnx", "--batch", "0"], "a number from 1 up, got '0'"),
    "batch in words": (["onnx", "--batch", "many"], "is 'dynamic' or a number"),
    "dynamic size, constant noise": (["onnx", "--size", "dynamic"], "--noise input"),
    "old opset": (["onnx", "--opset", "11"], "opset 11 is not from 17"),
    "no folder": (
        ["onnx", "-o", "nowhere/mat.onnx"],
        "'nowhere/mat.onnx' cannot be written: no such file or directory",
    ),
    "truncation": (
        ["inpaint", "i.png", "m.png", "-o", "o.png", "--truncation", "3"],
        "truncation is from 0 to 2",
    ),
    "missing picture": (
        ["inpaint", "absent.png", "m.png", "-o", "o.png"],
        "there is no file or folder 'absent.png'",
    ),
    "info on garbage": (["info", "garbage.pkl"], "garbage.pkl: the pickle "),
    "info on nothing": (["info", "absent"], "there is no file 'absent'"),
    "bench on nothing": (["bench", "absent.onnx"], "there is no file 'absent.onnx'"),
    "parity before an export": (["parity"], "write it with 'mat-export onnx'"),
    "engine before an export": (["trt"], "write it with 'mat-export onnx'"),
    "debug before an export": (["debug"], "write it with 'mat-export onnx'"),
    "convert to nowhere": (
        ["convert", "--random-weights", "0", "-o", "nowhere/x.safetensors"],
        "'nowhere/x.safetensors' cannot be written: no such file or directory",
    ),
    "convert onto itself": (["convert", "garbage.pkl", "-o", "garbage.pkl"], "is an input"),
    "sheet over the picture": (
        ["inpaint", "i.png", "m.png", "-o", "o.png", "--sheet", "i.png"],
        "is an input",
    ),
    "sheet of no format": (
        ["inpaint", "i.png", "m.png", "-o", "o.png", "--sheet", "s.xyz"],
        "has the suffix '.xyz'; allowed are",
    ),
    "figures over the model": (["parity", "garbage.onnx", "--json", "garbage.onnx"], "is an input"),
    "figures nowhere": (
        ["parity", "garbage.onnx", "--json", "nowhere/figures"],
        "'nowhere/figures' cannot be written: no such file or directory",
    ),
    "page in a file": (
        ["parity", "garbage.onnx", "--report", "garbage.pkl"],
        "cannot make the folder 'garbage.pkl'",
    ),
    "empty model": (["info", "empty.onnx"], "it is empty"),
    "odd JSON": (["info", "odd.json"], "no manifest"),
    "deep JSON": (["info", "deep.json"], "not readable JSON"),
    "sizes differ": (
        ["inpaint", "i.png", "large.png", "-o", "o.png"],
        "8x8 pixels and the mask 9x9",
    ),
    "garbage model to inpaint": (
        ["inpaint", "i.png", "m.png", "-o", "o.png", "--model", "garbage.onnx"],
        "ONNX Runtime cannot load 'garbage.onnx'",
    ),
}


@pytest.mark.parametrize(("arguments", "word"), BAD.values(), ids=BAD)
@pytest.mark.usefixtures("stand_in")
def test_bad_input_is_one_sentence_and_leaves_nothing(
    arguments: list[str], word: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("garbage.pkl", "garbage.onnx"):
        (tmp_path / name).write_bytes(b"\x80\x04 this is neither pickle nor model")
    for name, side in (("i.png", 8), ("m.png", 8), ("large.png", 9)):
        Image.new("L", (side, side)).save(tmp_path / name)
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "odd.json").write_text('{"sha256": 1, "versions": []}')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    before = sorted(os.listdir(tmp_path))
    code, _, error = run(*arguments)
    one_sentence(code, error)
    assert word in error
    assert sorted(os.listdir(tmp_path)) == before


def test_usage_errors_exit_with_2(run: Run) -> None:
    code, _, error = run("onnx", "--no-such-option")
    assert code == 2
    assert "Traceback" not in error
