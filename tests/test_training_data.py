"""Number n of the training stream is one crop and one mask, whoever reads it and from wherever."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image

from mat_torch import data
from mat_torch.data import (
    CountingSampler,
    CropOptions,
    DataError,
    ImageSource,
    TrainingSet,
    WaitMeter,
    loader,
    near_duplicates,
    open_source,
    picture_hash,
    preload,
    split,
)

_PLAIN = CropOptions(flip=False)


def scene(seed: int, height: int = 96, width: int = 128) -> NDArray[np.uint8]:
    """A smooth random picture, unlike those of other seeds, as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    large = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(large)


def write(path: Path, picture: NDArray[np.uint8], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven readable pictures."""
    root = tmp_path / "pictures"
    for seed in range(7):
        write(root / f"{seed}.png", scene(seed))
    return root


@pytest.fixture
def damaged(folder: Path) -> Path:
    """The same, the third and sixth of them cut short or no pictures at all."""
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])
    (folder / "5.png").write_text("not a picture")
    return folder


def same(first: Any, second: Any) -> bool:
    """Whether two items or batches hold the same, to the bit."""
    return all(np.array_equal(np.asarray(first[key]), np.asarray(second[key])) for key in first)


# -- sources ---------------------------------------------------------------------------------------


def test_a_folder_is_looked_through_with_its_subfolders(tmp_path: Path) -> None:
    names = ["a.JPG", "b/c.png", "b/d/e.webp", "f.bmp", "g.tif", "h.jpeg", "i.tiff"]
    for seed, name in enumerate(names):
        write(tmp_path / name, scene(seed))
    (tmp_path / "notes.txt").write_text("no picture")
    source = open_source(tmp_path)
    assert list(source.names) == sorted(names)
    assert len(source) == 7
    np.testing.assert_array_equal(source.read(source.names.index("b/c.png")), scene(1))


def shard(path: Path, seeds: range) -> None:
    with tarfile.open(path, "w") as tar:
        for seed in seeds:
            buffer = io.BytesIO()
            Image.fromarray(scene(seed)).save(buffer, "PNG")
            for name, content in ((f"{seed:03}.png", buffer.getvalue()), (f"{seed:03}.txt", b"x")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def test_tar_shards_are_read_where_they_lie(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", range(3))
    shard(tmp_path / "b.tar", range(3, 5))
    whole = ["a.tar/000.png", "a.tar/001.png", "a.tar/002.png", "b.tar/003.png", "b.tar/004.png"]
    for path, expected in (
        (tmp_path, whole),
        (tmp_path / "*.tar", whole),
        (tmp_path / "b.tar", whole[3:]),
    ):
        source = open_source(path)
        assert list(source.names) == expected
        np.testing.assert_array_equal(source.read(len(source) - 1), scene(4))
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.tar", "b.tar"}


def test_compressed_and_broken_archives_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match=r"no plain tar file .* decompress"):
        open_source(tmp_path / "packed.tar")


def test_nothing_to_read_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="there is no picture in"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="give a folder of pictures"):
        open_source(tmp_path / "missing")
    with pytest.raises(DataError, match="nothing matches"):
        open_source(tmp_path / "*.tar")
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root
    with pytest.raises(DataError, match="cannot be read: give this user access"):
        open_source(tmp_path)


def _modes() -> Iterator[tuple[str, Image.Image, tuple[int, int, int]]]:
    """Flat pictures of every kind, with what they look like."""
    yield "L", Image.new("L", (8, 8), 100), (100, 100, 100)
    yield "1", Image.new("1", (8, 8), 1), (255, 255, 255)
    yield "LA", Image.new("LA", (8, 8), (0, 0)), (255, 255, 255)
    yield "RGBA", Image.new("RGBA", (8, 8), (0, 200, 0, 255)), (0, 200, 0)
    yield (
        "P",
        Image.new("RGB", (8, 8), (9, 8, 7)).convert("P", palette=Image.Palette.ADAPTIVE),
        (*(9, 8, 7),),
    )
    yield "CMYK", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)
    yield "I;16", Image.fromarray(np.full((8, 8), 0x8001, np.uint16)), (128, 128, 128)
    yield "I", Image.fromarray(np.full((8, 8), 65535, np.int32)), (255, 255, 255)
    yield "F", Image.fromarray(np.full((8, 8), 0.4, np.float32)), (102, 102, 102)


@pytest.mark.parametrize(("mode", "image", "colour"), _modes(), ids=lambda v: str(v)[:8])
def test_every_mode_becomes_rgb(
    tmp_path: Path, mode: str, image: Image.Image, colour: tuple[int, int, int]
) -> None:
    assert image.mode == mode
    image.save(tmp_path / "a.tif")
    picture = open_source(tmp_path).read(0)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, np.full((8, 8, 3), colour))


@pytest.mark.parametrize("max_side", [None, 32])
def test_exif_orientation_is_applied(tmp_path: Path, max_side: int | None) -> None:
    stored = np.zeros((40, 64, 3), np.uint8)
    stored[:, :32] = 255  # white on the left, and on top once it is turned by a quarter
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    write(tmp_path / "a.jpg", stored, exif=exif)
    picture = open_source(tmp_path, max_side=max_side).read(0)
    assert picture.shape == ((64, 40, 3) if max_side is None else (32, 20, 3))
    assert picture[:8].mean() > 250
    assert picture[-8:].mean() < 5


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_max_side_scales_down_what_is_larger_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"large.{suffix}", scene(1, 300, 1000), quality=95)
    write(tmp_path / f"small.{suffix}", scene(2, 60, 100), quality=95)
    source = open_source(tmp_path, max_side=100)
    assert [source.read(i).shape for i in (0, 1)] == [(30, 100, 3), (60, 100, 3)]
    expected = np.asarray(Image.fromarray(scene(1, 300, 1000)).resize((100, 30)))
    assert np.abs(source.read(0).astype(int) - expected).mean() < 3


def test_a_picture_cut_short_is_named(damaged: Path) -> None:
    with pytest.raises(DataError, match=r"'2\.png' of the folder .* cannot be read .*: replace"):
        open_source(damaged).read(2)


def test_a_source_refuses_a_longest_side_below_one_pixel(folder: Path) -> None:
    with pytest.raises(DataError, match="max_side"):
        open_source(folder, max_side=0)


# -- preloading ------------------------------------------------------------------------------------


def test_preloading_holds_pictures_up_to_the_limit_and_changes_none(folder: Path) -> None:
    source = open_source(folder)
    size = source.read(0).nbytes
    for limit, count in ((0, 0), (3 * size, 3), (7 * size, 7)):
        held: Any = preload(source, limit, threads=2)
        assert (held.held, held.bytes_held) == (count, count * size)
        assert held.names == source.names
        assert all(np.array_equal(held.read(i), source.read(i)) for i in range(7))


def test_preloaded_pictures_are_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = preload(open_source(folder), threads=1)
    monkeypatch.setattr(data, "decode_picture", lambda *_: pytest.fail("decoded again"))
    assert all(held.read(i).shape == (96, 128, 3) for i in range(7))


def test_preloading_refuses_a_limit_below_zero_and_nothing_but_damage(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(DataError, match="number of bytes"):
        preload(open_source(tmp_path), -1)
    with pytest.raises(DataError, match=r"none of 1 pictures in a row .* can be read"):
        preload(open_source(tmp_path), threads=1)


# -- items -----------------------------------------------------------------------------------------


def test_an_item_is_a_crop_a_mask_and_its_number(folder: Path) -> None:
    item = TrainingSet(open_source(folder), 64, seed=1)[12]
    image, mask = item["image"], item["mask"]
    assert isinstance(image, torch.Tensor)
    assert isinstance(mask, torch.Tensor)
    assert (image.shape, image.dtype) == ((3, 64, 64), torch.uint8)
    assert (mask.shape, mask.dtype) == ((1, 64, 64), torch.uint8)
    assert set(mask.flatten().tolist()) == {0, 1}
    assert item["number"] == 12


def test_items_depend_on_seed_and_number_alone(folder: Path) -> None:
    options = CropOptions(share=(0.7, 1.0), jitter=0.1, masks="mixed")
    first = TrainingSet(open_source(folder), 64, 5, options)
    items = {number: first[number] for number in range(20)}
    again = TrainingSet(preload(open_source(folder), 10**5, threads=2), 64, 5, options)
    for number in reversed(range(20)):
        assert same(items[number], again[number])
    other = TrainingSet(open_source(folder), 64, 6, options)
    assert not any(same(items[number], other[number]) for number in range(20))


def test_large_seeds_and_numbers_have_streams_of_their_own(folder: Path) -> None:
    source = open_source(folder)
    seeds = [TrainingSet(source, 64, seed)[0] for seed in (0, 1, 2**32, 2**64 - 1)]
    numbers = [TrainingSet(source, 64, 0)[number] for number in (7 * 2**32, 2**63 - 1)]
    items = seeds + numbers
    assert not any(
        np.array_equal(np.asarray(a["mask"]), np.asarray(b["mask"]))
        for i, a in enumerate(items)
        for b in items[:i]
    )
    with pytest.raises(IndexError, match=r"2\*\*63"):
        TrainingSet(source, 64, 0)[2**63]
    with pytest.raises(IndexError, match="numbered from 0"):
        TrainingSet(source, 64, 0)[-1]


def test_each_epoch_takes_every_picture_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    for value in range(9):
        write(tmp_path / f"{value}.png", np.full((40, 40, 3), value, np.uint8))
    dataset = TrainingSet(open_source(tmp_path), 32, 0)
    orders = [
        [int(np.asarray(dataset[number]["image"])[0, 0, 0]) for number in range(first, first + 9)]
        for first in (0, 9, 18)
    ]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_crops_are_cut_from_all_over_the_picture(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:96, :128]
    places = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)
    write(tmp_path / "a.png", places)
    dataset = TrainingSet(open_source(tmp_path), 64, 0, _PLAIN)
    corners = set()
    for number in range(400):
        image = np.asarray(dataset[number]["image"])
        top, left = int(image[0, 0, 0]), int(image[1, 0, 0])
        np.testing.assert_array_equal(
            image, places[top : top + 64, left : left + 64].transpose(2, 0, 1)
        )
        corners.add((top, left))
    tops, lefts = zip(*corners, strict=True)
    assert (min(tops), max(tops), min(lefts), max(lefts)) == (0, 32, 0, 64)


@pytest.mark.parametrize(("height", "width"), [(40, 20), (5, 3), (1, 1), (100, 33), (50, 90)])
def test_small_pictures_are_reflected_at_the_bottom_and_right(
    tmp_path: Path, height: int, width: int
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    write(tmp_path / "a.png", picture)
    image = np.asarray(TrainingSet(open_source(tmp_path), 64, 0, _PLAIN)[0]["image"])

    def reflected(count: int) -> list[int]:
        """Where 0, 1, …, n − 1, n − 2, …, 1, 0, 1, … is after each step."""
        period = max(2 * count - 2, 1)
        return [min(i % period, period - i % period) for i in range(64)]

    rows, columns = (reflected(n) if n < 64 else list(range(64)) for n in (height, width))
    whole = picture[np.ix_(rows, columns)].transpose(2, 0, 1)
    if max(height, width) < 64:
        np.testing.assert_array_equal(image, whole)
    else:  # the longer side is cropped at random
        starts = range(max(height, width) - 63)
        crops = [picture[s : s + 64] if height > width else picture[:, s : s + 64] for s in starts]
        candidates = [
            (crop[:, columns] if height > width else crop[rows]).transpose(2, 0, 1)
            for crop in crops
        ]
        assert any(np.array_equal(image, candidate) for candidate in candidates)


def test_small_pictures_are_errors_where_padding_is_not_wanted(tmp_path: Path) -> None:
    write(tmp_path / "a.png", scene(0, 40, 100))
    dataset = TrainingSet(open_source(tmp_path), 64, 0, CropOptions(pad=False))
    with pytest.raises(DataError, match=r"'a\.png' is 100x40 pixels and crops are 64 a side"):
        dataset[0]


def test_a_share_of_the_shorter_side_is_scaled_down_with_antialiasing(tmp_path: Path) -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # mean 127.5; without antialiasing black or white remain
    write(tmp_path / "a.png", stripes)
    options = CropOptions(share=(1, 1), flip=False)
    image = np.asarray(TrainingSet(open_source(tmp_path), 64, 0, options)[0]["image"])
    assert np.abs(image[:, 4:-4, 4:-4].astype(int) - 127.5).max() < 10


def test_a_share_never_enlarges(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (70, 70, 3), dtype=np.uint8)
    write(tmp_path / "a.png", picture)
    options = CropOptions(share=(0.1, 0.2), flip=False)
    image = np.asarray(TrainingSet(open_source(tmp_path), 64, 0, options)[3]["image"])
    crops = [
        picture[top : top + 64, left : left + 64].transpose(2, 0, 1)
        for top in range(7)
        for left in range(7)
    ]
    assert any(np.array_equal(image, crop) for crop in crops)


def test_about_half_of_the_crops_are_mirrored(folder: Path) -> None:
    plain = TrainingSet(open_source(folder), 64, 3, _PLAIN)
    flipped = TrainingSet(open_source(folder), 64, 3)
    mirrored = 0
    for number in range(60):
        before, after = (np.asarray(s[number]["image"]) for s in (plain, flipped))
        turned = np.array_equal(after, before[..., ::-1])
        assert turned or np.array_equal(after, before)
        mirrored += turned
    assert 18 <= mirrored <= 42  # beyond three deviations of 60 fair coins


def test_jitter_changes_colours_mildly_and_nothing_else(folder: Path) -> None:
    plain = TrainingSet(open_source(folder), 64, 3)
    jittered = TrainingSet(open_source(folder), 64, 3, CropOptions(jitter=0.1))
    for number in range(7):
        before, after = plain[number], jittered[number]
        np.testing.assert_array_equal(np.asarray(before["mask"]), np.asarray(after["mask"]))
        change = np.asarray(after["image"]).astype(int) - np.asarray(before["image"])
        assert np.abs(change).mean() > 0
        assert np.abs(change).max() <= 255 * (1.1**3 - 1)


def test_masks_are_of_the_kind_asked_for(folder: Path) -> None:
    source = open_source(folder)

    def ratios(options: CropOptions) -> NDArray[np.float64]:
        dataset = TrainingSet(source, 64, 0, options)
        return np.array([1 - np.asarray(dataset[n]["mask"]).mean() for n in range(150)])

    large, small = ratios(CropOptions(masks="large")), ratios(CropOptions(masks="small"))
    mixed = ratios(CropOptions(masks="mixed"))
    assert small.mean() < mixed.mean() < large.mean()
    assert large.mean() - small.mean() > 0.1


@pytest.mark.parametrize(
    "wrong",
    [{"share": (0, 1)}, {"share": (0.5, 0.4)}, {"share": (1, 1.1)}, {"jitter": 1}, {"masks": "x"}],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"{next(iter(wrong))} (is|are) "):
        CropOptions(**wrong)


def test_a_training_set_refuses_seeds_out_of_range_and_no_pictures(folder: Path) -> None:
    for seed in (-1, 2**64):
        with pytest.raises(DataError, match="a seed is a whole number from 0"):
            TrainingSet(open_source(folder), 64, seed)
    with pytest.raises(DataError, match="training needs at least one"):
        TrainingSet(ImageSource([], "nowhere"), 64, 0)


# -- damaged pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize("preloaded", [False, True])
def test_damaged_pictures_are_passed_over_and_named(damaged: Path, preloaded: bool) -> None:
    source = preload(open_source(damaged), threads=2) if preloaded else open_source(damaged)
    forwards, backwards = (TrainingSet(source, 64, 0) for _ in range(2))
    items = [forwards[number] for number in range(14)]
    assert forwards.passed_over == ["2.png", "5.png"]
    assert all(same(items[number], backwards[number]) for number in reversed(range(14)))
    assert same(items[11], TrainingSet(open_source(damaged), 64, 0)[11])


def test_pictures_passed_over_in_workers_are_known_here(damaged: Path) -> None:
    dataset = TrainingSet(open_source(damaged), 64, 0)
    assert dataset.passed_over == []
    assert len(list(loader(dataset, CountingSampler(0, 7, repeat=2), workers=2))) == 2
    assert dataset.passed_over == ["2.png", "5.png"]


def test_nothing_but_damaged_pictures_is_an_error_every_time(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").write_text("no picture")
    dataset = TrainingSet(open_source(tmp_path), 64, 0)
    for _ in range(2):
        with pytest.raises(DataError, match="none of 3 pictures in a row"):
            dataset[0]


# -- loading ---------------------------------------------------------------------------------------


def test_rank_shards_interleave_into_the_single_process_stream() -> None:
    whole = CountingSampler(100, 6, repeat=4)
    ranks = [CountingSampler(100, 2, rank, 3, repeat=4) for rank in range(3)]
    for step, batches in zip(whole, zip(*ranks, strict=True), strict=True):
        assert step == [number for group in zip(*batches, strict=True) for number in group]
    assert [len(each) for each in (whole, *ranks)] == [4, 4, 4, 4]


def test_a_resumed_sampler_goes_on_exactly() -> None:
    whole = list(CountingSampler(0, 4, rank=1, world=2, repeat=5))
    assert list(CountingSampler(3 * 4 * 2, 4, rank=1, world=2, repeat=2)) == whole[3:]


def test_a_sampler_without_repeat_has_no_end() -> None:
    endless = CountingSampler(0, 2)
    batches = iter(endless)
    assert [next(batches) for _ in range(1000)][-1] == [1998, 1999]
    with pytest.raises(TypeError, match="no end"):
        len(endless)


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": -1, "batch": 1},
        {"start": 0, "batch": 0},
        {"start": 0, "batch": 1, "rank": 1, "world": 1},
        {"start": 0, "batch": 1, "rank": -1},
        {"start": 0, "batch": 1, "repeat": -1},
    ],
)
def test_a_sampler_refuses_values_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match="ranks count from 0"):
        CountingSampler(**wrong)


def test_the_stream_is_the_same_with_any_number_of_workers(folder: Path) -> None:
    dataset = TrainingSet(preload(open_source(folder), threads=1), 64, 0)
    streams = [
        list(loader(dataset, CountingSampler(10, 3, repeat=5), workers=workers))
        for workers in (0, 1, 2)
    ]
    for batches in zip(*streams, strict=True):
        assert all(same(batches[0], other) for other in batches[1:])
    first = streams[0][0]
    assert first["image"].shape == (3, 3, 64, 64)
    assert first["mask"].shape == (3, 1, 64, 64)
    assert first["number"].tolist() == [10, 11, 12]


def test_a_loader_takes_nothing_from_the_global_random_numbers(folder: Path) -> None:
    dataset = TrainingSet(open_source(folder), 64, 0)
    before = torch.get_rng_state()
    next(iter(loader(dataset, CountingSampler(0, 2))))
    assert torch.equal(before, torch.get_rng_state())


def test_errors_in_workers_arrive_as_data_errors(tmp_path: Path) -> None:
    write(tmp_path / "a.png", scene(0, 40, 40))
    dataset = TrainingSet(open_source(tmp_path), 64, 0, CropOptions(pad=False))
    with pytest.raises(DataError, match="crops are 64 a side"):
        list(loader(dataset, CountingSampler(0, 1, repeat=1), workers=1))


def test_the_wait_meter_tells_waiting_from_working() -> None:
    now = [0.0]

    def items() -> Iterator[int]:
        for number, seconds in enumerate((50.0, 1.0, 2.0)):
            now[0] += seconds
            yield number

    meter = WaitMeter(items(), clock=lambda: now[0])
    assert meter.share == 0
    seen = []
    for item in meter:
        seen.append(item)
        now[0] += 4.5
    assert seen == [0, 1, 2]
    assert (meter.items, meter.waited, meter.worked) == (3, 3.0, 9.0)  # not the 50 of the start
    assert meter.share == pytest.approx(0.25)
    meter.reset()
    assert (meter.items, meter.share) == (0, 0)


# -- held-out photographs --------------------------------------------------------------------------


def test_a_share_held_out_is_the_same_on_every_call(folder: Path) -> None:
    first, again = (split(open_source(folder), 0.3) for _ in range(2))
    assert first.heldout.names == again.heldout.names
    assert (len(first.heldout), len(first.train)) == (2, 5)
    assert not set(first.heldout.names) & set(first.train.names)


def test_pictures_added_later_seldom_change_what_is_held_out(folder: Path) -> None:
    before = set(split(open_source(folder), 0.4, near=None).heldout.names)
    write(folder / "more.png", scene(50))
    after = set(split(open_source(folder), 0.4, near=None).heldout.names)
    assert len(before & after) >= len(before) - 1


def test_named_pictures_are_held_out(folder: Path) -> None:
    source = open_source(folder)
    parts = split(source, ["4.png", "1.png"])
    assert parts.heldout.names == ("1.png", "4.png")
    np.testing.assert_array_equal(parts.heldout.read(1), source.read(4))
    np.testing.assert_array_equal(parts.train.read(1), source.read(2))
    assert parts.duplicates == ()


def test_wrong_splits_are_refused(folder: Path) -> None:
    source = open_source(folder)
    for share in (0.0, 1.0, 2):
        with pytest.raises(DataError, match="more than 0 and less than 1"):
            split(source, share)
    with pytest.raises(DataError, match=r"no picture 'x\.png' .*1 of 2 names are unknown"):
        split(source, ["0.png", "x.png"])
    with pytest.raises(DataError, match="0 are left to train on and 7 are held out"):
        split(source, source.names)
    with pytest.raises(DataError, match="0 are held out"):
        split(source, [])


def test_copies_of_held_out_pictures_are_left_out_of_training(folder: Path) -> None:
    original = Image.fromarray(scene(3))
    write(folder / "small.jpg", np.asarray(original.resize((50, 38))), quality=60)
    write(folder / "mirrored.png", scene(3)[:, ::-1])
    write(folder / "cropped.png", scene(3)[2:-2, 3:-3])
    parts = split(open_source(folder), ["3.png"])
    assert {pair.first for pair in parts.duplicates} == {"small.jpg", "mirrored.png", "cropped.png"}
    assert {pair.second for pair in parts.duplicates} == {"3.png"}
    assert parts.train.names == ("0.png", "1.png", "2.png", "4.png", "5.png", "6.png")
    assert len(split(open_source(folder), ["3.png"], near=None).train) == 9


def test_near_duplicates_within_a_source_are_found_once(damaged: Path) -> None:
    assert near_duplicates(open_source(damaged)) == []
    write(damaged / "copy.png", scene(0))
    assert near_duplicates(open_source(damaged)) == [("0.png", "copy.png", 0)]


def test_the_hash_says_where_neighbours_grow_brighter() -> None:
    ramp = np.broadcast_to(np.arange(90, dtype=np.uint8)[:, None], (90, 90))
    downwards = np.stack([ramp] * 3, axis=-1)
    assert picture_hash(downwards).tolist() == [False] * 64 + [True] * 64
    assert picture_hash(downwards.transpose(1, 0, 2)).tolist() == [True] * 64 + [False] * 64


def test_a_signal_to_the_whole_group_leaves_the_workers_at_work(folder: Path) -> None:
    """As Ctrl-C in a terminal and a service manager's stop send it."""
    dataset = TrainingSet(open_source(folder), 64, 0)
    batches = iter(loader(dataset, CountingSampler(0, 1), workers=1))
    next(batches)
    for process in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid or 0, number)
    assert [int(next(batches)["number"][0]) for _ in range(12)] == [*range(1, 13)]
