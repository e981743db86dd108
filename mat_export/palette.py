"""Filling pictures of indexed colours: kept pixels keep their index, filled ones get the nearest.

NumPy and Pillow only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Palette"]

_ENTRIES = 256
_SAMPLE = 1 << 18
"""New colours are chosen from about this many of the filled pixels."""

_STRIPE = 64
"""Rows worked on at once, which bounds the memory."""

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Palette:
    """The colours of an indexed picture.

    Attributes:
        colours: [n, 3] RGB.
        alpha: [n] opacity, from the palette itself or the file's transparency.
        translucent: The palette itself holds opacity (Pillow's palette mode RGBA).
    """

    colours: Bytes
    alpha: Bytes
    translucent: bool

    @classmethod
    def of(cls, image: Image.Image) -> Palette:
        """The palette of a picture of mode P or PA."""
        raw = np.array(image.getpalette("RGBA") or [0, 0, 0, 255], dtype=np.uint8).reshape(-1, 4)
        palette = image.palette
        translucent = palette is not None and palette.mode == "RGBA"
        alpha = raw[:, 3].copy() if translucent else np.full(len(raw), 255, dtype=np.uint8)
        clear = image.info.get("transparency")
        if isinstance(clear, bytes):
            share = np.frombuffer(clear, dtype=np.uint8)[: len(alpha)]
            alpha[: len(share)] = share
        elif isinstance(clear, int) and 0 <= clear < len(alpha):
            alpha[clear] = 0
        return cls(raw[:, :3].copy(), alpha, translucent)

    def rgb(self, index: Bytes) -> Bytes:
        """[…, 3] colours of indices; those beyond the palette are black, as Pillow shows them."""
        table = np.zeros((_ENTRIES, 3), dtype=np.uint8)
        table[: len(self.colours)] = self.colours
        return np.asarray(table[index])

    def opacity(self, index: Bytes) -> Bytes:
        """Opacity of indices, 255 beyond the palette."""
        table = np.full(_ENTRIES, 255, dtype=np.uint8)
        table[: len(self.alpha)] = self.alpha
        return np.asarray(table[index])

    def indexed(self, index: Bytes, rgb: Bytes, hole: Mask) -> tuple[Bytes, Palette]:
        """Indices for the painted colours, and the palette, longer where it had room.

        A pixel keeps its opacity: its colour is chosen among those as opaque as the one it had,
        and wholly transparent pixels stay as they are.

        Args:
            index: [H, W] as stored.
            rgb: [H, W, 3] the picture after painting.
            hole: [H, W] the pixels to choose colours for.

        Returns:
            [H, W] indices, equal to `index` outside the hole, and their palette.
        """
        visible = hole & (self.opacity(index) > 0)
        count = int(np.count_nonzero(visible))
        if not count:
            return index.copy(), self
        step = -(-count // _SAMPLE)
        used = self._padded(int(index.max()) + 1)
        rows = [slice(top, top + _STRIPE) for top in range(0, index.shape[0], _STRIPE)]
        sample = [(rgb[r][visible[r]][::step], index[r][visible[r]][::step]) for r in rows]
        palette = used._extended(
            np.concatenate([colours for colours, _ in sample]),
            self.opacity(np.concatenate([old for _, old in sample])),
        )
        result, matcher = index.copy(), _Matcher(palette)
        for r in rows:
            old = index[r][visible[r]]
            result[r][visible[r]] = matcher.nearest(rgb[r][visible[r]], palette.opacity(old), old)
        return result, palette

    def _padded(self, count: int) -> Palette:
        """At least so many entries: a picture may use black ones that its file leaves out."""
        more = max(0, count - len(self.colours))
        return Palette(
            np.pad(self.colours, ((0, more), (0, 0))),
            np.pad(self.alpha, (0, more), constant_values=255),
            self.translucent,
        )

    def _extended(self, colours: Bytes, alpha: Bytes) -> Palette:
        """The palette with the most useful opaque colours in its free entries."""
        free = _ENTRIES - len(self.colours)
        opaque = colours[alpha == 255]
        if free == 0 or not len(opaque):
            return self
        strip = Image.frombytes("RGB", (len(opaque), 1), opaque.tobytes())
        reduced = strip.quantize(free, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        found = np.unique(np.asarray(reduced.convert("RGB")).reshape(-1, 3), axis=0)[:free]
        known = set(map(tuple, self.colours[self.alpha == 255].tolist()))
        new = [colour for colour in found.tolist() if tuple(colour) not in known]
        if not new:
            return self
        return Palette(
            np.concatenate([self.colours, np.array(new, dtype=np.uint8)]),
            np.concatenate([self.alpha, np.full(len(new), 255, dtype=np.uint8)]),
            self.translucent,
        )

    def put_into(self, image: Image.Image) -> None:
        """Give a picture of mode P or PA this palette."""
        if self.translucent:
            raw = np.concatenate([self.colours, self.alpha[:, None]], axis=1)
            image.putpalette(raw.tobytes(), "RGBA")
        else:
            image.putpalette(self.colours.tobytes(), "RGB")


class _Matcher:
    """Nearest entries of a palette; those of opaque colours are remembered."""

    def __init__(self, palette: Palette) -> None:
        self._palette = palette
        self._opaque = np.full(1 << 24, -1, dtype=np.int16)

    def nearest(self, colours: Bytes, alpha: Bytes, index: Bytes) -> Bytes:
        """The nearest entry for each of [n, 3] colours, among those as opaque as asked."""
        result = np.array(index)
        code = colours.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
        for level in np.unique(alpha).tolist():
            entries = np.flatnonzero(self._palette.alpha == level)
            chosen = np.flatnonzero(alpha == level)
            wanted = code[chosen]
            if level == 255:
                new = np.unique(wanted[self._opaque[wanted] < 0])
                self._opaque[new] = entries[self._closest(new, entries)]
                result[chosen] = self._opaque[wanted]
            else:
                unique, back = np.unique(wanted, return_inverse=True)
                result[chosen] = entries[self._closest(unique, entries)][back.reshape(-1)]
        return result

    def _closest(self, code: NDArray[np.int32], entries: NDArray[np.intp]) -> NDArray[np.intp]:
        """Which of the entries is nearest to each colour, the first among equals."""
        colours = np.stack([code >> 16, code >> 8 & 255, code & 255], axis=1).astype(np.float32)
        table = self._palette.colours[entries].astype(np.float32)
        # |a - b|² without |a|², which is the same for every entry
        distance = (table**2).sum(axis=1) - 2.0 * (colours @ table.T)
        return np.asarray(np.argmin(distance, axis=1))
