"""What a model is calibrated on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import SMALL

from calib.samples import (
    FEWEST_PICTURES,
    STRATA,
    Pictures,
    Sample,
    digest_of,
    draw_samples,
    open_pictures,
)
from mat_export.contract import GraphSpec, UserError, check_inputs
from mat_export.images import read_image

SPEC = GraphSpec(SMALL)
OURS = open_pictures(None, 128)


def write(folder: Path, name: str, size: tuple[int, int], seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def ratio(sample: Sample) -> float:
    return float(sample.hole.mean())


def test_every_stratum_and_both_ends_are_there() -> None:
    ratios = [ratio(sample) for sample in draw_samples(SPEC, OURS, 16, seed=0)]
    assert ratios.count(1.0) == 1
    assert ratios.count(0.0) == 1
    for low, high in STRATA:
        assert sum(low <= r < high and r > 0.0 for r in ratios) >= 2
    first = ratios[: len(STRATA) + 1]
    assert [sum(low <= r < high for r in first) for low, high in STRATA] == [1] * len(STRATA)
    assert 1.0 in first


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        GraphSpec(SMALL, batch=None),
        GraphSpec(SMALL, batch=3, io="uint8", noise="input"),
        GraphSpec(SMALL, batch=None, noise="input", dynamic_size=True),
    ],
    ids=str,
)
def test_samples_fit_the_contract(spec: GraphSpec) -> None:
    for sample in draw_samples(spec, OURS, 2, seed=0):
        check_inputs(spec, sample.feeds)
        keep = np.asarray(sample.feeds["mask"]).reshape(-1, 128, 128)[0] > 0.5
        assert (keep == ~sample.hole).all()


def test_a_seed_names_the_samples() -> None:
    once, again = (draw_samples(SPEC, OURS, 3, seed=5) for _ in range(2))
    assert digest_of(once) == digest_of(again)
    assert digest_of(once) != digest_of(draw_samples(SPEC, OURS, 3, seed=6))
    assert digest_of(once) != digest_of(once[:2])
    longer = draw_samples(SPEC, OURS, 7, seed=5)
    assert digest_of(longer[:3]) == digest_of(once)


def test_pictures_masks_latents_and_gates_all_differ() -> None:
    one, other = draw_samples(SPEC, OURS, 2, seed=0)
    for name in ("image", "mask", "z", "gate_tokens", "gate_bottleneck", "truncation"):
        assert (one.feeds[name] != other.feeds[name]).any(), name


def test_a_folder_is_searched_through_and_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    for i in range(FEWEST_PICTURES):
        write(tmp_path, f"deep/{i}.png", (140, 130), i)
    write(tmp_path, "small.png", (127, 400))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    (tmp_path / "notes.txt").write_text("no picture")
    pictures = open_pictures(tmp_path, 128)
    assert sorted(Path(path).name for path in pictures.first(9)) == ["0.png", "1.png", "2.png"]
    small, broken = sorted(pictures.passed_over, key=lambda text: "broken" in text)
    assert "127x400" in small
    assert "broken.jpg" in broken
    assert pictures.source == tmp_path.name
    draw_samples(SPEC, pictures, 2, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen pictures."""
    path = tmp_path_factory.mktemp("pictures")
    for i in range(24):
        write(path, f"{i:02}.png", (128, 130), i)
    return path


def test_the_order_of_pictures_is_that_of_the_seed(folder: Path) -> None:
    by_name = sorted(str(path) for path in folder.iterdir())
    order = open_pictures(folder, 128, 1).first(24)
    assert sorted(order) == by_name
    assert order[:6] == open_pictures(folder, 128, 1).first(6)
    assert order[:6] != open_pictures(folder, 128, 2).first(6)
    assert order[:6] != by_name[:6]
    once, longer = (
        draw_samples(SPEC, open_pictures(folder, 128, 1), count, seed=5) for count in (3, 7)
    )
    assert digest_of(longer[:3]) == digest_of(once)
    named = draw_samples(SPEC, Pictures(folder.name, by_name, 128), 3, seed=5)
    assert digest_of(named) != digest_of(once), "records of pictures by name are refused"


def test_backwards_come_other_pictures_while_there_are_enough(folder: Path) -> None:
    front = open_pictures(folder, 128)
    back = front.backwards()
    assert not {*front.first(16)} & {*back.first(8)}
    assert len({*front.first(16)} & {*back.first(9)}) == 1
    assert front.first(99) == back.first(99)[::-1]
    assert OURS.backwards() is OURS


def test_pictures_that_no_sample_needs_are_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()

    def reading(path: str) -> Image.Image:
        read.add(path)
        return read_image(path)

    monkeypatch.setattr("calib.samples.read_image", reading)
    pictures = open_pictures(folder, 128)
    draw_samples(SPEC, pictures, 6, seed=0)
    assert read == {*pictures.first(6)}


def test_too_few_pictures_come_again(tmp_path: Path) -> None:
    for i in range(FEWEST_PICTURES):
        write(tmp_path, f"{i}.png", (128, 128), i)
    pictures = open_pictures(tmp_path, 128)
    first, again = (np.asarray(pictures.read(i)) for i in (1, FEWEST_PICTURES + 1))
    assert (first == again).all()
    assert (first != np.asarray(pictures.read(2))).any()


def test_pictures_are_upright_rgb(tmp_path: Path) -> None:
    for i in range(FEWEST_PICTURES):
        image = Image.new("L", (200, 130), 40 * i)
        exif = image.getexif()
        exif[0x0112] = 6  # turned by a quarter
        image.save(tmp_path / f"{i}.png", exif=exif)
    picture = open_pictures(tmp_path, 128).read(1)
    assert (picture.mode, picture.size) == ("RGB", (130, 200))


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        open_pictures(tmp_path / "nowhere", 128)


def test_too_few_pictures_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 0 usable pictures of 0, and calibration needs 3"):
        open_pictures(tmp_path, 128)
    write(tmp_path, "one.png", (128, 128))
    write(tmp_path, "tiny.png", (64, 64))
    with pytest.raises(UserError, match=r"1 usable pictures of 2, .*tiny\.png' has 64x64"):
        open_pictures(tmp_path, 128)
