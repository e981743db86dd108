"""Pictures of any mode as something to look at in RGB and to paint on. NumPy and Pillow only.

A `Picture` is what the user gave. A `Canvas` is a copy of its pixels in the stored mode, seen
upright: windows are read as 8-bit RGB, pixels are painted in RGB, and what is not painted keeps its
bits, since it is never converted back.

How the modes map to RGB:

- 1, L, LA, and arrays of one channel: grey. A fill is stored as its luminance (ITU-R BT.601).
- P, PA: by the palette; see `mat_export.palette`.
- RGB, RGBA, RGBX; YCbCr and HSV through Pillow.
- CMYK: without the profile, as Pillow does. A fill uses as much black as the kept pixels do, so
  that it prints alike.
- I;16, I, F and arrays of anything but bool and uint8 have no fixed white: the range of the finite
  kept values is shown as 0 … 255, and a fill is stored with all the precision it has.

Alpha is never shown nor changed, neither under the hole.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mat_export.contract import UserError
from mat_export.images import carried_exif, check_size, orientation_of
from mat_export.palette import Palette

__all__ = ["Canvas", "Picture", "pick", "upright"]

Array = NDArray[Any]
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Index = NDArray[np.intp]

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_STRIPE = 256
_ONE_CHANNEL = ("1", "L", "LA", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_THREE_CHANNELS = ("RGB", "RGBA", "RGBX")
_THROUGH_PILLOW = ("YCbCr", "HSV")
_MODES = (*_ONE_CHANNEL, *_THREE_CHANNELS, *_THROUGH_PILLOW, "CMYK", "P", "PA")


def upright(stored: Array, orientation: int) -> Array:
    """A view of stored pixels [H, W, …] as they are displayed, by EXIF orientation 1 … 8."""
    view = stored.swapaxes(0, 1) if orientation >= 5 else stored
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return view[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def pick(pixels: Array, rows: Index, columns: Index) -> Array:
    """``pixels[rows][:, columns]``: a view where both run on without a gap, else a copy."""
    if _runs_on(rows) and _runs_on(columns):
        return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return pixels[rows[:, None], columns[None, :]]


def _runs_on(index: Index) -> bool:
    return bool((np.diff(index) == 1).all())


# -- colours ---------------------------------------------------------------------------------------


class _Colours(Protocol):
    """How stored colour channels (alpha left out) map to RGB and back.

    Attributes:
        channels: How many there are.
    """

    channels: int

    def to_rgb(self, stored: Array) -> Bytes:
        """[h, w, channels] → [h, w, 3], 0 to 255."""

    def from_rgb(self, rgb: NDArray[np.float32]) -> Array:
        """[n, 3], 0 to 255 → [n, channels] in the stored type."""


class _Direct:
    """Grey or RGB, whose stored values are a linear function of 0 … 255."""

    def __init__(self, dtype: np.dtype[Any], channels: int, low: float, high: float) -> None:
        self.dtype = dtype
        self.channels = channels
        self.low = low
        self.high = high

    def to_rgb(self, stored: Array) -> Bytes:
        if self.dtype == np.uint8:
            values = stored
        elif self.dtype == np.bool_:
            values = stored.astype(np.uint8) * np.uint8(255)
        else:
            values = self._levels(stored)
        shape = (*values.shape[:2], 3)
        return np.ascontiguousarray(np.broadcast_to(values, shape), dtype=np.uint8)

    def _levels(self, stored: Array) -> Bytes:
        scale = 255.0 / (self.high - self.low) if self.high > self.low else 0.0
        with np.errstate(invalid="ignore", over="ignore"):
            levels = (stored.astype(np.float64) - self.low) * scale
        levels = np.nan_to_num(levels, nan=0.0, posinf=255.0, neginf=0.0)
        return np.asarray(np.rint(np.clip(levels, 0.0, 255.0)), dtype=np.uint8)

    def from_rgb(self, rgb: NDArray[np.float32]) -> Array:
        values: Array = rgb if self.channels == 3 else (rgb @ _LUMINANCE)[:, None]
        if self.dtype == np.bool_:
            return np.asarray(values >= 127.5)
        if self.dtype == np.uint8:
            return np.asarray(np.rint(np.clip(values, 0.0, 255.0)), dtype=np.uint8)
        exact = self.low + values.astype(np.float64) * ((self.high - self.low) / 255.0)
        exact = np.clip(exact, self.low, self.high)
        return np.asarray(np.rint(exact) if self.dtype.kind in "iu" else exact, dtype=self.dtype)


class _ThroughPillow:
    """A mode of three 8-bit channels that Pillow converts both ways."""

    channels = 3

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def to_rgb(self, stored: Array) -> Bytes:
        return _converted(stored, self.mode, "RGB")

    def from_rgb(self, rgb: NDArray[np.float32]) -> Array:
        levels = np.rint(np.clip(rgb, 0.0, 255.0)).astype(np.uint8)
        return np.asarray(_converted(levels[None], "RGB", self.mode)[0])


class _Cmyk:
    """Ink, with `black` the share of the greatest possible black that is printed as black."""

    channels = 4

    def __init__(self, black: float) -> None:
        self.black = black

    def to_rgb(self, stored: Array) -> Bytes:
        return _converted(stored, "CMYK", "RGB")

    def from_rgb(self, rgb: NDArray[np.float32]) -> Array:
        """The inverse of ``R = (255 - K)·(255 - C)/255`` at this share of black."""
        rgb = np.clip(rgb, 0.0, 255.0)
        k = np.rint(self.black * (255.0 - rgb.max(axis=1, keepdims=True)))
        ink = 255.0 - 255.0 * rgb / np.maximum(255.0 - k, 1.0)
        inks = np.concatenate([np.clip(ink, 0.0, 255.0), k], axis=1)
        return np.asarray(np.rint(inks), dtype=np.uint8)


def _converted(pixels: Array, mode: str, wanted: str) -> Bytes:
    height, width = pixels.shape[:2]
    image = Image.frombytes(mode, (width, height), np.ascontiguousarray(pixels).tobytes())
    return np.asarray(image.convert(wanted))


# -- pictures --------------------------------------------------------------------------------------


class Picture:
    """What the user gave, an array or an image, and how it is meant to be seen.

    Args:
        source: An image of any of the modes above, or an array [H, W] or [H, W, C] of bool or
            numbers with C of 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha).

    Attributes:
        height: Rows as displayed.
        width: Columns as displayed.

    Raises:
        UserError: For another mode, type or shape, or a side that is 0 or above 8192.
    """

    def __init__(self, source: Image.Image | Array) -> None:
        self.source = source
        if isinstance(source, Image.Image):
            check_size(source.size, "the picture")
            if source.mode not in _MODES:
                raise UserError(
                    f"pictures of mode {source.mode} cannot be filled; {', '.join(_MODES)} can: "
                    "convert it first"
                )
            source.load()
            self.orientation = orientation_of(source)
            self.stored: Array = np.asarray(source)
        else:
            self.orientation = 1
            self.stored = _checked_array(source)
        self.height, self.width = (int(n) for n in upright(self.stored, self.orientation).shape[:2])

    @property
    def mode(self) -> str:
        """Pillow's mode, or the type and shape of an array."""
        if isinstance(self.source, Image.Image):
            return self.source.mode
        return f"{self.source.dtype} {list(self.source.shape)}"

    def aligned(self, keep: Mask) -> Mask:
        """The mask as the picture is displayed.

        A mask fits the picture as displayed or, if only that has its size, as stored.

        Raises:
            UserError: If it fits neither; it names both sizes.
        """
        if keep.shape == (self.height, self.width):
            return keep
        if keep.shape == self.stored.shape[:2]:
            return upright(keep, self.orientation)
        raise UserError(
            f"the picture has {self.width}x{self.height} pixels and the mask "
            f"{keep.shape[1]}x{keep.shape[0]}: they have to be of one size"
        )

    def canvas(self, keep: Mask, *, copy: bool = True) -> Canvas:
        """The picture to paint on, for a mask as displayed; without a copy, just to look at."""
        source = self.source
        if isinstance(source, Image.Image) and source.mode in ("P", "PA"):
            return _IndexedCanvas(self, keep, copy)
        return Canvas(self, keep, copy)

    def colours(self, keep: Mask) -> _Colours:
        """The mapping to RGB, which may depend on the kept pixels."""
        pixels = _with_channels(upright(self.stored, self.orientation))
        if isinstance(self.source, Image.Image):
            mode = self.source.mode
            if mode in _THROUGH_PILLOW:
                return _ThroughPillow(mode)
            if mode == "CMYK":
                return _Cmyk(_share_of_black(pixels, keep))
            channels = 3 if mode in _THREE_CHANNELS else 1
        else:
            channels = 3 if pixels.shape[2] >= 3 else 1
        dtype = pixels.dtype
        low, high = (
            (0.0, 255.0)
            if dtype in (np.uint8, np.bool_)
            else _kept_range(pixels[..., :channels], keep)
        )
        return _Direct(dtype, channels, low, high)

    def rebuilt(self, pixels: Array) -> Image.Image | Array:
        """The picture with other pixels (stored form), of the kind it was given in."""
        if not isinstance(self.source, Image.Image):
            return pixels
        mode = self.source.mode
        packed = np.packbits(pixels, axis=1) if mode == "1" else np.ascontiguousarray(pixels)
        image = Image.frombytes(mode, self.source.size, packed.tobytes())
        image.info = dict(self.source.info)
        exif = carried_exif(self.source)
        if exif is not None:
            image.info["exif"] = exif
        return image


