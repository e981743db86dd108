from __future__ import annotations

import errno
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from mat_export.contract import UserError
from mat_export.files import atomic_path
from mat_export.images import (
    MAX_SIDE,
    WRITABLE,
    check_output,
    lossless_suffix,
    orientation_of,
    read_image,
    write_image,
)

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")


def exif(orientation: int = 1) -> bytes:
    data = Image.Exif()
    data[0x0110] = "Camera 3000"
    data[0x8769] = {0x9003: "2024:05:06 07:08:09"}
    if orientation != 1:
        data[0x0112] = orientation
    return data.tobytes()


def picture(mode: str, size: tuple[int, int] = (13, 9), seed: int = 0) -> Image.Image:
    """Noise in any of the modes that are written."""
    rng = np.random.default_rng(seed)
    width, height = size
    if mode == "1":
        return Image.fromarray(rng.random((height, width)) < 0.5)
    if mode in ("P", "PA"):
        image = Image.frombytes("RGB", size, rng.bytes(3 * width * height)).quantize(20)
        return image if mode == "P" else image.convert("PA")
    if mode == "F":
        return Image.fromarray(rng.random((height, width), dtype=np.float32))
    if mode == "I":
        return Image.fromarray(rng.integers(-70000, 70000, (height, width), dtype=np.int32))
    per_pixel = {"L": 1, "LA": 2, "RGB": 3, "I;16": 2, "I;16B": 2}.get(mode, 4)
    return Image.frombytes(mode, size, rng.bytes(per_pixel * width * height))


