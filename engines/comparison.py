"""A new engine beside one that is there: whether it is faster, measured on the GPU of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engines.options import BuildOptions
from engines.papers import OpenedPlan, open_plan
from engines.profiles import best_of, ranges_of
from engines.timing import time_plans
from mat_export.contract import GraphSpec, UserError

__all__ = ["Comparison", "check_comparable", "compare_engines"]


@dataclass(frozen=True)
class Comparison:
    """How long two engines take for one batch.

    Attributes:
        engine: The engine in question.
        other: What it is held against.
        precisions: Of both.
        milliseconds: Of both: medians on the GPU.
        batch: Images at once.
    """

    engine: Path
    other: Path
    precisions: tuple[str, str]
    milliseconds: tuple[float, float]
    batch: int

    @property
    def ratio(self) -> float:
        """The engine's time as a share of the other's."""
        return self.milliseconds[0] / self.milliseconds[1]

    @property
    def wins(self) -> bool:
        """Whether the engine is the faster one."""
        return self.ratio < 1.0

    def __str__(self) -> str:
        (own, other), (took, takes) = self.precisions, self.milliseconds
        figures = (
            f"{own} takes {took:.2f} ms and {other} {takes:.2f} at batch {self.batch}: "
            f"{self.ratio:.2f} of its time"
        )
        if self.wins:
            return f"{figures}, {self.engine} is the faster one"
        return f"{figures}, {own} does not win here: {self.other} is the one to use"


def check_comparable(spec: GraphSpec, options: BuildOptions, other: Path) -> OpenedPlan:
    """An engine that one of this graph can be timed beside.

    Args:
        spec: What the graph takes.
        options: What the new engine is built for.
        other: The plan to hold it against.

    Raises:
        UserError: If the other cannot run here, is of another network, takes other inputs, or was
            not built for the batch and size that the new one is to be fastest at.
    """
    opened = open_plan(other)
    theirs = opened.spec
    if theirs.config != spec.config:
        raise UserError(
            f"'{other}' is of {theirs.config.name} and the model of {spec.config.name}: only "
            "engines of one network can be compared"
        )
    if (theirs.io, theirs.noise) != (spec.io, spec.noise):
        raise UserError(
            f"'{other}' takes io {theirs.io} and noise {theirs.noise}, the model io {spec.io} and "
            f"noise {spec.noise}: only engines of the same inputs can be compared"
        )
    batch, (height, width) = best_of(spec, options)
    built = BuildOptions.from_dict(opened.manifest["request"]["options"])
    (fewest, _, most), (smallest, _, largest) = ranges_of(theirs, built)
    if not (
        fewest <= batch <= most
        and smallest[0] <= height <= largest[0]
        and smallest[1] <= width <= largest[1]
    ):
        raise UserError(
            f"'{other}' was not built for {batch} x {height}x{width}, which this engine is to be "
            "fastest at"
        )
    return opened


def compare_engines(
    path: Path, other: OpenedPlan, inputs: Mapping[str, NDArray[Any]]
) -> Comparison:
    """Time two engines in turns, as CUDA graphs where they can.

    Args:
        path: The plan of the engine in question.
        other: What `check_comparable` found.
        inputs: Arrays by name, of a batch and size that both take.

    Raises:
        UserError: If an engine cannot be opened, or memory is too small for both.
        RunError: If a run fails.
    """
    opened = open_plan(path)
    own, theirs = time_plans([opened, other], inputs)
    precisions = (opened.spec.precision, other.spec.precision)
    return Comparison(path, other.path, precisions, (own, theirs), len(inputs["image"]))