def _checked_array(array: Array) -> Array:
    if not isinstance(array, np.ndarray):
        raise UserError(f"a picture is a PIL image, an array or a path, got {type(array).__name__}")
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype.kind not in "buif" or array.ndim not in (2, 3) or not 1 <= channels <= 4:
        raise UserError(
            "a picture array is [H, W] or [H, W, 1 to 4] of bool or numbers, got "
            f"{array.dtype} {list(array.shape)}"
        )
    check_size((array.shape[1], array.shape[0]), "the picture")
    return array


def _with_channels(pixels: Array) -> Array:
    return np.asarray(pixels[..., None]) if pixels.ndim == 2 else pixels


def _kept_range(pixels: Array, keep: Mask) -> tuple[float, float]:
    """Least and greatest finite kept value; the type's usual range where nothing is kept."""
    low, high = np.inf, -np.inf
    for first in range(0, pixels.shape[0], _STRIPE):
        kept = pixels[first : first + _STRIPE][keep[first : first + _STRIPE]]
        if kept.dtype.kind == "f":
            kept = kept[np.isfinite(kept)]
        if kept.size:
            low, high = min(low, float(kept.min())), max(high, float(kept.max()))
    if low > high:
        kind = pixels.dtype.kind
        return 0.0, 1.0 if kind == "f" else float(min(65535, np.iinfo(pixels.dtype).max))
    return low, high


