"""Photographs for training: where they come from, which crop each number means, and how they load.

Training is a stream of numbers. Number n is one crop of one picture with one mask, a pure function
of (seed, n): workers, ranks, preloading and restarts change nothing. `CountingSampler` hands out
the numbers, `TrainingSet` says what each means, `loader` brings them to the trainer ahead of time,
and `WaitMeter` shows whether that is early enough.

The randomness is NumPy's (`SeedSequence`, `PCG64`). NumPy keeps its distributions from one version
to the next as a rule, not as a promise, so a stream is exact within one version of NumPy.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import multiprocessing
import os
import signal
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mat_torch.masks import MaskKind, preset_for, sample_mask

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

__all__ = [
    "NEAR",
    "PICTURE_SUFFIXES",
    "CountingSampler",
    "CropOptions",
    "DataError",
    "Duplicate",
    "HeldSource",
    "ImageSource",
    "Split",
    "TrainingSet",
    "WaitMeter",
    "decode_picture",
    "loader",
    "near_duplicates",
    "open_source",
    "picture_hash",
    "preload",
    "split",
]

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""What counts as a picture in a folder or archive, in lower case."""

NEAR = 16
"""Pictures whose hashes differ in at most so many of 128 bits count as near-duplicates.

Measured on 16 photographs: copies at 0.12 to 2 times the size and JPEG qualities from 30 up differ
in at most 13 bits, as do crops that lose 2 % on every side. Losing 5 % makes 7 bits (at most 27),
losing 10 % makes 22, and different photographs differ in 43 or more: crops need eyes as well."""

_PATH = str | os.PathLike[str]
_UINT8 = NDArray[np.uint8]
_T = TypeVar("_T")


class DataError(ValueError):
    """Pictures that cannot be used as they were asked for; the message says what to do."""


# -- sources ---------------------------------------------------------------------------------------


class ImageSource:
    """Pictures in a fixed order, each with a name. Safe to use from several processes and threads.

    Attributes:
        names: One for each picture: its path within the source, with forward slashes.
        where: What the source is, for messages.
        max_side: Longest side in pixels beyond which pictures are scaled down when they are read.
    """

    def __init__(self, names: Sequence[str], where: str, max_side: int | None = None) -> None:
        if max_side is not None and max_side < 1:
            raise DataError(f"max_side is a number of pixels from 1 up, got {max_side}")
        self.names = tuple(names)
        self.where = where
        self.max_side = max_side

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> _UINT8:
        """Picture `index` as [H, W, 3], 0 … 255, upright as its EXIF data says.

        Any mode becomes RGB: 16 bits are cut to 8, what is transparent is laid on white.

        Raises:
            DataError: If it cannot be read, or is damaged or cut short.
        """
        try:
            return decode_picture(self._content(index), self.max_side)
        except MemoryError:
            raise
        except Exception as error:  # on damaged files decoders raise just about anything
            reason = str(error).strip() or type(error).__name__
            raise DataError(
                f"the picture '{self.names[index]}' of {self.where} cannot be read ({reason}): "
                "replace or remove it"
            ) from error

    def _content(self, index: int) -> bytes:
        """The file's bytes."""
        raise NotImplementedError


