"""Inpainting files and folders, for the command line: pairs matched by stem, one after the other.

NumPy, Pillow and a runner; no torch. A single pair that fails raises; in a folder the rest goes on,
and every picture has its `Outcome`. Files are written whole or not at all, and never over an input.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mat_export.contract import UserError
from mat_export.files import require_other
from mat_export.images import (
    READABLE,
    WRITABLE,
    check_output,
    lossless_suffix,
    read_image,
    write_image,
)
from mat_export.inpaint import Inpainter, check_seeds
from mat_export.sheet import ContactSheet

__all__ = ["Job", "Outcome", "Progress", "inpaint_paths", "plan_jobs"]

_PATH = str | os.PathLike[str]


@dataclass(frozen=True)
class Job:
    """One picture to fill.

    Attributes:
        image: Its file.
        mask: The mask's file, None where the folder of masks has none of this stem.
        out: The output file, or the folder where it goes under the picture's stem.
        in_folder: `out` is a folder.
    """

    image: Path
    mask: Path | None
    out: Path
    in_folder: bool


@dataclass(frozen=True)
class Outcome:
    """What became of one picture.

    Attributes:
        source: The picture's file.
        outputs: The files written for it, complete.
        seconds: Wall time from reading to writing.
        error: Why it failed, in a sentence; None if it did not.
        notes: Sentences on the picture, its mask and its outputs.
        runs: Windows the model filled, in all answers together.
    """

    source: Path
    outputs: tuple[Path, ...] = ()
    seconds: float = 0.0
    error: str | None = None
    notes: tuple[str, ...] = ()
    runs: int = 0


Progress = Callable[[int, int, Outcome], None]
"""Called after each picture with how many are done, how many there are, and the outcome."""


def inpaint_paths(
    inpainter: Inpainter,
    image: _PATH,
    mask: _PATH,
    out: _PATH,
    *,
    seed: int = 0,
    count: int = 1,
    truncation: float = 1.0,
    hole: str = "black",
    sheet: ContactSheet | None = None,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Fill one picture, or every picture of a folder.

    Args:
        inpainter: What fills.
        image: A picture file, or a folder of them (not those in its subfolders).
        mask: A mask file, or a folder in which masks have the pictures' stems. One mask file serves
            all pictures of a folder.
        out: For a picture file the file to write, or an existing folder; for a folder of pictures
            a folder, which is made if there is none. In a folder the output has the picture's stem
            and suffix, or ``.png`` (``.tif`` where that holds the mode no better) if the picture's
            format is lossy.
        seed: In [0, 2⁶⁴).
        count: Answers for each picture, of the seeds seed … seed + count - 1. With more than one,
            ``_seedN`` is added to the names.
        truncation: ψ in [0, 2].
        hole: The holes' colour in the masks, ``black`` or ``white``.
        sheet: Gets a row for each picture.
        progress: Called after each picture.

    Returns:
        One outcome a picture, by name.

    Raises:
        UserError: For bad options, a folder that holds no pair or two files of one stem, an output
            that cannot be written or would be an input; and for whatever is wrong with a single
            picture. In a folder that is told in the outcome.
    """
    check_seeds(seed, count)
    jobs = plan_jobs(image, mask, out)
    alone = not Path(image).is_dir()
    if not alone:
        _make_folder(Path(out))
    outcomes: list[Outcome] = []
    for job in jobs:
        start = time.perf_counter()
        work = _Work(job, inpainter, sheet)
        try:
            work.run(seed, count, truncation, hole)
        except UserError as error:
            if alone:
                raise
            work.error = str(error)
        outcomes.append(work.outcome(time.perf_counter() - start))
        if progress is not None:
            progress(len(outcomes), len(jobs), outcomes[-1])
    return outcomes


# -- planning --------------------------------------------------------------------------------------


def plan_jobs(image: _PATH, mask: _PATH, out: _PATH) -> list[Job]:
    """The pictures to fill, with masks and outputs, in the order of their names; writes nothing.

    Raises:
        UserError: As `inpaint_paths`, as far as names and folders tell.
    """
    images, masks, target = Path(image), Path(mask), Path(out)
    for path, what in ((images, "picture"), (masks, "mask")):
        if not path.exists():
            raise UserError(f"there is no {what} file or folder '{path}'")
    if not images.is_dir():
        return [_single_job(images, masks, target)]
    if masks.is_dir() and images.samefile(masks):
        raise UserError(f"pictures and masks are both in '{images}': use a folder for each")
    _check_out_folder(target, images, masks)
    pictures = _by_stem(images)
    if not pictures:
        raise UserError(f"there is no picture in the folder '{images}' ({_suffixes()})")
    found = _by_stem(masks) if masks.is_dir() else dict.fromkeys(pictures, masks)
    if not pictures.keys() & found.keys():
        raise UserError(
            f"no picture in '{images}' has a mask of its name in '{masks}': a mask is named like "
            f"its picture, as in {next(iter(pictures))}.png"
        )
    return [Job(path, found.get(stem), target, True) for stem, path in pictures.items()]


