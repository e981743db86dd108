"""Pictures in files: read with clear errors, written whole or not at all. NumPy and Pillow only.

Nothing here changes a pixel. Colour profile, EXIF data and resolution travel with the picture in
``Image.info``, as Pillow keeps them, and are written into every format that can hold them.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from mat_export.contract import UserError
from mat_export.files import atomic_path

__all__ = [
    "MAX_SIDE",
    "READABLE",
    "WRITABLE",
    "PictureFormat",
    "carried_exif",
    "check_output",
    "check_size",
    "lossless_suffix",
    "orientation_of",
    "read_image",
    "write_image",
]

MAX_SIDE = 8192
"""Longest side of a picture, in pixels. Memory and time were only ever looked at up to here."""

READABLE = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff"),
        *(".bmp", ".gif", ".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".tga"),
    )
)
"""Suffixes of the files that count as pictures in a folder. A file named alone may have any."""

_PATH = str | os.PathLike[str]
_ORIENTATION = int(ExifTags.Base.Orientation)
_DESCRIPTIVE = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
)
_SUBDIRECTORIES = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)


@dataclass(frozen=True)
class PictureFormat:
    """What one kind of file can hold.

    Attributes:
        name: Pillow's name of the format.
        modes: Pillow's modes it stores as they are.
        lossless: Pixels come back as they were written.
        exif: It carries EXIF data, so the orientation too.
        options: Arguments for ``Image.save``.
    """

    name: str
    modes: tuple[str, ...]
    lossless: bool
    exif: bool
    options: tuple[tuple[str, Any], ...] = ()


_PNG = PictureFormat("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), True, True)
_TIFF = PictureFormat(
    "TIFF",
    (
        *("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK"),
        *("I;16", "I;16B", "I", "F"),
    ),
    True,
    True,
)
_JPEG = PictureFormat(
    "JPEG", ("L", "RGB", "CMYK"), False, True, (("quality", 95), ("subsampling", 0))
)
_WEBP = PictureFormat(
    "WEBP", ("RGB", "RGBA"), True, True, (("lossless", True), ("exact", True), ("quality", 70))
)
_BMP = PictureFormat("BMP", ("1", "L", "P", "RGB"), True, False)

WRITABLE: dict[str, PictureFormat] = {
    ".png": _PNG,
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".webp": _WEBP,
    ".bmp": _BMP,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
}
"""The formats that are written, by suffix in lower case."""

_PLAIN_IN_TIFF = ("RGBX", "I;16B")
"""Modes whose compressed TIFF Pillow reads back in another mode."""


# -- reading ---------------------------------------------------------------------------------------


def read_image(path: _PATH, notes: list[str] | None = None) -> Image.Image:
    """A picture with all of its pixels in memory, as stored (not yet turned upright).

    Args:
        path: A file of any format that Pillow reads. Of several frames the first is taken.
        notes: Collects sentences on what the user may want to know: further frames, and 16 bits a
            colour channel, which Pillow reads as 8.

    Raises:
        UserError: If the file is missing, unreadable, no picture, damaged, cut short, or has a
            side of more than 8192 pixels.
    """
    notes = [] if notes is None else notes
    with _opened(path) as image:
        check_size(image.size, f"'{path}'")
        if _sixteen_bits_a_channel(image):
            notes.append(f"'{path}' has 16 bits a colour channel and is read with 8")
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            notes.append(f"'{path}' has {frames} frames: the first is taken")
        image.load()
        exif = carried_exif(image)
        # Files are handed on as plain pictures, with nothing that refers to the closed file.
        picture = image.copy()
    if exif is not None:
        picture.info["exif"] = exif
    return picture


@contextlib.contextmanager
def _opened(path: _PATH) -> Iterator[Image.Image]:
    """The open file, with everything that Pillow may raise turned into one sentence."""
    if not Path(path).exists():
        raise UserError(f"there is no file '{path}'")
    if not Path(path).is_file():
        raise UserError(f"'{path}' is not a file: a picture file is needed")
    try:
        with _quiet(), Image.open(path) as image:
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"'{path}' is larger than {MAX_SIDE} pixels a side, which is the limit: scale it down"
        ) from error
    except UnidentifiedImageError as error:
        known = ", ".join(sorted(READABLE))
        raise UserError(f"'{path}' is no picture that can be read; known are {known}") from error
    except PermissionError as error:
        raise UserError(f"'{path}' cannot be read: permission denied") from error
    except Exception as error:  # on damaged files decoders raise just about anything
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"'{path}' is damaged or cut short ({reason}): get a whole copy") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings of damage, which becomes an error here where it matters, and of
    many pixels: sizes are held against MAX_SIDE, which lies below Pillow's own limit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def check_size(size: tuple[int, int], name: str) -> None:
    """Raise UserError unless width and height (pixels) are from 1 to 8192."""
    width, height = size
    if min(size) < 1:
        raise UserError(f"{name} is empty ({width}x{height} pixels): one pixel is the least")
    if max(size) > MAX_SIDE:
        raise UserError(
            f"{name} has {width}x{height} pixels and {MAX_SIDE} a side is the limit: "
            "scale it down or cut it up"
        )


def _sixteen_bits_a_channel(image: Image.Image) -> bool:
    """Whether a file of several channels holds 16 bits in each (Pillow keeps the upper 8)."""
    if len(image.getbands()) < 2:
        return False
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, ())
        return max(bits, default=8) == 16 if isinstance(bits, tuple) else bits == 16
    tiles = getattr(image, "tile", [])
    return any(";16" in str(tile[-1]) for tile in tiles)


# -- EXIF ------------------------------------------------------------------------------------------


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation 1 … 8 (CIPA DC-008, tag 0x0112); 1 where there is none or it is unreadable.

    1 is upright, 3 upside down; for 5 … 8 the stored picture lies on its side.
    """
    try:
        with _quiet():
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data raises many things, and says nothing of the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def carried_exif(image: Image.Image) -> bytes | None:
    """EXIF data to write with the picture: the original bytes, else the descriptive tags.

    A TIFF file keeps its EXIF tags among those that describe its storage, which must not travel,
    and some files state the orientation in XMP alone.
    """
    raw = image.info.get("exif")
    if isinstance(raw, bytes) and raw:
        alone = Image.Image()
        alone.info["exif"] = raw
        if orientation_of(alone) == orientation_of(image):
            return raw
    return _descriptive_exif(image)