class _Folder(ImageSource):
    def __init__(self, root: Path, max_side: int | None) -> None:
        if not os.access(root, os.R_OK | os.X_OK):
            raise DataError(f"the folder '{root}' cannot be read: give this user access to it")
        paths = (path for path in root.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
        names = sorted(path.relative_to(root).as_posix() for path in paths if path.is_file())
        super().__init__(names, f"the folder '{root}'", max_side)
        self._root = root

    def _content(self, index: int) -> bytes:
        return (self._root / self.names[index]).read_bytes()


class _Tars(ImageSource):
    """Pictures in tar files (WebDataset shards among them), found by position: nothing unpacked."""

    def __init__(self, paths: Sequence[Path], where: str, max_side: int | None) -> None:
        found = [
            (f"{path.name}/{name}", path, offset, size)
            for path in paths
            for name, offset, size in _members(path)
        ]
        super().__init__([name for name, *_ in found], where, max_side)
        self._places = [(path, offset, size) for _, path, offset, size in found]

    def _content(self, index: int) -> bytes:
        path, offset, size = self._places[index]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _members(path: Path) -> list[tuple[str, int, int]]:
    """Name, offset and size of every picture in a tar file."""
    try:
        with tarfile.open(path, "r:") as tar:
            return [
                (member.name, member.offset_data, member.size)
                for member in tar
                if member.isfile() and Path(member.name).suffix.lower() in PICTURE_SUFFIXES
            ]
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"'{path}' is no plain tar file that can be read ({error}): "
            "get a whole copy, and decompress .tar.gz and its like first"
        ) from error


class _Part(ImageSource):
    """Some pictures of another source."""

    def __init__(self, whole: ImageSource, indices: Sequence[int], where: str) -> None:
        super().__init__([whole.names[i] for i in indices], where, whole.max_side)
        self._whole, self._indices = whole, tuple(indices)

    def read(self, index: int) -> _UINT8:
        return self._whole.read(self._indices[index])


class HeldSource(ImageSource):
    """A source with decoded pictures in memory, and the errors of those that do not decode.

    `preload` makes it. `bytes_held` is how much memory the pictures take.
    """

    def __init__(self, source: ImageSource, limit_bytes: int, threads: int) -> None:
        super().__init__(source.names, source.where, source.max_side)
        self._source = source
        self._pictures: dict[int, _UINT8] = {}
        self._errors: dict[int, str] = {}
        self.bytes_held = 0
        with ThreadPoolExecutor(threads) as pool:
            step = 2 * threads  # so that few are decoded beyond the limit
            for first in range(0, len(self), step):
                chunk = range(first, min(first + step, len(self)))
                for index, picture in zip(chunk, pool.map(self._try, chunk), strict=True):
                    if isinstance(picture, str):
                        self._errors[index] = picture
                    elif self.bytes_held + picture.nbytes <= limit_bytes:
                        self._pictures[index] = picture
                        self.bytes_held += picture.nbytes
                    else:
                        return

    def _try(self, index: int) -> _UINT8 | str:
        try:
            return self._source.read(index)
        except DataError as error:
            return str(error)

    @property
    def damaged(self) -> dict[str, str]:
        """What is wrong with each picture that was tried and cannot be read, by name."""
        return {self.names[index]: error for index, error in self._errors.items()}

    def smaller_than(self, side: int) -> list[str]:
        """Names of the pictures in memory of which a side is shorter than this, in pixels."""
        return [self.names[i] for i, p in self._pictures.items() if min(p.shape[:2]) < side]

    @property
    def held(self) -> int:
        """How many pictures are in memory; the others are read each time."""
        return len(self._pictures)

    def read(self, index: int) -> _UINT8:
        if index in self._errors:
            raise DataError(self._errors[index])
        picture = self._pictures.get(index)
        return self._source.read(index) if picture is None else picture


