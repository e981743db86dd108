"""An evaluation measures what a method puts into holes, alike for every method, by hole size."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage import data as skimage_data
from small import SMALL
from torch import Tensor, nn

from mat_torch import draw, random_checkpoint
from mat_torch.evaluation import (
    Evaluation,
    EvaluationError,
    answer_seed,
    comparison_table,
    evaluate,
    generator_fill,
    measure,
    opencv_fill,
)
from mat_torch.features import EfficientNetLite0Features, PooledFeatures

photographs: Any = skimage_data
Floats = NDArray[Any]


class Colours(PooledFeatures):
    """Mean colours of the quarters of a picture, which are quick to have."""

    name = "Colours"
    frechet_name = "Fréchet distance, Colours"
    digest = "0" * 64
    dimensions = 12

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def pooled(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) * self.scale


COLOURS = Colours()
SIDE = 20


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> NDArray[np.float32]:
    """Random 8-bit colours as [3, H, W] in [-1, 1]."""
    levels = np.random.default_rng(seed).integers(0, 256, (3, height, width))
    return (levels / 127.5 - 1.0).astype(np.float32)


def mask_of(ratio: float, height: int = SIDE, width: int = SIDE) -> NDArray[np.float32]:
    """[1, H, W] whose upper rows, this share of all, are the hole."""
    mask = np.ones((1, height, width), np.float32)
    mask[:, : round(ratio * height)] = 0.0
    return mask


PICTURES = [picture(i) for i in range(12)]
MASKS = [mask_of((i % 10 + 1) / 10) for i in range(12)]


def noise(image: Floats, mask: Floats, seeds: Sequence[int]) -> Floats:
    """A method of chance: its seed's noise."""
    return np.stack([np.random.default_rng(s).uniform(-1, 1, image.shape[1:]) for s in seeds])


def grey(image: Floats, mask: Floats, seeds: Sequence[int]) -> Floats:
    return np.zeros_like(image)


def knowing(pictures: Iterable[Floats]) -> Callable[[Floats, Floats, Sequence[int]], Floats]:
    """A method that was told the answers."""
    coming = iter(pictures)

    def fill(image: Floats, mask: Floats, seeds: Sequence[int]) -> Floats:
        return np.stack([next(coming) for _ in seeds])

    return fill


def run(fill: Any, **options: Any) -> Evaluation:
    return evaluate(fill, PICTURES, MASKS, COLOURS, **options)


# -- what is measured ------------------------------------------------------------------------------


def test_the_true_pictures_get_perfect_scores() -> None:
    found = run(knowing(PICTURES)).overall
    assert found.frechet == pytest.approx(0.0, abs=1e-9)
    assert (found.precision, found.recall) == (1.0, 1.0)
    assert (found.psnr, found.l1) == (np.inf, 0.0)
    assert (found.psnr_whole, found.l1_whole) == (np.inf, 0.0)
    assert (found.ssim, found.ssim_whole) == pytest.approx((1.0, 1.0))
    assert (found.pids, found.uids) == (0.0, 0.5)  # a tie is no win


def test_worse_answers_get_worse_scores() -> None:
    near = run(knowing([np.clip(p + 0.1, -1, 1) for p in PICTURES])).overall
    far = run(grey).overall
    assert near.psnr > far.psnr + 10.0
    assert near.ssim > far.ssim + 0.2
    assert near.l1 < far.l1 / 4.0


def test_what_is_under_the_hole_is_hidden_from_the_method() -> None:
    seen: list[tuple[Floats, Floats]] = []

    def spy(image: Floats, mask: Floats, seeds: Sequence[int]) -> Floats:
        seen.append((image.copy(), mask.copy()))
        return image

    run(spy, batch=5)
    images = np.concatenate([image for image, _ in seen])
    np.testing.assert_array_equal(np.concatenate([mask for _, mask in seen]), MASKS)
    np.testing.assert_allclose(images, np.stack(PICTURES) * np.stack(MASKS), atol=1e-6)


def test_what_a_method_does_outside_the_hole_does_not_count() -> None:
    def careless(image: Floats, mask: Floats, seeds: Sequence[int]) -> Floats:
        output = np.where(mask > 0, -image, 0.0)
        image[:], mask[:] = 1.0, 1.0
        return output

    assert run(careless).to_dict() == run(grey).to_dict()


