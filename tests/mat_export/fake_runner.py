"""A stand-in for a model: the runner contract in a few lines of NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mat_export.contract import Closing, GraphSpec, check_inputs
from mat_export.pixels import from_unit, to_unit
from mat_torch.config import preset


class FakeRunner(Closing):
    """Fills with a colour that follows from z, psi and the sum of all that the model is shown.

    A leak of anything under a hole, or of the order of a batch, therefore changes the answer.

    Args:
        spec: Changes to the specification of mat-tiny-256 with a dynamic batch.
        shade: Added to the fill, in [-1, 1] units.
        broken: Give NaN in one place.
    """

    def __init__(self, *, shade: float = 0.0, broken: bool = False, **spec: Any) -> None:
        self.name = "fake"
        self.spec = GraphSpec(preset("mat-tiny-256"), **{"batch": None, **spec})
        self.shade = shade
        self.broken = broken
        self.batches: list[int] = []
        self.seen: list[dict[str, NDArray[Any]]] = []

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        check_inputs(self.spec, inputs)
        self.batches.append(len(inputs["z"]))
        self.seen.append(dict(inputs))
        image, mask = inputs["image"], inputs["mask"]
        if self.spec.io == "uint8":
            image, mask = to_unit(image, mask)
        shown = np.rint((image + 1.0) * 127.5).sum(axis=(1, 2, 3)) % 997 / 997
        colour = np.tanh(inputs["z"][:, :3] * inputs["truncation"]) * 0.6
        colour = colour + 0.2 * shown[:, None] + 0.05 * inputs["gate_tokens"][:, 0, :3]
        if self.spec.noise == "input":
            colour = colour + 0.05 * inputs["noise_16"].mean(axis=(1, 2, 3))[:, None]
        ramp = np.linspace(-0.2, 0.2, image.shape[3], dtype=np.float32)
        fill = colour[:, :, None, None] + ramp + self.shade
        output = (image * mask + fill * (1.0 - mask)).astype(np.float32)
        if self.broken:
            output[0, 0, 3, 5] = np.nan
        return {"output": from_unit(output) if self.spec.io == "uint8" else output}

    def close(self) -> None:
        pass
