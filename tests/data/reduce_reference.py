"""Cut the reference vectors down to what the tests need: `python reduce_reference.py SOURCE`.

SOURCE is the folder of the full vectors; the reduced ones are written beside this script.
README.md says what is kept and why.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

PIXEL_STRIDE = 5
"""Every fifth row and column of a picture: odd, so that every phase of the upsampling is met."""

TOKEN_STRIDE = 7
"""Every seventh token of a block's result: odd, so that every column of a window is met."""

BLOCK_ITEMS: dict[str, slice] = {
    # Item 0 has one valid square, and only it leaves windows of 16 without any valid token.
    "w16": slice(0, 1),
    "w16s8": slice(0, 1),
    # Item 1 has scattered valid tokens, yet some windows of 8 without any.
    "w8": slice(1, 2),
    "w8s4": slice(1, 2),
    # One window is the whole grid, and small: both items.
    "w16full": slice(0, 2),
}
"""Which items of the batch to keep of each block."""

GENERATORS = ("generator_256", "generator_256_psi05", "generator_512_nonoise")


def reduced_block(full: Arrays, items: slice) -> Arrays:
    """Some items whole on the way in, every TOKEN_STRIDE-th token of their results."""
    kept = {name: full[name] for name in ("window", "shift", "resolution")}
    kept |= {name: full[name][items] for name in ("x", "mask", "mask_out")}
    kept |= {name: full[name][items, ::TOKEN_STRIDE] for name in ("y", "y_nomask")}
    return kept | {"stride": np.array(TOKEN_STRIDE)}


def reduced_generator(full: Arrays) -> Arrays:
    """Everything but the pictures that come out: every PIXEL_STRIDE-th row and column of those."""
    kept = {name: array for name, array in full.items() if not name.endswith((".mean", ".std"))}
    for name in ("output", "stage1"):
        kept[name] = full[name][..., ::PIXEL_STRIDE, ::PIXEL_STRIDE]
    return kept | {"stride": np.array(PIXEL_STRIDE)}


def names_and_shapes(tensors: dict[str, dict[str, Any]]) -> str:
    """A line for every tensor: its name, and its shape as numbers after it."""
    return "".join(f"{' '.join([name, *map(str, t['shape'])])}\n" for name, t in tensors.items())


def main(source: Path, target: Path) -> None:
    """Write every reduced file into the target folder."""

    def load(name: str) -> Arrays:
        with np.load(source / f"{name}.npz") as file:
            return {key: file[key] for key in file.files}

    for tag, items in BLOCK_ITEMS.items():
        block: Any = reduced_block(load(f"block_{tag}"), items)
        np.savez_compressed(target / f"block_{tag}.npz", **block)
    for name in GENERATORS:
        generator: Any = reduced_generator(load(name))
        np.savez_compressed(target / f"{name}.npz", **generator)
    shutil.copyfile(source / "discriminator_256.npz", target / "discriminator_256.npz")
    models = json.loads((source / "state_dict_names.json").read_text())
    for name in ("generator_256", "generator_512", "discriminator_256", "discriminator_512"):
        (target / f"{name}_names.txt").write_text(names_and_shapes(models[name]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(__file__).parent)