def _share_of_black(pixels: Array, keep: Mask) -> float:
    """Black ink of the kept pixels over the greatest that gives the same colours, 0 to 1."""
    used = possible = 0
    for first in range(0, pixels.shape[0], _STRIPE):
        kept = pixels[first : first + _STRIPE][keep[first : first + _STRIPE]]
        if kept.size:
            used += int(kept[:, 3].sum(dtype=np.int64))
            rgb = _converted(kept[None], "CMYK", "RGB")
            possible += int((255 - rgb.max(axis=2).astype(np.int64)).sum())
    return min(1.0, used / possible) if possible else 0.0


# -- canvases --------------------------------------------------------------------------------------


class Canvas:
    """A copy of a picture's pixels to look at and paint on, in coordinates as displayed."""

    def __init__(self, picture: Picture, keep: Mask, copy: bool) -> None:
        self._picture = picture
        self._pixels = self._buffer(picture, copy)
        self._colours = self._mapping(picture, keep)
        shown = _with_channels(upright(self._pixels, picture.orientation))
        self._shown = shown[..., : self._colours.channels]
        self._clear = _colour_key(picture, self._colours.channels)

    def _buffer(self, picture: Picture, copy: bool) -> Array:
        return picture.stored.copy() if copy else picture.stored

    def _mapping(self, picture: Picture, keep: Mask) -> _Colours:
        return picture.colours(keep)

    def rgb(self, rows: Index, columns: Index) -> Bytes:
        """[len(rows), len(columns), 3], a fresh array; the indices may repeat and run back."""
        picked = self._colours.to_rgb(pick(self._shown, rows, columns))
        return picked if picked.flags.owndata and picked.flags.writeable else picked.copy()

    def paint(self, top: int, left: int, hole: Mask, rgb: NDArray[np.float32]) -> None:
        """Paint the pixels of a rectangle where `hole` [h, w] is True in `rgb` [h, w, 3]."""
        height, width = hole.shape
        part = self._shown[top : top + height, left : left + width]
        new = self._colours.from_rgb(rgb[hole])
        if self._clear is not None:
            new = _beside_key(new, part[hole], self._clear)
        part[hole] = new

    def picture(self) -> Image.Image | Array:
        """The painted picture, of the kind, size and mode that was given."""
        return self._picture.rebuilt(self._pixels)