def _single_job(image: Path, mask: Path, out: Path) -> Job:
    if mask.is_dir():
        found = _by_stem(mask)
        if image.stem not in found:
            raise UserError(f"the folder '{mask}' has no mask named '{image.stem}' for '{image}'")
        mask = found[image.stem]
    if not out.is_dir():
        check_output(out)
        require_other(out, image, mask)
    return Job(image, mask, out, out.is_dir())


def _by_stem(folder: Path) -> dict[str, Path]:
    """The picture files of a folder by their stems, in order."""
    found: dict[str, Path] = {}
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"the folder '{folder}' cannot be read: {error.strerror}") from error
    for path in entries:
        if path.suffix.lower() not in READABLE or path.name.startswith(".") or path.is_dir():
            continue
        if path.stem in found:
            raise UserError(
                f"'{found[path.stem].name}' and '{path.name}' in '{folder}' have the same stem, "
                "which is what pictures and masks are matched by: rename one"
            )
        found[path.stem] = path
    return found


def _check_out_folder(out: Path, images: Path, masks: Path) -> None:
    """The output of a folder: a folder of its own, or one that can be made."""
    if out.exists() and not out.is_dir():
        raise UserError(f"'{images}' is a folder, so the output has to be one; '{out}' is a file")
    if not out.exists() and out.suffix.lower() in WRITABLE:
        raise UserError(f"'{images}' is a folder, so the output has to be one, got '{out}'")
    for folder in (images, masks):
        if out.exists() and folder.is_dir() and out.samefile(folder):
            raise UserError(f"the output folder '{out}' holds the inputs: choose another")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"the folder '{folder}' cannot be made: {reason}") from error
    check_output(folder / "any.png")


def _suffixes() -> str:
    return "looked for " + ", ".join(sorted(READABLE))


# -- doing -----------------------------------------------------------------------------------------


class _Work:
    """One job under way, and what it has come to."""

    def __init__(self, job: Job, inpainter: Inpainter, sheet: ContactSheet | None) -> None:
        self.job = job
        self.inpainter = inpainter
        self.sheet = sheet
        self.notes: list[str] = []
        self.outputs: list[Path] = []
        self.runs = 0
        self.error: str | None = None

    def outcome(self, seconds: float) -> Outcome:
        notes = tuple(dict.fromkeys(self.notes))
        return Outcome(self.job.image, tuple(self.outputs), seconds, self.error, notes, self.runs)

    def run(self, seed: int, count: int, truncation: float, hole: str) -> None:
        """Read, fill and write; outputs that can't be written are found before the model runs."""
        job = self.job
        if job.mask is None:
            raise UserError(f"there is no mask named '{job.image.stem}' for '{job.image}'")
        image = read_image(job.image, self.notes)
        outputs = self._outputs(image.mode, range(seed, seed + count))
        answers = self.inpainter.answers(
            image, job.mask, seed=seed, count=count, truncation=truncation, hole=hole
        )
        for i, (path, answer) in enumerate(zip(outputs, answers, strict=True)):
            assert isinstance(answer.image, Image.Image), "a picture file gives an image"
            self.runs += answer.runs
            self.notes += answer.notes
            write_image(answer.image, path, self.notes)
            self.outputs.append(path)
            if self.sheet is not None:
                if i == 0:
                    self.sheet.start(job.image.name, image, answer.keep)
                self.sheet.answer(f"seed {answer.seed}", answer.image)

    def _outputs(self, mode: str, seeds: range) -> list[Path]:
        """The files to write, checked."""
        job = self.job
        out = job.out
        if job.in_folder:
            out = out / f"{job.image.stem}{lossless_suffix(job.image.suffix, mode)}"
        several = len(seeds) > 1
        named = [
            out.with_name(f"{out.stem}_seed{s}{out.suffix}") if several else out for s in seeds
        ]
        for path in named:
            check_output(path, mode)
            require_other(path, job.image, job.mask)
        return named