def open_source(path: _PATH, *, max_side: int | None = None) -> ImageSource:
    """The pictures in a folder, in a tar file, or in several (WebDataset shards).

    Args:
        path: A folder, looked through with all its subfolders; a ``.tar`` file; a folder with
            ``.tar`` files in it (then they are meant, not pictures beside them); or a pattern like
            ``shards/train-*.tar``.
        max_side: Longest side in pixels; larger pictures are scaled down when they are read.

    Returns:
        The source, in the order of names.

    Raises:
        DataError: If there is nothing at `path`, it cannot be read, or no picture is in it.
    """
    where, text = Path(path), os.fspath(path)
    source: ImageSource
    if where.is_dir():
        tars = sorted(where.glob("*.tar"))
        source = _Tars(tars, f"'{path}'", max_side) if tars else _Folder(where, max_side)
    elif where.is_file():
        source = _Tars([where], f"'{path}'", max_side)
    elif glob.has_magic(text):
        matches = sorted(Path(match) for match in glob.glob(text, recursive=True))
        if not matches:
            raise DataError(f"nothing matches '{path}': give the pattern of the .tar files")
        source = _Tars(matches, f"'{path}'", max_side)
    else:
        raise DataError(f"there is no '{path}': give a folder of pictures, or .tar files")
    if not source.names:
        raise DataError(
            f"there is no picture in '{path}'; known are {', '.join(PICTURE_SUFFIXES)}: "
            "give a folder or .tar files that hold some"
        )
    return source


def preload(
    source: ImageSource, limit_bytes: int = 4 * 2**30, *, threads: int | None = None
) -> HeldSource:
    """The same pictures, decoded once and held in memory until a limit is reached.

    Worker processes that are forked (as on Linux) share the memory; spawned ones would each get a
    copy. What lies beyond the limit is read from the source each time, so what a number means does
    not depend on the limit.

    Args:
        source: Whose pictures. Its `max_side` decides how large they are in memory.
        limit_bytes: How much memory the decoded pictures may take, in bytes.
        threads: How many pictures are decoded at a time, one for each CPU core if None.

    Raises:
        DataError: For a limit below zero, or if every picture is damaged.
    """
    if limit_bytes < 0:
        raise DataError(f"the limit is a number of bytes from 0 up, got {limit_bytes}")
    held = HeldSource(source, limit_bytes, threads or os.cpu_count() or 1)
    if len(held._errors) == len(held):
        raise _all_damaged(source.where, len(held), next(iter(held._errors.values())))
    return held


def _all_damaged(where: str, count: int, last: str) -> DataError:
    return DataError(
        f"none of {count} pictures in a row of {where} can be read: look at the files; "
        f"the last one said: {last}"
    )


# -- decoding --------------------------------------------------------------------------------------


def decode_picture(content: bytes, max_side: int | None = None) -> _UINT8:
    """A picture file's bytes as [H, W, 3], as `ImageSource.read` gives it; raises what Pillow does.

    Args:
        content: The whole file.
        max_side: Longest side in pixels; a larger picture is scaled down.
    """
    with Image.open(io.BytesIO(content)) as image:
        if max_side is not None:
            # JPEG decodes at ½, ¼ or ⅛ for less; twice the size is left to a better filter.
            width, height = _within(image.size, 2 * max_side)
            image.draft(None, (width, height))
        upright = _rgb(ImageOps.exif_transpose(image))
    if max_side is not None and max(upright.size) > max_side:
        upright = upright.resize(_within(upright.size, max_side), Image.Resampling.LANCZOS)
    return np.asarray(upright)


