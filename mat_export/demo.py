"""``python -m mat_export.demo FOLDER``: a photograph and a mask to try the commands on."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from mat_export.contract import UserError
from mat_export.images import write_image

__all__ = ["PHOTOGRAPH", "write_example"]

PHOTOGRAPH = "chelsea"
"""Its name in scikit-image's sample data; the shipped model was not trained on it."""

CREDIT = "Chelsea the cat, by Stéfan van der Walt, CC0, from scikit-image's sample data"


def write_example(folder: Path) -> tuple[Path, Path]:
    """Write ``photo.png`` (451×300) and ``mask.png`` (white kept, black the hole) into a folder.

    Raises:
        UserError: If scikit-image is not installed or the folder cannot be written.
    """
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise UserError("the example photograph is scikit-image's: pip install it") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{folder}': {error.strerror}") from error
    photo = Image.fromarray(getattr(data, PHOTOGRAPH)())
    mask = Image.new("L", photo.size, 255)
    pen = ImageDraw.Draw(mask)
    pen.ellipse([25, 40, 95, 120], fill=0)
    pen.line([(330, 40), (380, 130), (350, 230)], fill=0, width=34, joint="curve")
    paths = folder / "photo.png", folder / "mask.png"
    for image, path in zip((photo, mask), paths, strict=True):
        write_image(image, path)
    return paths


if __name__ == "__main__":
    try:
        written = write_example(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
    print(f"wrote {' and '.join(map(str, written))} ({CREDIT})")
