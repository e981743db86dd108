from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runner import FakeRunner
from PIL import Image

from mat_export.contract import UserError
from mat_export.inpaint import Inpainter
from mat_export.jobs import Outcome, inpaint_paths, plan_jobs
from mat_export.sheet import ContactSheet


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def inpainter(runner: FakeRunner) -> Inpainter:
    return Inpainter(runner)


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode).save(path)
    return path


def save_mask(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(exist_ok=True)
    mask = Image.new("L", size, 255)
    mask.paste(0, (5, 5, 15, 15))
    mask.save(path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- single pictures -------------------------------------------------------------------------------


def test_a_picture_goes_to_a_file(tmp_path: Path, inpainter: Inpainter) -> None:
    image, mask = save(tmp_path / "i.png"), save_mask(tmp_path / "m.png")
    (outcome,) = inpaint_paths(inpainter, image, mask, tmp_path / "out.png", seed=4)
    assert outcome.outputs == (tmp_path / "out.png",)
    assert (outcome.source, outcome.error, outcome.runs, outcome.notes) == (image, None, 1, ())
    assert outcome.seconds > 0
    with Image.open(tmp_path / "out.png") as result:
        wanted = inpainter(image, mask, seed=4)
        assert result.tobytes() == wanted.tobytes()


def test_a_picture_goes_to_a_folder_under_its_own_name(
    tmp_path: Path, inpainter: Inpainter
) -> None:
    (tmp_path / "out").mkdir()
    image, mask = save(tmp_path / "i.jpg"), save_mask(tmp_path / "m.png")
    (outcome,) = inpaint_paths(inpainter, str(image), str(mask), str(tmp_path / "out"))
    assert outcome.outputs == (tmp_path / "out" / "i.png",)


def test_several_answers_carry_their_seeds(tmp_path: Path, inpainter: Inpainter) -> None:
    image, mask = save(tmp_path / "i.png"), save_mask(tmp_path / "m.png")
    (outcome,) = inpaint_paths(inpainter, image, mask, tmp_path / "o.webp", seed=7, count=3)
    assert [path.name for path in outcome.outputs] == [f"o_seed{n}.webp" for n in (7, 8, 9)]
    assert len({path.read_bytes() for path in outcome.outputs}) == 3
    assert outcome.runs == 3


def test_notes_are_told_once(tmp_path: Path, inpainter: Inpainter) -> None:
    image = save(tmp_path / "i.png")
    Image.new("L", (40, 30), 200).save(tmp_path / "m.png")
    (outcome,) = inpaint_paths(
        inpainter, image, tmp_path / "m.png", tmp_path / "o.jpg", count=2, hole="white"
    )
    assert sum("grey" in note for note in outcome.notes) == 1
    assert sum("lossy" in note for note in outcome.notes) == 2
    assert sum("nothing but hole" in note for note in outcome.notes) == 1


def test_a_mask_is_found_in_a_folder(tmp_path: Path, inpainter: Inpainter) -> None:
    image = save(tmp_path / "i.png")
    save_mask(tmp_path / "masks" / "i.bmp")
    inpaint_paths(inpainter, image, tmp_path / "masks", tmp_path / "o.png")
    other = save(tmp_path / "other.png")
    with pytest.raises(UserError, match="no mask named 'other'"):
        inpaint_paths(inpainter, other, tmp_path / "masks", tmp_path / "o.png")


@pytest.mark.parametrize("out", ["i.png", "m.png"])
def test_an_input_is_never_overwritten(tmp_path: Path, inpainter: Inpainter, out: str) -> None:
    image, mask = save(tmp_path / "i.png"), save_mask(tmp_path / "m.png")
    before = image.read_bytes(), mask.read_bytes()
    with pytest.raises(UserError, match="is an input"):
        inpaint_paths(inpainter, image, mask, tmp_path / out)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is an input"):
        inpaint_paths(inpainter, image, mask, tmp_path / "link" / out)
    assert (image.read_bytes(), mask.read_bytes()) == before
    with pytest.raises(UserError, match="is an input"):
        inpaint_paths(inpainter, image, mask, tmp_path)


def test_a_bad_picture_or_output_is_found_before_the_model_runs(
    tmp_path: Path, inpainter: Inpainter, runner: FakeRunner
) -> None:
    image, mask = save(tmp_path / "i.png", "RGBA"), save_mask(tmp_path / "m.png")
    wrong = save_mask(tmp_path / "wrong.png", (41, 30))
    before = names(tmp_path)
    for picture, its_mask, out, message in (
        (tmp_path / "absent.png", mask, "o.png", "no picture file or folder"),
        (image, tmp_path / "absent.png", "o.png", "no mask file or folder"),
        (image, wrong, "o.png", "40x30 .* 41x30"),
        (image, mask, "o.xyz", "allowed are"),
        (image, mask, "o", "no suffix"),
        (image, mask, "o.jpg", "cannot hold .* RGBA"),
        (image, mask, "absent/o.png", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            inpaint_paths(inpainter, picture, its_mask, tmp_path / out)
    bad: tuple[dict[str, Any], ...] = (
        {"seed": -1},
        {"count": 0},
        {"truncation": 3},
        {"hole": "blue"},
    )
    for options in bad:
        with pytest.raises(UserError):
            inpaint_paths(inpainter, image, mask, tmp_path / "o.png", **options)
    assert names(tmp_path) == before
    assert runner.batches == []


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_is_matched_by_stem_and_goes_on_after_a_bad_one(
    tmp_path: Path, inpainter: Inpainter
) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    save(images / "a.jpg")
    save(images / "b.png")
    save(images / "c.tif", "CMYK")
    save(images / "d.webp")
    save(images / "e.jpg", "CMYK")
    save(images / "f.png")
    (images / "notes.txt").write_text("no picture")
    (images / "broken.png").write_bytes((images / "b.png").read_bytes()[:200])
    (images / "sub").mkdir()
    for stem in ("a", "c", "d", "e", "broken"):
        save_mask(masks / f"{stem}.png")
    save_mask(masks / "f.png", (10, 10))
    save_mask(masks / "unused.png")
    seen: list[tuple[int, int, Outcome]] = []
    outcomes = inpaint_paths(
        inpainter, images, masks, tmp_path / "new" / "out", progress=lambda *a: seen.append(a)
    )
    assert [o.source.name for o in outcomes] == [
        *("a.jpg", "b.png", "broken.png", "c.tif", "d.webp", "e.jpg", "f.png")
    ]
    errors = {o.source.stem: o.error for o in outcomes if o.error}
    assert set(errors) == {"b", "broken", "f"}
    assert "no mask named 'b'" in errors["b"]
    assert "damaged" in errors["broken"]
    assert "40x30" in errors["f"]
    assert names(tmp_path / "new" / "out") == ["a.png", "c.tif", "d.webp", "e.tif"]
    assert [(done, total) for done, total, _ in seen] == [(i + 1, 7) for i in range(7)]
    assert [outcome for *_, outcome in seen] == outcomes


def test_one_mask_serves_a_folder(tmp_path: Path, inpainter: Inpainter) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / "images" / name)
    mask = save_mask(tmp_path / "m.png")
    outcomes = inpaint_paths(inpainter, tmp_path / "images", mask, tmp_path / "out", count=2)
    assert [o.error for o in outcomes] == [None, None]
    assert names(tmp_path / "out") == [f"{s}_seed{n}.png" for s in "ab" for n in (0, 1)]


def test_folders_that_make_no_sense_are_refused(tmp_path: Path, inpainter: Inpainter) -> None:
    images, masks, empty = tmp_path / "images", tmp_path / "masks", tmp_path / "empty"
    image = save(images / "a.png")
    mask = save_mask(masks / "b.png")
    empty.mkdir()
    for picture, its_mask, out, message in (
        (images, masks, tmp_path / "out", "no picture in .* has a mask of its name"),
        (empty, masks, tmp_path / "out", "no picture in the folder"),
        (images, images, tmp_path / "out", "a folder for each"),
        (images, mask, images, "holds the inputs"),
        (images, mask, image, "is a file"),
        (images, mask, tmp_path / "out.png", "has to be one"),
        (images, mask, mask / "out", "cannot be made"),
    ):
        with pytest.raises(UserError, match=message):
            inpaint_paths(inpainter, picture, its_mask, out)
    save(images / "a.jpg")
    with pytest.raises(UserError, match=r"'a\.jpg' and 'a\.png' .* same stem"):
        inpaint_paths(inpainter, images, mask, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_planning_writes_nothing(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    mask = save_mask(tmp_path / "m.png")
    jobs = plan_jobs(tmp_path / "images", mask, tmp_path / "out")
    assert [job.image.name for job in jobs] == ["a.png"]
    assert not (tmp_path / "out").exists()


def test_a_sheet_shows_what_was_filled(tmp_path: Path, inpainter: Inpainter) -> None:
    image, mask = save(tmp_path / "i.png"), save_mask(tmp_path / "m.png")
    sheet = ContactSheet()
    inpaint_paths(inpainter, image, mask, tmp_path / "o.png", count=3, sheet=sheet)
    sheet.save(tmp_path / "sheet.png")
    assert "sheet.png" in names(tmp_path)


def test_a_model_at_fault_is_told_for_every_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / "images" / name)
    broken = Inpainter(FakeRunner(broken=True))
    Image.new("L", (40, 30)).save(tmp_path / "m.png")
    outcomes = inpaint_paths(broken, tmp_path / "images", tmp_path / "m.png", tmp_path / "out")
    assert all("not finite" in (outcome.error or "") for outcome in outcomes)
    assert names(tmp_path / "out") == []