def _descriptive_exif(image: Image.Image) -> bytes | None:
    """Camera, author, dates, place and orientation as EXIF data; None where nothing is known."""
    try:
        with _quiet():
            old = image.getexif()
        new = Image.Exif()
        for tag in _DESCRIPTIVE:
            if tag in old:
                new[tag] = old[tag]
        for directory in _SUBDIRECTORIES:
            entries = dict(old.get_ifd(directory))
            if entries:
                new[directory] = entries
        if orientation_of(image) != 1:
            new[_ORIENTATION] = orientation_of(image)
        return new.tobytes() if len(new) else None
    except Exception:  # as above: a picture with damaged EXIF data is a picture without
        return None


# -- writing ---------------------------------------------------------------------------------------


def check_output(path: _PATH, mode: str | None = None) -> PictureFormat:
    """What `path` will be written as, before any time is spent on the picture.

    Args:
        path: The file to be.
        mode: Pillow's mode of the picture, if known.

    Raises:
        UserError: For an unknown suffix, a format that cannot hold the mode, or a folder that is
            missing or cannot be written.
    """
    target = Path(path)
    form = WRITABLE.get(target.suffix.lower())
    if form is None:
        got = f"the suffix '{target.suffix}'" if target.suffix else "no suffix"
        raise UserError(f"the output '{path}' has {got}; allowed are {', '.join(WRITABLE)}")
    if mode is not None and mode not in form.modes and not (mode == "I" and form is _PNG):
        other = next((s for s, f in WRITABLE.items() if f.lossless and mode in f.modes), None)
        hint = f"write a {other} file" if other else "convert the picture first"
        raise UserError(
            f"{form.name} cannot hold a picture of mode {mode} as it is "
            f"(it holds {', '.join(form.modes)}): {hint}"
        )
    if target.is_dir():
        raise UserError(f"the output '{path}' is a folder: name a file in it")
    _check_folder(target.parent)
    return form


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise UserError(f"the folder '{folder}' does not exist: create it or choose another")
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder: choose another place for the output")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"the folder '{folder}' cannot be written: choose another")


