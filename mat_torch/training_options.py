"""Every setting of a training run, as data (no torch here), and the presets."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mat_torch.config import PRESETS, ConfigError, GeneratorConfig

__all__ = ["FINE_TUNING", "TRAINING_PRESETS", "TrainingError", "TrainingOptions", "training_preset"]

_GROUP = 4  # mat_torch.discriminator.GROUP, which needs torch


class TrainingError(ValueError):
    """Training cannot start or go on. One sentence says what was got and what to do."""


def _free(default: Any) -> Any:
    """A field that a resumed run may change: the weights stay what they are, up to rounding."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True)
class TrainingOptions:
    """A run. The defaults are the published values (paper, section 4.1, and its release).

    Attributes:
        config: Sizes of the generator; the discriminator's follow.
        seed: Of the initial weights and of every draw, in [0, 2⁶³).
        batch: Images a step, over all processes.
        learning_rate: Of both networks' Adam.
        betas: Its β₁ and β₂.
        eps: Its ε.
        ema_half_life: Images after which the average has forgotten half of the past.
        ema_ramp_up: The half-life is at most this share of the images so far; None: no limit.
        r1_gamma: γ of R1 on both heads.
        r1_interval: R1 joins every so many steps, the first included (`losses.lazy_r1_weight`).
        style_mixing: Probability that an image has two latents, split at a random layer.
        truncation: ψ while training.
        w_avg_decay: Decay of the average w a step.
        perceptual_weight: Of the perceptual loss; 0 does without it.
        gram_weight: Of Gram matrices within the perceptual loss, which ask for texture; 0, as
            published, does without them.
        reconstruction_weight: Of both stages' absolute error; 0, as published, does without it.
        gradient_limit: Elements of gradients are cut to ± this; None, as published: they are not.
            At the start a few biases have gradients of 1e10 (tokens of empty windows have no
            length), and Adam's second moments remember one for thousands of steps.
        warm_up: Images at the start without the discriminator: the generator learns from the
            perceptual and reconstruction losses alone, at a third of a step's cost; 0, as
            published: none.
        bf16: The networks' main passes under bfloat16 autocast; R1 stays in float32.
        max_skipped: Training stops once so many steps in a row were not finite.
        images: Length of the run in images.
        accumulate: Micro-batches a step: that many times less memory for activations.
        tf32: Let CUDA round the inputs of float32 products to TF32.
        channels_last: Memory layout of activations; faster for 16 bits on CUDA.
        compile: torch.compile for both networks (not for R1, which differentiates twice).
        cuda_graphs: Capture a step's work once and replay it: thousands of kernels are then
            launched at once. On CUDA, for one process without micro-batches; else it does nothing.
        log_every: Images between lines of the log.
        grid_every: Images between grids of pictures; 0: none.
        grid_images: Pictures in a grid.
        checkpoint_every: Images between checkpoints.
        keep_last: Newest checkpoints kept.
        keep_every: Also kept: the first checkpoint of each span of so many images; 0: none.
        tensorboard: Write TensorBoard's files too.

    Raises:
        TrainingError: If a value is out of its range.
    """

    config: GeneratorConfig
    seed: int = 0
    # -- the recipe: a resumed run keeps it -------------------------------------------------------
    batch: int = 32
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.0, 0.99)
    eps: float = 1e-8
    ema_half_life: float = 10_000.0
    ema_ramp_up: float | None = None
    r1_gamma: float = 10.0
    r1_interval: int = 16
    style_mixing: float = 0.5
    truncation: float = 0.5
    w_avg_decay: float = 0.995
    perceptual_weight: float = 0.1
    gram_weight: float = 0.0
    reconstruction_weight: float = 0.0
    gradient_limit: float | None = None
    warm_up: int = 0
    bf16: bool = True
    # -- how it is computed and watched ------------------------------------------------------------
    max_skipped: int = _free(20)
    images: int = _free(50_000_000)
    accumulate: int = _free(1)
    tf32: bool = _free(True)
    channels_last: bool = _free(True)
    compile: bool = _free(False)
    cuda_graphs: bool = _free(False)
    log_every: int = _free(3_200)
    grid_every: int = _free(200_000)
    grid_images: int = _free(8)
    checkpoint_every: int = _free(100_000)
    keep_last: int = _free(2)
    keep_every: int = _free(2_000_000)
    tensorboard: bool = _free(False)

    def __post_init__(self) -> None:
        if not isinstance(self.config, GeneratorConfig):
            raise TrainingError(f"config is a GeneratorConfig, got {type(self.config).__name__}")
        for name, low, high in _WHOLE:
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise TrainingError(f"{name} is a whole number from {low} to {high}, got {value!r}")
        for name, limit in _REAL:
            value = getattr(self, name)
            if name in ("ema_ramp_up", "gradient_limit") and value is None:
                continue
            if type(value) not in (int, float) or not 0.0 <= value <= limit:
                raise TrainingError(f"{name} is a number from 0 to {limit:g}, got {value!r}")
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise TrainingError(f"betas is a pair (β₁, β₂), got {self.betas!r}")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise TrainingError(f"betas are in [0, 1), got {self.betas}")
        if self.warm_up and not self.perceptual_weight + self.reconstruction_weight:
            raise TrainingError(
                f"a warm-up of {self.warm_up} images has nothing to learn from: "
                "give perceptual_weight or reconstruction_weight"
            )
        self.micro_batch(1)

    def micro_batch(self, world: int) -> int:
        """Images that a process takes through the networks at once.

        Raises:
            TrainingError: If the batch does not divide by processes and micro-batches, or the
                parts do not by the discriminator's groups of four.
        """
        parts = world * self.accumulate
        size, rest = divmod(self.batch, parts)
        if rest or size == 0 or (size % _GROUP and (parts > 1 or size > _GROUP)):
            raise TrainingError(
                f"a batch of {self.batch} does not divide into {parts} parts ({world} processes, "
                f"{self.accumulate} micro-batches each) of a multiple of {_GROUP} images, which "
                f"the discriminator compares; try a batch of {parts * _GROUP * max(1, size // 4)}"
            )
        return size

    # -- resuming ---------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for files."""
        return {**asdict(self), "config": self.config.to_json(), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingOptions:
        """The options that to_dict gave.

        Raises:
            TrainingError: If they are none.
        """
        try:
            config = GeneratorConfig.from_json(values["config"])
            return cls(**{**values, "config": config, "betas": tuple(values["betas"])})
        except (ConfigError, KeyError, TypeError) as error:
            raise TrainingError(f"these are no options of a training run: {error}") from error

    def refuse_other_recipe(self, values: dict[str, Any]) -> None:
        """Compare with what to_dict gave when the run began.

        Raises:
            TrainingError: Naming each difference that would make it another run.
        """
        mine = self.to_dict()
        names = [f.name for f in fields(self) if not f.metadata.get("free")]
        changed = [name for name in names if values.get(name) != mine[name]]
        if changed:
            differences = "; ".join(_difference(n, values.get(n), mine[n]) for n in changed)
            raise TrainingError(
                f"the run was started otherwise: {differences}; "
                "resume with its own options, or start a run in another folder"
            )


def _difference(name: str, was: Any, now: Any) -> str:
    if name != "config":
        return f"{name} was {was!r} and is now {now!r}"
    try:
        before, after = json.loads(was), json.loads(now)
    except (TypeError, ValueError):
        return "its network cannot be read"
    parts = [f"{k} was {before.get(k)!r} and is now {after[k]!r}" for k in after]
    return ", ".join(p for p, k in zip(parts, after, strict=True) if before.get(k) != after[k])


_WHOLE = (
    ("seed", 0, 2**63 - 1),
    ("batch", 1, 2**20),
    ("r1_interval", 1, 2**20),
    ("warm_up", 0, 2**50),
    ("max_skipped", 1, 2**20),
    ("images", 1, 2**50),
    ("accumulate", 1, 2**20),
    ("log_every", 1, 2**50),
    ("grid_every", 0, 2**50),
    ("grid_images", 1, 64),
    ("checkpoint_every", 1, 2**50),
    ("keep_last", 1, 2**20),
    ("keep_every", 0, 2**50),
)
_REAL = (
    ("learning_rate", 1.0),
    ("eps", 1.0),
    ("ema_half_life", math.inf),
    ("ema_ramp_up", math.inf),
    ("r1_gamma", math.inf),
    ("style_mixing", 1.0),
    ("truncation", 1.0),
    ("w_avg_decay", 1.0),
    ("perceptual_weight", math.inf),
    ("gram_weight", math.inf),
    ("reconstruction_weight", math.inf),
    ("gradient_limit", math.inf),
)

TRAINING_PRESETS: dict[str, TrainingOptions] = {
    # As published for Places; CelebA-HQ took 25 M images.
    "published": TrainingOptions(PRESETS["mat-512"]),
    # Minutes to hours of one GPU for the small network: twice the rate for a network a twentieth of
    # the size, many small steps, a gentler R1, as Karras et al. (2020) take at this size, an
    # average that is short at first, and for the first thousands of steps heavier losses against
    # the photograph, alone to begin with. Latents are not truncated, as they are not in use: a run
    # with ψ = 0.5 filled holes 1 dB better at that ψ than at 1. Chosen, not searched for.
    "small": TrainingOptions(
        PRESETS["mat-tiny-256"],
        batch=16,
        learning_rate=2e-3,
        ema_ramp_up=0.05,
        truncation=1.0,
        r1_gamma=2.0,
        perceptual_weight=2.0,
        gram_weight=4.0,
        reconstruction_weight=2.0,
        gradient_limit=1.0,
        warm_up=40_000,
        images=2_000_000,
        compile=True,
        cuda_graphs=True,
        grid_every=20_000,
        checkpoint_every=20_000,
        keep_every=200_000,
    ),
}
"""Whole runs that have a name; `dataclasses.replace` changes what should differ."""


FINE_TUNING: dict[str, Any] = {"warm_up": 0, "ema_ramp_up": None}
"""What a run that begins with trained weights does otherwise than its preset: there is no warm-up,
in which they would unlearn what a discriminator taught them, and the average begins full."""


def training_preset(name: str) -> TrainingOptions:
    """The preset of this name.

    Raises:
        TrainingError: If there is none; the message lists those there are.
    """
    if name not in TRAINING_PRESETS:
        known = ", ".join(TRAINING_PRESETS)
        raise TrainingError(f"unknown training preset '{name}'; known: {known}")
    return TRAINING_PRESETS[name]
