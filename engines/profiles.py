"""Optimization profiles: the shapes an engine is made for, from the graph's dynamic axes.

The batch and the size of the image are the only two free choices; every other axis follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engines.options import BatchRange, BuildOptions, Size, SizeRange, range_text
from mat_export.contract import GraphSpec, UserError, axes_of_size

__all__ = ["Profile", "Profiles", "Shape", "best_of", "profiles_of", "ranges_of"]

Shape = tuple[int, ...]
"""Length of each axis."""

Profile = tuple[Shape, Shape, Shape]
"""Smallest, best and largest shape of one input."""

Profiles = dict[str, Profile]
"""The profile of every input with a dynamic axis, by name; empty for a static graph."""

_DEFAULT_BATCH: BatchRange = (1, 1, 8)


def profiles_of(spec: GraphSpec, options: BuildOptions) -> Profiles:
    """The profile of each dynamic input.

    Args:
        spec: What the graph takes.
        options: Of which ``batch`` (images) and ``size`` (pixels) matter.

    Raises:
        UserError: If a range is asked of an axis that the graph fixes to something else, or the
            network takes no image of a size.
    """
    batches, sizes = ranges_of(spec, options)
    axes: list[dict[str, int]] = []
    for batch, (height, width) in zip(batches, sizes, strict=True):
        following = axes_of_size(spec.config, height, width)
        axes.append({"batch": batch, "height": height, "width": width, **following})

    def shape(tensor_shape: Sequence[int | str], at: Mapping[str, int]) -> Shape:
        return tuple(axis if isinstance(axis, int) else at[axis] for axis in tensor_shape)

    return {
        tensor.name: (
            shape(tensor.shape, axes[0]),
            shape(tensor.shape, axes[1]),
            shape(tensor.shape, axes[2]),
        )
        for tensor in spec.inputs
        if any(isinstance(axis, str) for axis in tensor.shape)
    }


def ranges_of(spec: GraphSpec, options: BuildOptions) -> tuple[BatchRange, SizeRange]:
    """Images at once and their sizes: smallest, best and largest, equal where the graph fixes them.

    Raises:
        UserError: If a range is asked of an axis that the graph fixes to something else.
    """
    return _batches(spec, options.batch), _sizes(spec, options.size)


def best_of(spec: GraphSpec, options: BuildOptions) -> tuple[int, Size]:
    """Images at once and their size in pixels that an engine is to be fastest at.

    Raises:
        UserError: As `ranges_of`.
    """
    batches, sizes = ranges_of(spec, options)
    return batches[1], sizes[1]


def _batches(spec: GraphSpec, wanted: BatchRange | None) -> BatchRange:
    if spec.batch is None:
        return wanted or _DEFAULT_BATCH
    fixed = (spec.batch,) * 3
    if wanted not in (None, fixed):
        raise UserError(
            f"the graph takes batches of {spec.batch} only, got --batch {range_text(wanted)}: "
            "export it with --batch dynamic"
        )
    return fixed


def _sizes(spec: GraphSpec, wanted: SizeRange | None) -> SizeRange:
    side = spec.config.resolution
    native = (side, side)
    if spec.dynamic_size:
        return wanted or (native, native, (2 * side, 2 * side))
    if wanted not in (None, (native,) * 3):
        raise UserError(
            f"the graph takes images of {side}x{side} only, got --size {range_text(wanted)}: "
            "export it with --size dynamic --noise input"
        )
    return native, native, native