def lossless_suffix(suffix: str, mode: str) -> str:
    """This suffix if its format stores the mode without loss, else ``.png`` or ``.tif``.

    Raises:
        UserError: If no format does.
    """
    for candidate in (suffix.lower(), ".png", ".tif"):
        form = WRITABLE.get(candidate)
        if form is not None and form.lossless and mode in form.modes:
            return suffix if candidate == suffix.lower() else candidate
    raise UserError(f"no file format written here holds mode {mode}: convert the picture first")


def write_image(image: Image.Image, path: _PATH, notes: list[str] | None = None) -> None:
    """Write a picture whole or not at all, with its colour profile, EXIF data and resolution.

    An existing file is replaced. A format without EXIF data (BMP) gets the picture upright, since
    it has no other way to say how it is to be shown.

    Args:
        image: The picture, in a mode that the format holds as it is.
        path: Where to; the suffix names the format (`WRITABLE`).
        notes: Collects a sentence where the format is lossy.

    Raises:
        UserError: As `check_output`, and if writing fails.
    """
    form = check_output(path, image.mode)
    if not form.lossless and notes is not None:
        notes.append(f"'{path}' is {form.name}, which is lossy: kept pixels change a little")
    ready = _storable(image, form)
    options = _save_options(ready, form)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        try:
            ready.save(file, format=form.name, **options)
        except OSError:
            raise
        except Exception as error:  # encoders raise much; a partial file is never left behind
            reason = str(error).strip() or type(error).__name__
            raise UserError(f"'{path}' cannot be written as {form.name}: {reason}") from error


def _storable(image: Image.Image, form: PictureFormat) -> Image.Image:
    """The picture as the format needs it: 16 bits for PNG, upright without EXIF data."""
    if image.mode == "I" and form is _PNG:
        low, high = (int(v) for v in np.asarray(image.getextrema()).tolist())
        if low < 0 or high > 65535:
            raise UserError(
                f"PNG holds 0 to 65535 and the picture's values go from {low} to {high}: "
                "write a .tif file"
            )
        values = np.asarray(image).astype("<u2")
        narrow = Image.frombytes("I;16", image.size, values.tobytes())
        narrow.info = dict(image.info)
        image = narrow
    if not form.exif and orientation_of(image) != 1:
        return ImageOps.exif_transpose(image)
    return image


def _save_options(image: Image.Image, form: PictureFormat) -> dict[str, Any]:
    options = dict(form.options)
    profile = image.info.get("icc_profile")
    if profile and form is not _BMP:
        options["icc_profile"] = profile
    if form is _TIFF:
        exif = _descriptive_exif(image)
        # libtiff, which compresses, cannot write the subdirectories of EXIF data.
        if image.mode not in _PLAIN_IN_TIFF and exif is None and features.check("libtiff"):
            options["compression"] = "tiff_adobe_deflate"
    else:
        exif = carried_exif(image)
    if exif is not None and form.exif:
        options["exif"] = exif
    resolution = image.info.get("dpi")
    if isinstance(resolution, tuple) and len(resolution) == 2 and form is not _WEBP:
        with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):
            x, y = (float(value) for value in resolution)
            if min(x, y) > 0 and max(x, y) < 65536:
                options["dpi"] = (x, y)
    return options
