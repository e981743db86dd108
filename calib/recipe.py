"""Which layers are INT8: a decision, how it is made, and its file.

Layers are dropped one by one, each time the one that costs most for what it saves. How far that
must go is predicted from the costs, measured, and corrected, until the fewest drops are found that
meet the target.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from calib.candidates import Candidate, Candidates
from calib.sensitivity import Quality, decibel
from mat_export.contract import UserError

__all__ = ["Recipe", "choose_layers", "predicted_db"]

FORMAT = 1
"""Version of the file; another is refused."""

Measure = Callable[[frozenset[str]], Quality]
Costs = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Recipe:
    """A decision.

    Attributes:
        network: The network it was made for, by name.
        layers: The INT8 layers, in the graph's order.
        target_db: What their mean PSNR in the hole had to reach, or None.
        filters: Resampling filters and skips could be INT8 too.
    """

    network: str
    layers: tuple[str, ...]
    target_db: float | None = None
    filters: bool = False

    def to_json(self) -> str:
        """JSON that from_file reads back."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], network: str) -> Recipe:
        """A recipe for a network.

        Raises:
            UserError: If there is no such file, it is none, or for another network.
        """
        if not Path(path).is_file():
            raise UserError(f"there is no file '{path}'")
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
            version = entries.pop("format")
            recipe = cls(**{**entries, "layers": tuple(map(str, entries["layers"]))})
            if not isinstance(recipe.filters, bool):
                raise ValueError(f"filters of {recipe.filters!r}")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"'{path}' is no recipe of 'mat-export calibrate' ({error})") from error
        if version != FORMAT:
            raise UserError(
                f"'{path}' is a recipe of version {version} and this mat-export knows version "
                f"{FORMAT}: calibrate again"
            )
        if recipe.network != network:
            raise UserError(f"'{path}' is a recipe for {recipe.network}, the model is {network}")
        if not recipe.layers:
            raise UserError(f"'{path}' names no layer: an FP16 engine needs no calibration")
        return recipe


def predicted_db(costs: Costs, layers: Collection[str]) -> float:
    """Mean PSNR in the hole with these layers in INT8, if their noises add up."""
    total = np.sum([costs[name] for name in sorted(layers)], axis=0)
    return float(np.mean([decibel(float(value)) for value in total]))


def choose_layers(
    candidates: Candidates, costs: Costs, target_db: float, measure: Measure
) -> tuple[frozenset[str], Quality]:
    """As many layers as meet a target, and what they were measured to give.

    Args:
        candidates: What may be INT8.
        costs: Noise of each alone, by sample.
        target_db: What the mean PSNR in the hole has to reach.
        measure: Measures a choice.

    Raises:
        UserError: If not one layer can be INT8 at this target; it tells what the layer that costs
            least alone was measured to give.
    """
    choices = _choices(candidates, costs)
    predicted = [predicted_db(costs, choice) for choice in choices]
    measured: dict[int, Quality] = {}
    failing, meeting, offset = -1, len(choices), 0.0
    while meeting - failing > 1:
        wanted = (i for i, value in enumerate(predicted) if value + offset >= target_db)
        tried = min(max(next(wanted, len(choices) - 1), failing + 1), meeting - 1)
        measured[tried] = quality = measure(choices[tried])
        offset = quality.mean_db - predicted[tried]
        if quality.mean_db >= target_db:
            meeting = tried
        else:
            failing = tried
    if meeting < len(choices):
        return choices[meeting], measured[meeting]
    best = frozenset([_cheapest(candidates, costs)])
    quality = measured[meeting - 1] if best == choices[-1] else measure(best)
    if quality.mean_db < target_db:
        raise UserError(
            f"no layer can be INT8 with {target_db:g} dB in the hole: '{min(best)}' alone, which "
            f"costs least, was measured at {quality.mean_db:.1f} dB; lower --target-db"
        )
    return best, quality


def _cheapest(candidates: Candidates, costs: Costs) -> str:
    """The layer that costs least; a sum is none without a convolution that reads its tensor."""
    layers = [candidate.name for candidate in candidates.all if candidate.kind != "skip"]
    return max(layers, key=lambda name: predicted_db(costs, [name]))


def _choices(candidates: Candidates, costs: Costs) -> list[frozenset[str]]:
    """All layers, then ever fewer, down to one."""
    left = {candidate.name: candidate for candidate in candidates.all}
    choices = [frozenset(left)]
    while len(left) > 1:
        total = np.sum([costs[name] for name in left], axis=0)
        total = np.maximum(total, 1e-30)
        shares = {name: float(np.mean(costs[name] / total)) for name in left}
        worst = max(left, key=lambda name: shares[name] / max(left[name].gain, 1e-9))
        del left[worst]
        for name in _alone(left.values()):
            del left[name]
        if left:
            choices.append(frozenset(left))
    return choices


def _alone(layers: Collection[Candidate]) -> list[str]:
    """Sums whose tensor no convolution reads quantized any more."""
    read = {layer.tensor for layer in layers if layer.kind != "skip"}
    return [layer.name for layer in layers if layer.kind == "skip" and layer.tensor not in read]