def sixteen_bit_png(path: Path, colour_type: int, channels: int) -> None:
    """A 2x2 PNG of 16 bits a channel, which Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 2, 2, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + os.urandom(2 * channels * 2) for _ in range(2))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(s, m) for s, form in WRITABLE.items() if form.lossless for m in form.modes if m != "RGBX"],
)
def test_lossless_formats_give_back_mode_and_pixels(tmp_path: Path, suffix: str, mode: str) -> None:
    image = picture(mode)
    write_image(image, tmp_path / f"x{suffix}")
    back = read_image(tmp_path / f"x{suffix}")
    assert (back.mode, back.size) == (image.mode, image.size)
    assert back.tobytes() == image.tobytes()
    if mode in ("P", "PA"):
        assert back.convert("RGB").tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_profile_and_exif_travel(tmp_path: Path, suffix: str, orientation: int) -> None:
    image = picture("RGB")
    image.info |= {"icc_profile": PROFILE, "exif": exif(orientation), "dpi": (300, 300)}
    write_image(image, tmp_path / f"x{suffix}")
    back = read_image(tmp_path / f"x{suffix}")
    assert back.info["icc_profile"] == PROFILE
    tags = back.getexif()
    assert tags[0x0110] == "Camera 3000"
    assert tags.get_ifd(0x8769)[0x9003] == "2024:05:06 07:08:09"
    if suffix == ".tif":  # Pillow turns TIFF files upright as it reads them
        assert orientation_of(back) == 1
        assert back.size == ImageOps.exif_transpose(image).size
    else:
        assert orientation_of(back) == orientation
        assert back.size == image.size
        assert back.info["exif"].removeprefix(b"Exif\0\0") == exif(orientation)[6:]


def test_a_tiff_keeps_its_camera_in_a_png(tmp_path: Path) -> None:
    image = picture("RGB")
    image.info["exif"] = exif()
    write_image(image, tmp_path / "x.tif")
    write_image(read_image(tmp_path / "x.tif"), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as back:
        assert back.getexif()[0x0110] == "Camera 3000"
        assert 0x0111 not in back.getexif()  # where TIFF keeps its strips


def test_an_orientation_in_xmp_alone_is_kept(tmp_path: Path) -> None:
    image = picture("RGB")
    image.info["XML:com.adobe.xmp"] = '<x:xmpmeta tiff:Orientation="6"/>'
    assert orientation_of(image) == 6
    write_image(image, tmp_path / "x.png")
    assert orientation_of(read_image(tmp_path / "x.png")) == 6


def test_a_format_without_exif_gets_the_picture_upright(tmp_path: Path) -> None:
    image = picture("RGB")
    image.info["exif"] = exif(6)
    write_image(image, tmp_path / "x.bmp")
    back = read_image(tmp_path / "x.bmp")
    assert back.tobytes() == ImageOps.exif_transpose(image).tobytes()


def test_damaged_exif_counts_as_none(tmp_path: Path) -> None:
    image = picture("RGB")
    image.info["exif"] = b"Exif\0\0MM\0*\0\0\xff\xff junk"
    assert orientation_of(image) == 1
    write_image(image, tmp_path / "x.png")


def test_integers_of_16_bits_go_into_png(tmp_path: Path) -> None:
    values = np.array([[0, 40000, 65535]], dtype=np.int32)
    write_image(Image.fromarray(values), tmp_path / "x.png")
    back = read_image(tmp_path / "x.png")
    assert np.asarray(back).tolist() == values.tolist()
    with pytest.raises(UserError, match="0 to 65535"):
        write_image(Image.fromarray(values * 2), tmp_path / "y.png")
    assert not (tmp_path / "y.png").exists()


def test_jpeg_is_mentioned_as_lossy(tmp_path: Path) -> None:
    notes: list[str] = []
    write_image(picture("RGB"), tmp_path / "x.jpg", notes)
    assert "lossy" in notes[0]


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_16_bits_a_channel_is_mentioned(tmp_path: Path, colour_type: int, channels: int) -> None:
    notes: list[str] = []
    sixteen_bit_png(tmp_path / "x.png", colour_type, channels)
    read_image(tmp_path / "x.png", notes)
    assert "16 bits" in notes[0]


def test_16_bits_of_grey_is_read_whole(tmp_path: Path) -> None:
    notes: list[str] = []
    sixteen_bit_png(tmp_path / "x.png", 0, 1)
    image = read_image(tmp_path / "x.png", notes)
    assert image.mode in ("I;16", "I")
    assert notes == []


def test_further_frames_are_mentioned(tmp_path: Path) -> None:
    frames = [picture("P", seed=i) for i in range(3)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    notes: list[str] = []
    assert read_image(tmp_path / "x.gif", notes).size == frames[0].size
    assert "3 frames" in notes[0]


# -- bad input -------------------------------------------------------------------------------------


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*absent\.png"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(UserError, match="not a file"):
        read_image(tmp_path)


def test_other_files_are_no_pictures(tmp_path: Path) -> None:
    for content in (b"", b"hello", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.png"):
            read_image(tmp_path / "x.png")


def test_a_file_without_permission_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(picture("RGB"), tmp_path / "x.png")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(UserError, match="permission"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP"])
def test_a_truncated_picture_is_refused(tmp_path: Path, form: str) -> None:
    buffer = io.BytesIO()
    picture("RGB", (100, 100)).save(buffer, form)
    data = buffer.getvalue()
    (tmp_path / "x").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"'.*x'"):
        read_image(tmp_path / "x")


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(FORMATS), st.integers(0, 10**6), st.lists(st.integers(0, 10**6)))
def test_damaged_files_give_a_picture_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, form: str, cut: int, flips: list[int]
) -> None:
    buffer = io.BytesIO()
    picture("RGB", (20, 20)).save(buffer, form)
    data = bytearray(buffer.getvalue())
    for flip in flips:
        data[flip % len(data)] ^= 1 << flip % 8
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data[: cut % (2 * len(data))])
    message = ""
    try:
        assert max(read_image(path).size) <= MAX_SIDE
    except UserError as error:
        message = str(error)
    assert not message or "damaged'" in message


def test_a_picture_that_is_too_large_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (MAX_SIDE + 1, 1)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="8193x1 pixels and 8192 a side"):
        read_image(tmp_path / "x.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match="8192"):
        read_image(tmp_path / "bomb.png")


def test_the_largest_picture_is_read_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    Image.new("1", (MAX_SIDE, MAX_SIDE)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").size == (MAX_SIDE, MAX_SIDE)
    assert not recwarn.list


# -- outputs that cannot be ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.xyz", "x.gif", "x"])
def test_unknown_suffixes_are_listed_with_the_known(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"allowed are \.png, "):
        write_image(picture("RGB"), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("suffix", "mode", "hint"),
    [(".jpg", "RGBA", ".png"), (".png", "CMYK", ".tif"), (".bmp", "LA", ".png")],
)
def test_a_mode_the_format_cannot_hold_comes_with_one_that_can(
    tmp_path: Path, suffix: str, mode: str, hint: str
) -> None:
    with pytest.raises(UserError, match=rf"mode {mode} .*write a \{hint} file"):
        write_image(picture(mode), tmp_path / f"x{suffix}")
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="does not exist"):
        check_output(tmp_path / "absent" / "x.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        check_output(tmp_path / "file" / "x.png")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_output(tmp_path / "x.png")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="cannot be written"):
        check_output(tmp_path / "y.png")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.png"
    target.write_bytes(b"old")

    def fail(self: Image.Image, file: Any, **_: object) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(UserError, match=r"x\.png' cannot be written: no space left"):
        write_image(picture("RGB"), target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_path(tmp_path / "x") as file:
            file.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_image(picture("L"), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("suffix", "mode", "wanted"),
    [
        (".jpg", "RGB", ".png"),
        (".PNG", "RGBA", ".PNG"),
        (".gif", "P", ".png"),
        (".webp", "RGB", ".webp"),
        (".webp", "L", ".png"),
        (".tiff", "CMYK", ".tiff"),
        (".jpeg", "CMYK", ".tif"),
        (".png", "F", ".tif"),
    ],
)
def test_a_lossless_suffix_is_found(suffix: str, mode: str, wanted: str) -> None:
    assert lossless_suffix(suffix, mode) == wanted


def test_a_mode_that_no_file_holds_is_said() -> None:
    for mode in ("HSV", "YCbCr"):
        with pytest.raises(UserError, match=mode):
            lossless_suffix(".png", mode)