class _IndexedCanvas(Canvas):
    """Painted in RGB; indices are chosen when the picture is done."""

    def __init__(self, picture: Picture, keep: Mask, copy: bool) -> None:
        assert isinstance(picture.source, Image.Image), "only images have palettes"
        self._palette = Palette.of(picture.source)
        self._hole = ~keep
        super().__init__(picture, keep, copy)
        self._clear = None

    def _buffer(self, picture: Picture, copy: bool) -> Array:
        return self._palette.rgb(self._index(picture))

    def _mapping(self, picture: Picture, keep: Mask) -> _Colours:
        return _Direct(np.dtype(np.uint8), 3, 0.0, 255.0)

    @staticmethod
    def _index(picture: Picture) -> Bytes:
        return np.asarray(_with_channels(picture.stored)[..., 0])

    def picture(self) -> Image.Image | Array:
        source = self._picture
        hole = np.zeros(self._pixels.shape[:2], dtype=np.bool_)
        upright(hole, source.orientation)[...] = self._hole
        index, palette = self._palette.indexed(self._index(source), self._pixels, hole)
        stored = source.stored.copy()
        _with_channels(stored)[..., 0] = index
        image = source.rebuilt(stored)
        assert isinstance(image, Image.Image), "only images have palettes"
        palette.put_into(image)
        return image


def _colour_key(picture: Picture, channels: int) -> Array | None:
    """The one colour that counts as transparent, in a picture that has no alpha channel."""
    source = picture.source
    if not isinstance(source, Image.Image) or "A" in source.getbands():
        return None
    clear = source.info.get("transparency")
    values = [clear] if isinstance(clear, int) else clear
    if not isinstance(values, list | tuple) or len(values) != channels:
        return None
    dtype = picture.stored.dtype
    if dtype == np.bool_:
        return np.array([bool(v) for v in values])
    top = np.iinfo(dtype).max if dtype.kind in "iu" else -1
    if not all(isinstance(v, int) and 0 <= v <= top for v in values):
        return None
    return np.array(values, dtype=dtype)


def _beside_key(new: Array, old: Array, key: Array) -> Array:
    """Paint that neither hides transparent pixels nor becomes transparent itself.

    Args:
        new: [n, channels] the paint.
        old: [n, channels] what it covers.
        key: [channels] the transparent colour.
    """
    was = (old == key).all(axis=1)
    becomes = (new == key).all(axis=1) & ~was
    new[becomes, -1] ^= key.dtype.type(1)
    new[was] = key
    return new