def test_answers_are_measured_as_8_bits() -> None:
    true = np.stack(PICTURES)
    assert run(knowing(true + 0.49 / 127.5)).overall.l1 == 0.0
    assert run(knowing(true + 0.51 / 127.5)).overall.l1 > 0.0
    assert run(knowing(3.0 * np.sign(true))).overall.l1 < 0.5  # beyond the range is clipped


def test_a_seed_names_the_numbers_whatever_the_batch() -> None:
    first = run(noise, seed=3, answers=2, batch=5)
    assert run(noise, seed=3, answers=2, batch=12).to_dict() == first.to_dict()
    assert run(noise, seed=4, answers=2, batch=5).overall.l1 != first.overall.l1


def test_every_answer_has_a_seed_of_its_own_that_others_do_not_change() -> None:
    seeds = [answer_seed(7, picture, answer) for picture in range(50) for answer in range(4)]
    assert len(set(seeds)) == 200
    assert seeds[0] == 7
    given: list[int] = []

    def spy(image: Floats, mask: Floats, seeds: Sequence[int]) -> Floats:
        given.extend(seeds)
        return image

    run(spy, seed=7, batch=5)
    assert given == [answer_seed(7, i) for i in range(12)]


def test_diversity_is_of_the_answers_to_one_picture() -> None:
    assert run(grey, answers=3).overall.feature_diversity == 0.0
    found = run(noise, answers=3).overall
    assert found.feature_diversity is not None
    assert found.feature_diversity > 0.05
    assert found.diversity is None  # the features have no maps
    assert run(noise).overall.feature_diversity is None


def test_parts_of_a_set_are_measured_as_the_whole_is() -> None:
    whole = measure(noise, PICTURES, MASKS, COLOURS, seed=3, answers=2)
    parts = [
        measure(noise, PICTURES[a:b], MASKS[a:b], COLOURS, seed=3, answers=2, first=a, batch=2)
        for a, b in ((0, 5), (5, 12))
    ]
    for name, rows in whole.items():
        np.testing.assert_allclose(np.concatenate([p[name] for p in parts]), rows, rtol=1e-6)


def test_pictures_fall_into_bins_by_their_hole() -> None:
    found = run(grey)
    labels = ["0–20 %", "20–40 %", "40–60 %", "60–80 %", "80–100 %"]
    assert [scores.label for scores in found.bins] == labels
    # Ratios 0.1 … 1.0, then 0.1 and 0.2 again; an edge counts above, 1.0 in the last bin.
    assert [scores.pictures for scores in found.bins] == [2, 3, 2, 2, 3]
    assert found.bins[4].hole_ratio == pytest.approx(0.9)
    halves = run(grey, bins=(0.0, 0.5, 1.0)).bins
    assert [(s.label, s.pictures) for s in halves] == [("0–50 %", 6), ("50–100 %", 6)]


def test_a_bin_is_what_its_pictures_alone_would_give() -> None:
    chosen = [i for i, mask in enumerate(MASKS) if 0.4 <= round(1 - mask.mean(), 3) < 0.6]
    alone = evaluate(grey, [PICTURES[i] for i in chosen], [MASKS[i] for i in chosen], COLOURS)
    assert replace(alone.overall, label="40–60 %") == run(grey).bins[2]


def test_too_few_pictures_for_a_measure_leave_it_out() -> None:
    found = evaluate(grey, PICTURES[:1], MASKS[:1], COLOURS).overall
    assert (found.frechet, found.pids, found.uids) == (None, None, None)
    assert (found.precision, found.recall) == (None, None)
    assert found.l1 > 0.0


def test_fewer_pictures_than_features_are_pointed_out() -> None:
    twice = [*PICTURES, *PICTURES], [*MASKS, *MASKS]
    (note,) = evaluate(grey, *twice, COLOURS).notes
    assert "all (" not in note
    assert "0–20 % (4)" in note
    (note,) = run(grey).notes
    assert "all (12)" in note
    assert evaluate(grey, *twice, COLOURS, bins=(0.0, 1.0)).notes == ()


def test_pictures_of_several_sizes_are_taken_in_their_order() -> None:
    sizes = [(20, 20), (20, 20), (20, 30), (20, 20)]
    pictures = [picture(i, *size) for i, size in enumerate(sizes)]
    masks = [mask_of(0.5, *size)[0] for size in sizes]  # without the channel
    batches: list[int] = []

    def spy(image: Floats, mask: Floats, seeds: Sequence[int]) -> Floats:
        batches.append(len(image))
        return knowing(pictures[sum(batches[:-1]) :])(image, mask, seeds)

    found = evaluate(spy, pictures, masks, COLOURS, batch=8)
    assert batches == [2, 1, 1]
    assert found.overall.l1 == 0.0