def _within(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """The size scaled down to this longest side, or as it is."""
    factor = min(1.0, longest / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):  # whole numbers of 16 bits; or 0 … 1, or 0 … 255
        values = np.asarray(image).astype(np.float64)
        top = values.max()
        scale = 1 / 257 if top > 255 else 255.0 if image.mode == "F" and top <= 1 else 1.0
        grey = np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


# -- the training set ------------------------------------------------------------------------------


@dataclass(frozen=True)
class CropOptions:
    """How a crop is cut and changed; the defaults are what was published.

    Attributes:
        share: Side of the crop as a share of the picture's shorter side, uniform in this range
            (0 … 1), scaled to the resolution with antialiasing. It is never enlarged: the crop
            takes at least as many pixels as the resolution. None takes exactly that many.
        flip: Mirror every other crop, on average.
        pad: Extend pictures smaller than the crop by reflection at the bottom and right, again and
            again if they are very small. Without it they are errors.
        jitter: Brightness, contrast and saturation are each multiplied by up to 1 ± this.
        masks: Kind of the masks; ``mixed`` draws large and small ones equally often.

    Raises:
        DataError: For values out of range.
    """

    share: tuple[float, float] | None = None
    flip: bool = True
    pad: bool = True
    jitter: float = 0.0
    masks: MaskKind | Literal["mixed"] = "large"

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share[0] <= self.share[1] <= 1:
            raise DataError(f"share is a range of shares within 0 … 1, got {self.share}")
        if not 0 <= self.jitter < 1:
            raise DataError(f"jitter is at least 0 and less than 1, got {self.jitter}")
        if self.masks not in ("large", "small", "mixed"):
            raise DataError(f"masks are 'large', 'small' or 'mixed', got {self.masks!r}")


class TrainingSet:
    """What every number of the training stream means: a map-style dataset without an end.

    Pictures are taken in a new random order in each epoch (once through the source). One that
    cannot be read is passed over for the next in that order, so that item n does not depend on who
    reads it; `passed_over` names them all, whichever worker process met them.

    Args:
        source: The pictures.
        resolution: Side of the crops, in pixels.
        seed: A whole number in [0, 2⁶⁴).
        options: How crops are cut and changed.

    Raises:
        DataError: For an empty source, or a seed out of range.
        MaskError: If no masks exist of that resolution.
    """

    def __init__(
        self,
        source: ImageSource,
        resolution: int,
        seed: int,
        options: CropOptions | None = None,
    ) -> None:
        self.source, self.resolution, self.seed = source, resolution, seed
        self.options = CropOptions() if options is None else options
        if len(source) == 0:
            raise DataError(f"there is no picture in {source.where}: training needs at least one")
        if not 0 <= seed < 2**64:
            raise DataError(f"a seed is a whole number from 0 to 2**64 - 1, got {seed}")
        preset_for("large", resolution)
        # Shared with the workers, whether they are forked or spawned.
        self._unreadable = multiprocessing.RawArray("B", len(source))
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Pictures of the source, and so numbers in an epoch; numbers go on beyond it."""
        return len(self.source)

    @property
    def passed_over(self) -> list[str]:
        """Names of the pictures met so far that cannot be read."""
        return [name for name, bad in zip(self.source.names, self._unreadable, strict=True) if bad]

    def __getitem__(self, number: int) -> dict[str, Tensor | int]:
        """Item `number`, from 0 up.

        Returns:
            ``image`` uint8 [3, R, R], ``mask`` uint8 [1, R, R] (1 keep, 0 hole), ``number``.

        Raises:
            DataError: If no picture (of the next thousand) can be read, or one is smaller than the
                crop and is not to be padded.
            IndexError: For a number below 0, or beyond what an int64 holds.
        """
        import torch

        if not 0 <= number < 2**63:
            raise IndexError(f"items are numbered from 0 to 2**63 - 1, got {number}")
        picture, name = self._picture(number)
        crop = self._crop(picture, name, self._rng("crop", number))
        crop = self._changed(crop, self._rng("change", number))
        keep = self._mask(self._rng("mask", number))
        return {
            "image": torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))),
            "mask": torch.from_numpy(keep[None].astype(np.uint8)),
            "number": number,
        }

    def _rng(self, purpose: str, number: int) -> np.random.Generator:
        """One stream for each purpose, so that no option changes the draws of another."""
        kind = ("order", "crop", "change", "mask").index(purpose)
        # Words of fixed length: entropy of two lists is the same only if they are.
        entropy = [self.seed & 0xFFFFFFFF, self.seed >> 32, kind]
        entropy += [number & 0xFFFFFFFF, number >> 32]
        return np.random.default_rng(np.random.SeedSequence(entropy))

    def _picture(self, number: int) -> tuple[_UINT8, str]:
        count = len(self.source)
        epoch, place = divmod(number, count)
        if self._order[0] != epoch:
            self._order = (epoch, self._rng("order", epoch).permutation(count))
        last = "it was met before"
        tries = min(count, 1000)
        for step in range(tries):
            index = int(self._order[1][(place + step) % count])
            if self._unreadable[index]:
                continue
            try:
                return self.source.read(index), self.source.names[index]
            except DataError as error:
                self._unreadable[index] = 1
                last = str(error)
        raise _all_damaged(self.source.where, tries, last)

    def _crop(self, picture: _UINT8, name: str, rng: np.random.Generator) -> _UINT8:
        """A square of the picture, [R, R, 3]."""
        side, (height, width, _) = self.resolution, picture.shape
        shorter = min(height, width)
        if shorter < side and not self.options.pad:
            raise DataError(
                f"the picture '{name}' is {width}x{height} pixels and crops are {side} a side: "
                "allow padding, lower the resolution, or remove it"
            )
        cut = side
        if self.options.share is not None:
            cut = max(side, round(rng.uniform(*self.options.share) * shorter))
        top = int(rng.integers(max(height - cut, 0), endpoint=True))
        left = int(rng.integers(max(width - cut, 0), endpoint=True))
        crop = picture[top : top + cut, left : left + cut]
        if cut > side:
            resized = Image.fromarray(crop).resize((side, side), Image.Resampling.BICUBIC)
            return np.asarray(resized)
        lacking = [(0, side - crop.shape[0]), (0, side - crop.shape[1]), (0, 0)]
        return np.pad(crop, lacking, mode="reflect")

    def _changed(self, crop: _UINT8, rng: np.random.Generator) -> _UINT8:
        if self.options.flip and rng.random() < 0.5:
            crop = crop[:, ::-1]
        if self.options.jitter:
            brightness, contrast, saturation = 1 + self.options.jitter * rng.uniform(-1, 1, 3)
            values = crop.astype(np.float32) * np.float32(brightness)
            red, green, blue = np.moveaxis(values, -1, 0)
            grey = (0.299 * red + 0.587 * green + 0.114 * blue)[..., None]  # BT.601 luma
            values = grey + (values - grey) * np.float32(saturation)
            values = grey.mean() + (values - grey.mean()) * np.float32(contrast)
            crop = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        return crop

    def _mask(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        kind = self.options.masks
        if kind == "mixed":
            kind = "large" if rng.random() < 0.5 else "small"
        return sample_mask(kind, self.resolution, rng)


# -- loading ---------------------------------------------------------------------------------------


class CountingSampler:
    """Batches of consecutive numbers, dealt to the ranks in turn: a batch sampler for `loader`.

    Rank r of w takes start + r, start + r + w, start + r + 2w, …, so the numbers of all the ranks
    at one step are those of the single process with the batch w times as large, and a run resumed
    at the number of items taken so far goes on exactly.

    Args:
        start: The first number, the same on every rank.
        batch: Numbers in each batch of this rank.
        rank: Which one this is, from 0.
        world: How many ranks there are.
        repeat: How many batches there are; without end if None.

    Raises:
        DataError: For values out of range.
    """

    def __init__(
        self, start: int, batch: int, rank: int = 0, world: int = 1, repeat: int | None = None
    ) -> None:
        if start < 0 or batch < 1 or not 0 <= rank < world or (repeat is not None and repeat < 0):
            raise DataError(
                f"got start {start}, batch {batch}, rank {rank} of {world}, repeat {repeat}: start "
                "and repeat are at least 0, batch at least 1, and ranks count from 0"
            )
        self.start, self.batch, self.rank, self.world = start, batch, rank, world
        self.repeat = repeat

    def __iter__(self) -> Iterator[list[int]]:
        step = 0
        while self.repeat is None or step < self.repeat:
            first = self.start + step * self.batch * self.world + self.rank
            yield list(range(first, first + self.batch * self.world, self.world))
            step += 1

    def __len__(self) -> int:
        if self.repeat is None:
            raise TypeError("this sampler has no end: give repeat for a number of batches")
        return self.repeat


def loader(
    dataset: TrainingSet,
    sampler: CountingSampler,
    *,
    workers: int = 0,
    prefetch: int = 4,
    pin_memory: bool | None = None,
) -> DataLoader[dict[str, Tensor]]:
    """Batches of the dataset, prepared ahead by worker processes.

    Args:
        dataset: What the numbers mean.
        sampler: Which numbers come in which batch.
        workers: Processes that prepare batches; they stay from one iteration to the next. 0
            prepares each when it is asked for.
        prefetch: Batches that each worker has ready.
        pin_memory: Page-locked memory, for copies to the GPU that do not wait; where there is a
            GPU if None.

    Returns:
        A loader of dicts: ``image`` uint8 [B, 3, R, R], ``mask`` uint8 [B, 1, R, R], ``number``
        int64 [B]. Iterating it takes nothing from torch's global random numbers.
    """
    import torch
    from torch.utils.data import DataLoader

    options: dict[str, Any] = {}
    if workers:
        forks = "fork" in multiprocessing.get_all_start_methods()
        options = {
            "persistent_workers": True,
            "prefetch_factor": prefetch,
            # Forked workers share the preloaded pictures.
            "multiprocessing_context": "fork" if forks else None,
            "worker_init_fn": _leave_signals,
        }
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # map-style by its methods; torch stays a late import
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        generator=torch.Generator().manual_seed(0),
        **options,
    )


def _leave_signals(_worker: int) -> None:
    """In a worker: whoever stops the whole group means the trainer, which ends its step and us."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class WaitMeter(Generic[_T]):
    """Passes items on and measures which share of the time is spent waiting for them.

    Waiting is the time inside ``next``; the rest lies between an item and the request for the next
    one. The first item is left out, since workers start up for it. On a GPU, the caller has to wait
    for its work (``torch.cuda.synchronize``) now and then for the times to mean anything.

    Attributes:
        items: How many were passed on.
        waited: Seconds spent waiting, without the first item.
        worked: Seconds in between.
    """

    def __init__(
        self, items: Iterable[_T], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._items, self._clock = iter(items), clock
        self._handed: float | None = None
        self.items, self.waited, self.worked = 0, 0.0, 0.0

    def __iter__(self) -> Iterator[_T]:
        return self

    def __next__(self) -> _T:
        asked = self._clock()
        item = next(self._items)
        now = self._clock()
        if self._handed is not None:
            self.waited += now - asked
            self.worked += asked - self._handed
        self._handed = now
        self.items += 1
        return item

    @property
    def share(self) -> float:
        """Share of the time spent waiting, 0 … 1; 0 before the second item."""
        total = self.waited + self.worked
        return self.waited / total if total else 0.0

    def reset(self) -> None:
        """Start counting anew, from the next item but one."""
        self._handed = None
        self.items, self.waited, self.worked = 0, 0.0, 0.0


# -- held-out photographs --------------------------------------------------------------------------


class Duplicate(NamedTuple):
    """Two pictures that look the same: their names, and how many of 128 bits differ."""

    first: str
    second: str
    distance: int


class Split(NamedTuple):
    """A source in two: what is trained on, what is held out, and what is in neither.

    `duplicates` pairs each picture that was left out of `train` with the held-out one it repeats.
    """

    train: ImageSource
    heldout: ImageSource
    duplicates: tuple[Duplicate, ...]


def split(source: ImageSource, heldout: float | Iterable[str], *, near: int | None = NEAR) -> Split:
    """Hold whole photographs out of training, the same ones on every call.

    Args:
        source: All the pictures.
        heldout: Which: their names, or a share in (0, 1) of them. A share takes those whose names
            have the smallest SHA-256, so that pictures added later change little.
        near: Pictures whose hash differs from a held-out one's in at most so many of 128 bits are
            left out of training too. None does not look, and decodes nothing.

    Raises:
        DataError: For unknown names, a share out of range, or if one side would be empty.
    """
    if isinstance(heldout, int | float):
        if not 0 < heldout < 1:
            raise DataError(f"the share held out is more than 0 and less than 1, got {heldout}")
        order = sorted(source.names, key=lambda name: hashlib.sha256(name.encode()).digest())
        names = set(order[: max(1, round(heldout * len(order)))])
    else:
        names = set(heldout)
        unknown = sorted(names.difference(source.names))
        if unknown:
            raise DataError(
                f"{source.where} has no picture '{unknown[0]}' to hold out "
                f"({len(unknown)} of {len(names)} names are unknown): give names as it lists them"
            )
    out = [index for index, name in enumerate(source.names) if name in names]
    rest = [index for index, name in enumerate(source.names) if name not in names]
    held = _Part(source, out, f"the held-out part of {source.where}")
    train = _Part(source, rest, f"the training part of {source.where}")
    duplicates: tuple[Duplicate, ...] = ()
    if near is not None:
        duplicates = tuple(near_duplicates(train, held, near))
        repeated = {pair.first for pair in duplicates}
        rest = [index for index in rest if source.names[index] not in repeated]
        train = _Part(source, rest, train.where)
    if not out or not rest:
        raise DataError(
            f"of {len(source)} pictures of {source.where}, {len(rest)} are left to train on and "
            f"{len(out)} are held out: each side needs one"
        )
    return Split(train, held, duplicates)


def picture_hash(picture: _UINT8) -> NDArray[np.bool_]:
    """What a picture looks like at a glance, in 128 bits (a difference hash, "dHash").

    The picture is scaled to 9 × 9 grey values; 64 bits say where the right one of two neighbours is
    brighter, and 64 where the lower one is. Size, compression and exposure change few bits; a crop
    that leaves a good part away changes many.

    Args:
        picture: [H, W, 3], 0 … 255.

    Returns:
        [128], True and False.
    """
    grey = (
        Image.fromarray(np.ascontiguousarray(picture))
        .convert("L")
        .resize((9, 9), Image.Resampling.BOX)
    )
    values = np.asarray(grey, np.int16)
    across = np.diff(values, axis=1)[:8] > 0
    down = np.diff(values, axis=0)[:, :8] > 0
    return np.concatenate([across.ravel(), down.ravel()])


def near_duplicates(
    first: ImageSource, second: ImageSource | None = None, near: int = NEAR
) -> list[Duplicate]:
    """Pairs that look the same, as they are or mirrored (training mirrors too).

    Pictures that cannot be read are left out of the comparison.

    Args:
        first: Pictures to compare.
        second: With these; if None, with each other, every pair once.
        near: At most so many of the 128 bits differ.

    Returns:
        The pairs, in the order of the sources.
    """
    readable, hashes = _hashes(first)
    others, plain = (readable, hashes) if second is None else _hashes(second)
    names = first.names if second is None else second.names
    pairs = []
    for index, both in zip(readable, hashes, strict=True):
        distances = (both[:, None] ^ plain[None, :, 0]).sum(axis=-1).min(axis=0)
        for place in np.flatnonzero(distances <= near):
            other = others[place]
            if second is not None or other > index:
                pairs.append(Duplicate(first.names[index], names[other], int(distances[place])))
    return pairs


def _hashes(source: ImageSource) -> tuple[list[int], NDArray[np.bool_]]:
    """Which pictures are readable, and the hash of each and of its mirror image, [n, 2, 128]."""
    readable, found = [], []
    for index in range(len(source)):
        with contextlib.suppress(DataError):
            picture = source.read(index)
            found.append([picture_hash(picture), picture_hash(picture[:, ::-1])])
            readable.append(index)
    return readable, np.array(found, bool).reshape(-1, 2, 128)
