from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runner import FakeRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mat_export.canvas import upright
from mat_export.contract import UserError
from mat_export.inpaint import Inpainter, region_seed
from mat_torch.sampling import draw

Array = NDArray[Any]
Mask = NDArray[np.bool_]

MODES = (
    *("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"),
    *("I;16", "I;16B", "I", "F"),
)
ALPHA = {"LA": 1, "PA": 1, "RGBA": 3, "RGBX": 3}
DTYPES = ("bool", "uint8", "uint16", "int32", "float32", "float64")


def fill(image: Any, mask: Any, **options: Any) -> Any:
    return Inpainter(FakeRunner())(image, mask, **options)


def noise(mode: str, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A picture of noise in any mode."""
    if mode == "1":
        return Image.fromarray(rng.random((height, width)) < 0.5)
    if mode == "F":
        return Image.fromarray((rng.normal(size=(height, width)) * 1000).astype(np.float32))
    if mode == "I":
        return Image.fromarray(rng.integers(-(2**31), 2**31 - 1, (height, width), dtype=np.int32))
    per_pixel = {"L": 1, "P": 1, "RGB": 3, "YCbCr": 3, "HSV": 3, "RGBA": 4, "CMYK": 4, "RGBX": 4}
    data = rng.bytes(per_pixel.get(mode, 2) * width * height)
    if mode in ("P", "PA"):
        small = bytes(b % 30 if mode == "P" or i % 2 == 0 else b for i, b in enumerate(data))
        image = Image.frombytes(mode, (width, height), small)
        image.putpalette(rng.bytes(3 * 30))
        return image
    return Image.frombytes(mode, (width, height), data)


def holes(height: int, width: int, rng: np.random.Generator) -> Mask:
    """True where kept: a rectangle, and sometimes specks, all or nothing."""
    keep = np.ones((height, width), dtype=np.bool_)
    top, left = rng.integers(height), rng.integers(width)
    keep[top : top + rng.integers(1, 80), left : left + rng.integers(1, 80)] = False
    share = rng.choice([0.0, 0.01, 0.9, 1.0], p=[0.7, 0.1, 0.1, 0.1])
    return np.asarray(keep & (rng.random((height, width)) >= share))


def under(image: Image.Image, keep: Mask, rng: np.random.Generator) -> Image.Image:
    """The same picture with other colours under the hole, and the same alpha."""
    other = np.array(image)
    replaced = np.asarray(noise(image.mode, *image.size, rng))
    colours = other[..., : ALPHA[image.mode]] if image.mode in ALPHA else other
    colours[~keep] = (replaced[..., : ALPHA[image.mode]] if image.mode in ALPHA else replaced)[
        ~keep
    ]
    packed = np.packbits(other, axis=1) if image.mode == "1" else other
    result = Image.frombytes(image.mode, image.size, packed.tobytes())
    result.info = dict(image.info)
    if image.mode in ("P", "PA"):
        result.putpalette(image.getpalette("RGB") or [])
    return result


def exif(orientation: int) -> bytes:
    data = Image.Exif()
    data[0x0110] = "Camera 3000"
    data[0x0112] = orientation
    return data.tobytes()


# -- what every answer holds -----------------------------------------------------------------------


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(MODES),
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(1, 8),
    st.integers(0, 10_000),
)
def test_any_mode_and_size_comes_back_as_it_was_but_for_the_hole(
    mode: str, width: int, height: int, orientation: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    image = noise(mode, width, height, rng)
    image.info |= {"icc_profile": b"profile", "exif": exif(orientation), "dpi": (72, 72)}
    before = image.tobytes()
    shown_height, shown_width = upright(np.asarray(image), orientation).shape[:2]
    keep = holes(shown_height, shown_width, rng)
    inpainter = Inpainter(FakeRunner())
    result = inpainter.fill(image, keep, seed=seed).image

    assert isinstance(result, Image.Image)
    assert (result.mode, result.size, result.info) == (image.mode, image.size, image.info)
    old, new = np.asarray(image), np.asarray(result)
    shown_old, shown_new = upright(old, orientation), upright(new, orientation)
    np.testing.assert_array_equal(shown_new[keep], shown_old[keep])
    if mode in ALPHA:
        np.testing.assert_array_equal(new[..., ALPHA[mode]], old[..., ALPHA[mode]])
    if mode in ("P", "PA"):
        assert (result.getpalette() or [])[:90] == image.getpalette()
    assert image.tobytes() == before, "the input was changed"

    again = inpainter.fill(image, keep, seed=seed).image
    stored_keep = np.empty(old.shape[:2], dtype=np.bool_)
    upright(stored_keep, orientation)[...] = keep
    other = inpainter.fill(under(image, stored_keep, rng), keep, seed=seed).image
    assert isinstance(again, Image.Image)
    assert isinstance(other, Image.Image)
    assert again.tobytes() == result.tobytes()
    assert other.tobytes() == result.tobytes(), "something under the hole shows"
    assert other.getpalette() == result.getpalette()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([(), (1,), (2,), (3,), (4,)]),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 10_000),
)
def test_arrays_of_any_type_come_back_as_they_were_but_for_the_hole(
    dtype: str, channels: tuple[int, ...], height: int, width: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    array = (rng.random((height, width, *channels)) * 300).astype(dtype)
    before, keep = array.copy(), holes(height, width, rng)
    result = fill(array, keep, seed=seed)
    assert (result.dtype, result.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(result[keep], array[keep])
    if channels in ((2,), (4,)):
        np.testing.assert_array_equal(result[..., -1], array[..., -1])
    np.testing.assert_array_equal(array, before)
    assert result.base is None or result.base is not array


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (1, 300), (300, 1), (2, 2)])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_tiny_pictures(size: tuple[int, int], share: float) -> None:
    rng = np.random.default_rng(0)
    image = noise("RGB", *size, rng)
    keep = rng.random((size[1], size[0])) >= share
    keep.flat[0] = False
    result = np.asarray(fill(image, keep))
    np.testing.assert_array_equal(result[keep], np.asarray(image)[keep])


def test_a_picture_without_holes_costs_no_run_and_comes_back_the_same() -> None:
    runner = FakeRunner()
    image = noise("RGB", 300, 200, np.random.default_rng(0))
    result = Inpainter(runner).fill(image, Image.new("L", (300, 200), 255))
    assert isinstance(result.image, Image.Image)
    assert result.image.tobytes() == image.tobytes()
    assert result.image is not image
    assert (result.runs, runner.batches) == (0, [])
    assert "no holes" in result.notes[0]


def test_a_picture_of_nothing_but_hole_is_made_up_and_mentioned() -> None:
    result = Inpainter(FakeRunner()).fill(np.zeros((40, 50, 3), np.uint8), np.zeros((40, 50)))
    assert result.runs == 1
    assert np.asarray(result.image).any()
    assert "nothing but hole" in result.notes[0]


def test_the_hole_is_painted_in_the_models_colours() -> None:
    image = np.full((256, 256, 3), 200, dtype=np.uint8)
    keep = np.ones((256, 256), dtype=np.bool_)
    keep[50:100, 50:100] = False
    runner = FakeRunner()
    result = Inpainter(runner, feather=0).fill(image, keep, seed=5).image
    wanted = runner.run(runner.seen[0])["output"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(
        np.asarray(result)[~keep], np.clip(np.rint((wanted[~keep] + 1) * 127.5), 0, 255)
    )


def test_paths_and_pictures_give_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image, keep = noise("RGB", 90, 60, rng), holes(60, 90, rng)
    image.save(tmp_path / "i.png")
    Image.fromarray(keep).save(tmp_path / "m.png")
    result = fill(str(tmp_path / "i.png"), tmp_path / "m.png")
    assert isinstance(result, Image.Image)
    np.testing.assert_array_equal(np.asarray(result), fill(np.asarray(image), keep))


# -- orientation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_filled_as_it_is_displayed(orientation: int) -> None:
    rng = np.random.default_rng(0)
    image = noise("RGB", 70, 40, rng)
    image.info["exif"] = exif(orientation)
    shown = ImageOps.exif_transpose(image)
    keep = holes(shown.height, shown.width, rng)
    result = fill(image, keep)
    assert result.info["exif"] == image.info["exif"]
    wanted = fill(np.asarray(shown), keep)
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(result)), wanted)


def test_a_mask_that_only_fits_the_stored_picture_is_laid_on_that() -> None:
    rng = np.random.default_rng(0)
    image = noise("RGB", 70, 40, rng)
    image.info["exif"] = exif(6)
    keep = holes(40, 70, rng)
    result = np.asarray(fill(image, keep))
    np.testing.assert_array_equal(result[keep], np.asarray(image)[keep])


# -- modes of their own ----------------------------------------------------------------------------


def half(size: int = 64) -> Mask:
    keep = np.ones((size, size), dtype=np.bool_)
    keep[10:50, 10:50] = False
    return keep


def test_a_full_palette_stays_and_the_nearest_colours_are_used() -> None:
    rng = np.random.default_rng(0)
    image = Image.frombytes("P", (64, 64), rng.bytes(64 * 64))
    image.putpalette(rng.bytes(768))
    result = fill(image, half())
    assert result.getpalette() == image.getpalette()
    rgb = fill(image.convert("RGB"), half())
    table = np.array(image.getpalette()).reshape(-1, 3)
    wanted = np.asarray(rgb)[~half()].astype(int)
    best = ((wanted[:, None] - table) ** 2).sum(axis=2).min(axis=1)
    got = table[np.asarray(result)[~half()]]
    np.testing.assert_array_equal(((wanted - got) ** 2).sum(axis=1), best)


def test_a_short_palette_grows_by_the_colours_of_the_fill() -> None:
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    result = fill(image, half())
    assert (result.getpalette() or [])[:6] == [0, 0, 0, 200, 10, 10]
    rgb = np.asarray(fill(image.convert("RGB"), half())).astype(int)
    assert np.abs(np.asarray(result.convert("RGB")).astype(int) - rgb).max() < 8


def test_kept_pixels_beyond_the_palette_stay_black() -> None:
    image = Image.new("P", (64, 64), 7)
    image.putpalette([10, 20, 30])
    result = fill(image, half())
    assert (np.asarray(result.convert("RGB"))[half()] == 0).all()


@pytest.mark.parametrize("clear", [3, bytes([255, 128, 0, 0, 255])])
def test_pixels_of_a_palette_keep_their_transparency(clear: int | bytes) -> None:
    rng = np.random.default_rng(0)
    image = noise("P", 64, 64, rng)
    image.info["transparency"] = clear
    result = fill(image, half())
    old, new = (np.asarray(i.convert("RGBA"))[..., 3] for i in (image, result))
    np.testing.assert_array_equal(new, old)


def test_a_palette_with_alpha_keeps_it() -> None:
    rng = np.random.default_rng(0)
    layer = noise("RGBA", 64, 64, rng)
    image = layer.quantize(100, method=Image.Quantize.FASTOCTREE)
    result = fill(image, half())
    old, new = (np.asarray(i.convert("RGBA")) for i in (image, result))
    np.testing.assert_array_equal(new[..., 3], old[..., 3])
    np.testing.assert_array_equal(new[half()], old[half()])


@pytest.mark.parametrize(("mode", "key"), [("L", 77), ("RGB", (1, 2, 3)), ("I;16", 500)])
def test_a_transparent_colour_neither_vanishes_nor_spreads(mode: str, key: Any) -> None:
    rng = np.random.default_rng(0)
    pixels = np.array(noise(mode, 64, 64, rng))
    pixels[20:30, 20:60] = key
    image = Image.frombytes(mode, (64, 64), pixels.tobytes())
    image.info["transparency"] = key
    clear = pixels == key if mode != "RGB" else (pixels == key).all(axis=2)
    result = np.asarray(fill(image, half()))
    now = result == key if mode != "RGB" else (result == key).all(axis=2)
    np.testing.assert_array_equal(now, clear)


def test_cmyk_is_filled_with_as_much_black_as_its_surroundings_have() -> None:
    shades = np.zeros((64, 64, 4), dtype=np.uint8)
    shades[..., 3] = 90
    assert (
        np.asarray(fill(Image.frombytes("CMYK", (64, 64), shades.tobytes()), half()))[..., 3] > 0
    ).all()
    shades[..., 3], shades[..., :3] = 0, 90
    assert not np.asarray(fill(Image.frombytes("CMYK", (64, 64), shades.tobytes()), half()))[
        ..., 3
    ].any()


def test_16_bit_pictures_are_filled_within_the_range_of_the_kept_pixels() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(1000, 4000, (64, 64), dtype=np.uint16)
    pixels[~half()] = 65535
    result = fill(pixels, half())
    inside = result[~half()]
    assert inside.min() >= 1000
    assert inside.max() < 4000
    assert len(np.unique(inside)) > 300, "a fill of 8 bits would have 256 values at most"


def test_values_that_are_not_finite_are_kept_and_not_looked_at() -> None:
    pixels = np.random.default_rng(0).random((64, 64)).astype(np.float32)
    pixels[0, :4] = [np.nan, np.inf, -np.inf, 1.0]
    result = fill(pixels, half())
    np.testing.assert_array_equal(result[half()], pixels[half()])
    assert np.isfinite(result[~half()]).all()


# -- seeds, batches and kinds of models ------------------------------------------------------------


def test_a_seed_names_a_picture_and_another_seed_another() -> None:
    image = np.full((64, 64, 3), 99, dtype=np.uint8)
    first, second = fill(image, half(), seed=1), fill(image, half(), seed=2)
    np.testing.assert_array_equal(first, fill(image, half(), seed=1))
    assert (first != second).any()
    assert (first != fill(image, half(), seed=1, truncation=0.5)).any()


def test_the_first_region_draws_from_the_seed_and_the_others_from_its_multiples() -> None:
    keep = np.ones((900, 900), dtype=np.bool_)
    keep[:10, :10] = keep[-10:, -10:] = False
    runner = FakeRunner()
    seed = 2**64 - 5
    Inpainter(runner).fill(np.zeros((900, 900, 3), np.uint8), keep, seed=seed)
    assert region_seed(seed, 0) == seed
    for k, seen in enumerate(runner.seen):
        wanted = draw(runner.spec.config, [(seed + k * 0x9E3779B97F4A7C15) % 2**64])
        np.testing.assert_array_equal(seen["z"], wanted["z"])
    assert len(runner.seen) == 2


@pytest.mark.parametrize("io", ["float", "uint8"])
@pytest.mark.parametrize("noise_kind", ["const", "input"])
@pytest.mark.parametrize("batch", [None, 1, 2, 6])
def test_answers_do_not_depend_on_the_batch(io: str, noise_kind: str, batch: int | None) -> None:
    rng = np.random.default_rng(0)
    image, keep = np.asarray(noise("RGB", 90, 70, rng)), holes(70, 90, rng)
    runner = FakeRunner(io=io, noise=noise_kind, batch=batch)
    answers = list(Inpainter(runner).answers(image, keep, seed=3, count=5))
    assert [answer.seed for answer in answers] == [3, 4, 5, 6, 7]
    alone = Inpainter(FakeRunner(io=io, noise=noise_kind, batch=1))
    for answer in answers:
        np.testing.assert_array_equal(answer.image, alone(image, keep, seed=answer.seed))
    assert runner.batches == {None: [4, 1], 1: [1] * 5, 2: [2] * 3, 6: [6]}[batch]


def test_float_and_uint8_models_give_the_same() -> None:
    rng = np.random.default_rng(0)
    image, keep = np.asarray(noise("RGB", 90, 70, rng)), holes(70, 90, rng)
    first, second = (
        Inpainter(FakeRunner(io=io), feather=0)(image, keep) for io in ("float", "uint8")
    )
    np.testing.assert_array_equal(first, second)


def test_later_windows_see_what_earlier_ones_filled() -> None:
    keep = np.ones((800, 800), dtype=np.bool_)
    keep[np.arange(800), np.arange(800)] = False
    runner = FakeRunner()
    runs = Inpainter(runner).fill(np.full((800, 800), 255, np.uint8), keep).runs
    assert runs > 1
    unknown = [int((seen["mask"] == 0).sum()) for seen in runner.seen]
    assert unknown[-1] < unknown[0]
    assert sum(unknown) > 0


def test_what_the_model_is_shown_does_not_depend_on_what_lies_under_a_large_hole() -> None:
    rng = np.random.default_rng(0)
    image, keep = noise("RGB", 777, 777, rng), np.ones((777, 777), dtype=np.bool_)
    keep[100:603, 95:640] = False
    runner = FakeRunner()
    inpainter = Inpainter(runner)
    inpainter(image, keep)
    inpainter(under(image, keep, rng), keep)
    first, second = runner.seen
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)
    assert 0 < float(first["mask"].mean()) < 1


# -- the edge --------------------------------------------------------------------------------------


def test_feathering_meets_the_surroundings_and_leaves_the_middle() -> None:
    image = np.full((256, 256, 3), 120, dtype=np.uint8)
    keep = np.ones((256, 256), dtype=np.bool_)
    keep[60:200, 60:200] = False
    plain = Inpainter(FakeRunner(shade=0.3), feather=0)(image, keep).astype(int)
    soft = Inpainter(FakeRunner(shade=0.3), feather=8)(image, keep).astype(int)
    inside = slice(68, 192)
    np.testing.assert_array_equal(soft[inside, inside], plain[inside, inside])
    step = {
        name: np.abs(a[61:199, 60] - 120).mean() for name, a in (("plain", plain), ("soft", soft))
    }
    assert step["plain"] > 10
    assert step["soft"] < 2


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": -0.1}, "truncation is from 0 to 2, got -0.1"),
        ({"truncation": 2.1}, "truncation"),
        ({"truncation": float("nan")}, "truncation"),
        ({"seed": -1}, "seeds are from 0"),
        ({"seed": 2**64}, "seeds are from 0"),
        ({"hole": "grey"}, "'black' or 'white'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fill(np.zeros((9, 9, 3), np.uint8), np.ones((9, 9)), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2**64 - 1, "count": 2}, "seeds are from 0"),
        ({"count": 0}, "at least one answer"),
    ],
)
def test_bad_counts_are_refused_before_the_first_answer(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Inpainter(FakeRunner()).answers(np.zeros((9, 9), np.uint8), np.ones((9, 9)), **options)


@pytest.mark.parametrize(
    "options",
    [{"context": 0.5}, {"context": 9}, {"feather": -1}, {"feather": 65}, {"max_windows": 0}],
)
def test_a_bad_inpainter_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Inpainter(FakeRunner(), **options)


def test_sizes_that_differ_are_both_named() -> None:
    with pytest.raises(UserError, match=r"30x20 .* 20x30"):
        fill(Image.new("RGB", (30, 20)), np.ones((30, 20)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 5), np.uint8), "1 to 4"),
        (np.zeros((4, 4), np.complex64), "numbers"),
        (np.zeros((4,), np.uint8), "H, W"),
        (np.zeros((4, 0), np.uint8), "empty"),
        (np.zeros((1, 8193), np.bool_), "8192"),
        (Image.new("LAB", (4, 4)), "mode LAB"),
        ([[1, 2]], "array or a path"),
        (Path("absent.png"), "no file 'absent.png'"),
    ],
)
def test_what_is_no_picture_is_refused(image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fill(image, np.ones((4, 4)))


def test_a_model_that_gives_nan_is_an_error_and_not_a_black_picture() -> None:
    with pytest.raises(UserError, match="not finite"):
        Inpainter(FakeRunner(broken=True))(np.zeros((9, 9), np.uint8), np.zeros((9, 9)))


# -- large pictures --------------------------------------------------------------------------------

LARGE = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
import numpy as np
from PIL import Image
from fake_runner import FakeRunner
from mat_export.inpaint import Inpainter

image = Image.effect_noise((512, 512), 90).resize((8192, 8192)).convert("RGB")
mask = Image.new("L", image.size, 255)
mask.paste(0, {box})
start = time.perf_counter()
result = Inpainter(FakeRunner()).fill(image, mask)
seconds = time.perf_counter() - start
x0, y0, x1, y1 = {box}
for box in ((0, 0, 8192, y0), (0, y1, 8192, 8192), (0, y0, x0, y1), (x1, y0, 8192, y1)):
    assert result.image.crop(box).tobytes() == image.crop(box).tobytes()
assert result.image.crop({box}).tobytes() != image.crop({box}).tobytes()
# Not ru_maxrss: after a spawn that is the parent's, if that was larger.
status = Path("/proc/self/status").read_text().splitlines()
(peak,) = (line.split()[1] for line in status if line.startswith("VmHWM:"))
print(seconds, int(peak) / 2**20)
"""


@pytest.mark.parametrize("box", [(4000, 5000, 4100, 5150), (900, 1100, 7000, 7300)])
def test_the_largest_picture_takes_seconds_and_no_more_than_3_gib(
    box: tuple[int, int, int, int],
) -> None:
    script = LARGE.format(here=str(Path(__file__).parent), box=box)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seconds, gib = (float(word) for word in done.stdout.split())
    assert gib < 3.0
    assert seconds < 60.0, "on two quiet cores it takes less than 10"