def test_pictures_are_taken_as_needed_and_not_kept() -> None:
    alive: list[int] = []
    produced: list[weakref.ref[Any]] = []

    def stream() -> Iterator[Floats]:
        for i in range(40):
            image = picture(i)
            produced.append(weakref.ref(image))
            alive.append(sum(each() is not None for each in produced))
            yield image

    done: list[tuple[int, int | None]] = []
    evaluate(
        grey,
        stream(),
        (mask_of(0.5) for _ in range(40)),
        COLOURS,
        batch=4,
        progress=lambda count, total: done.append((count, total)),
    )
    assert max(alive) <= 6
    assert done == [(count, None) for count in range(4, 41, 4)]


def test_progress_knows_the_number_of_pictures_in_a_list() -> None:
    done: list[tuple[int, int | None]] = []
    run(grey, batch=5, progress=lambda count, total: done.append((count, total)))
    assert done == [(5, 12), (10, 12), (12, 12)]


# -- what is reported ------------------------------------------------------------------------------


def test_an_evaluation_is_plain_data() -> None:
    text = json.dumps(run(knowing(PICTURES), name="told").to_dict(), allow_nan=False)
    plain = json.loads(text)
    assert plain["name"] == "told"
    assert plain["overall"]["psnr"] is None  # infinite
    assert plain["overall"]["l1"] == 0.0
    assert plain["features_digest"] == COLOURS.digest
    assert len(plain["bins"]) == 5


@pytest.mark.parametrize("fill", [noise, knowing(PICTURES)], ids=["noise", "exact"])
def test_plain_data_is_an_evaluation_again(fill: Any) -> None:
    found = run(fill, answers=1)
    assert Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    for broken in ({}, {**found.to_dict(), "bins": [{"label": "all"}]}, {"surplus": 1}):
        with pytest.raises(EvaluationError, match="no scores"):
            Evaluation.from_dict(broken)


def test_the_table_has_a_row_a_bin_and_names_its_distance() -> None:
    table = run(grey, name="grey").table()
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5 + 1
    assert len({line.count("|") for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1
    assert "Fréchet distance, Colours" in lines[0]
    assert "FID" not in table
    assert "diversity" not in table  # nothing was measured
    assert "perceptual |" not in table
    assert "∞" in run(knowing(PICTURES)).table()


def test_methods_stand_in_one_table() -> None:
    methods = [run(grey, name="grey"), run(noise, name="noise")]
    table = comparison_table(methods)
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows[2:] == ["grey", "noise"]
    assert comparison_table(methods, by_bin=True).count("\n| noise, ") == 6


def test_methods_measured_differently_do_not_stand_in_one_table() -> None:
    first, second = run(grey, name="grey"), run(grey, name="other", bins=(0.0, 1.0))
    with pytest.raises(EvaluationError, match="'grey' and 'other' were measured with other"):
        comparison_table([first, second])
    with pytest.raises(EvaluationError, match="other networks"):
        comparison_table([first, replace(first, features_digest="1" * 64)])
    with pytest.raises(EvaluationError, match="nothing to compare"):
        comparison_table([])


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pictures", "masks", "says"),
    [
        ([], [], "no pictures"),
        (PICTURES[:2], MASKS[:1], "1 masks and more pictures"),
        (PICTURES[:1], MASKS[:2], "1 pictures and more masks"),
        ([np.zeros((SIDE, SIDE, 3))], MASKS[:1], "picture 0 is float64 of shape"),
        ([np.zeros((3, SIDE, SIDE), np.uint8)], MASKS[:1], "picture 0 is uint8"),
        ([PICTURES[0] * 255.0], MASKS[:1], r"outside \[-1, 1\]"),
        ([PICTURES[0] * np.nan], MASKS[:1], r"outside \[-1, 1\]"),
        (PICTURES[:1], [mask_of(0.5)[:, 1:]], "mask 0 has shape"),
        (PICTURES[:1], [mask_of(0.5) * 255.0], "it is 0 or 1"),
        (PICTURES[:2], [MASKS[0], mask_of(0.0)], "mask 1 has no hole"),
    ],
)
def test_pictures_and_masks_that_do_not_serve_are_named(
    pictures: list[Floats], masks: list[Floats], says: str
) -> None:
    with pytest.raises(EvaluationError, match=says):
        evaluate(grey, pictures, masks, COLOURS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": 0}, "1 or more, got 0 and 1"),
        ({"answers": 0}, "1 or more, got 8 and 0"),
        ({"seed": 2**64}, "a seed is from 0"),
        ({"bins": (0.0, 0.5, 0.5, 1.0)}, "increase from 0 to 1"),
        ({"bins": (0.1, 1.0)}, "increase from 0 to 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        run(grey, **options)


def test_a_method_that_fails_is_not_measured() -> None:
    with pytest.raises(EvaluationError, match="has to give the same shape"):
        run(lambda image, mask, seeds: image[:, :1])
    with pytest.raises(EvaluationError, match="numbers that are not finite"):
        run(lambda image, mask, seeds: image * np.nan)


# -- methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(128, 128), (128, 256)], ids=["native", "wide"])
def test_the_generator_as_a_method_is_the_generator(size: tuple[int, int]) -> None:
    generator = random_checkpoint(SMALL, 0).build()
    image = np.stack([picture(0, *size), picture(1, *size)])
    mask = np.stack([mask_of(0.5, *size), mask_of(0.25, *size)])
    filled = generator_fill(generator, truncation=0.7)(image * mask, mask, [5, 6])
    random = draw(SMALL, [5, 6], *size, noise=size != (128, 128))
    z, tokens, bottleneck, *noises = (torch.from_numpy(array) for array in random.values())
    with torch.no_grad():
        expected, _ = generator(
            torch.from_numpy(image),
            torch.from_numpy(mask),
            z,
            0.7,
            tokens,
            bottleneck,
            dict(zip(list(random)[3:], noises, strict=True)),
        )
    np.testing.assert_allclose(filled, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["telea", "navier-stokes"])
def test_the_classical_methods_continue_a_gradient(method: Any) -> None:
    ramp = np.broadcast_to(np.linspace(-0.8, 0.8, 64, dtype=np.float32), (3, 64, 64))
    mask = np.ones((1, 64, 64), np.float32)
    mask[:, 24:40, 24:40] = 0.0
    found = evaluate(opencv_fill(method), [ramp], [mask], COLOURS).overall
    blank = evaluate(grey, [ramp], [mask], COLOURS).overall
    assert found.l1 < 0.025
    assert blank.l1 > 0.045


def test_the_classical_methods_differ() -> None:
    image, mask = PICTURES[0][None] * MASKS[3], MASKS[3][None]
    telea, stokes = (opencv_fill(m)(image, mask, [0]) for m in ("telea", "navier-stokes"))
    assert np.abs(telea - stokes).max() > 0.01


def test_a_classical_method_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown: Any = "magic"
    with pytest.raises(EvaluationError, match="unknown method 'magic'; choose one of telea"):
        opencv_fill(unknown)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(EvaluationError, match=r"install mat-export\[train\]"):
        opencv_fill()


def test_on_photographs_a_classical_method_beats_noise_by_every_measure() -> None:
    photo = photographs.chelsea().transpose(2, 0, 1).astype(np.float32) / 127.5 - 1.0
    crops = [photo[:, y : y + 96, x : x + 96] for y in (0, 100, 200) for x in (0, 150, 300)]
    masks = [mask_of(0.3, 96, 96)] * len(crops)
    features = EfficientNetLite0Features.load()
    telea = evaluate(opencv_fill(), crops, masks, features, name="telea", answers=2)
    chance = evaluate(noise, crops, masks, features, name="noise", answers=2)
    assert telea.perceptual == "EfficientNet-Lite0"
    a, b = telea.overall, chance.overall
    assert None not in (a.frechet, b.frechet, a.perceptual, b.perceptual)
    assert a.frechet < 0.8 * b.frechet  # type: ignore[operator]
    assert a.perceptual < 0.8 * b.perceptual  # type: ignore[operator]
    assert a.perceptual > a.perceptual_whole  # type: ignore[operator]
    assert a.diversity == 0.0  # one answer whatever the seed
    assert b.diversity > 0.2  # type: ignore[operator]
    assert (a.psnr, a.ssim, -a.l1) > (b.psnr, b.ssim, -b.l1)
    assert a.psnr > b.psnr + 3.0
