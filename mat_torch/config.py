"""What makes one MAT network differ from another, as data (no torch here)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = [
    "BOTTLENECK",
    "CHOICES",
    "DEMODULATION_EPS",
    "LRELU_SLOPE",
    "MASKED_LOGIT",
    "PRESETS",
    "TOKEN_GRID",
    "ConfigError",
    "GeneratorConfig",
    "preset",
]

DEMODULATION_EPS = 1e-8
"""Added to the sum of squares that demodulation takes the root of."""

LRELU_SLOPE = 0.2
"""Slope of every leaky ReLU for negative values."""

MASKED_LOGIT = -100.0
"""Added to a logit whose key is invalid, and once more where its regions differ."""

TOKEN_GRID = 64
"""Tokens a side at the native size (paper, section 3.2)."""

BOTTLENECK = 16
"""Side of the smallest feature grid of both stages at the native size."""

CHOICES: dict[str, tuple[str, str]] = {
    "attention": ("masked", "plain"),
    "block": ("mat", "layernorm"),
    "body": ("transformer", "convolution"),
    "style": ("full", "none"),
    "tokens": ("convolution", "linear"),
}
"""The published choice of each part that can be left out, and what is in its place without it
(`mat_torch.ablations` says how each is built)."""


class ConfigError(ValueError):
    """A configuration that describes no network we can build."""


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of one generator; every other dimension follows from these.

    Attributes:
        name: What the user calls it; part of metadata only.
        resolution: Native side in pixels, a power of two from 128 up. Height and width of any
            input are multiples of it.
        latent_dim: Width of z and w.
        token_dim: Channels of stage one (the transformer body).
        heads: Attention heads; ``token_dim / heads`` is the head size.
        depths: Blocks in each of the five transformer stages, on grids of 64, 32, 16, 32, 64.
        windows: Window side of each of the five stages, in tokens.
        base_channels: Stage two has ``min(max_channels, base_channels / r)`` channels at side r.
        max_channels: Upper limit of that.
        mapping_layers: Linear layers from z to w.
        attention: ``masked``, or ``plain``: the mask ends where tokens begin.
        block: ``mat``, or ``layernorm``: norms and residuals in place of the concatenation.
        body: ``transformer``, or ``convolution``: a residual block for each transformer block.
        style: ``full``, or ``none``: decoders without styles, so that z and both gates are unused.
        tokens: ``convolution``, or ``linear``: patch projections make and resample the tokens.

    Raises:
        ConfigError: If the sizes or choices contradict each other.
    """

    name: str
    resolution: int
    latent_dim: int = 512
    token_dim: int = 180
    heads: int = 6
    depths: tuple[int, ...] = (2, 3, 4, 3, 2)
    windows: tuple[int, ...] = (8, 16, 16, 16, 8)
    base_channels: int = 32768
    max_channels: int = 512
    mapping_layers: int = 8
    attention: str = "masked"
    block: str = "mat"
    body: str = "transformer"
    style: str = "full"
    tokens: str = "convolution"

    def __post_init__(self) -> None:
        numbers = [getattr(self, f.name) for f in fields(self) if f.type == "int"]
        sequences = [*self.depths, *self.windows] if self._has_tuples() else [None]
        if not all(type(number) is int and number >= 1 for number in (*numbers, *sequences)):
            raise ConfigError("the dimensions of a network are whole numbers from 1 up")
        if not isinstance(self.name, str):
            raise ConfigError(f"the name of a network is text, got {self.name!r}")
        if self.resolution < 128 or self.resolution & (self.resolution - 1):
            raise ConfigError(f"resolution {self.resolution} is not a power of two from 128 up")
        if self.token_dim % self.heads:
            raise ConfigError(f"token_dim {self.token_dim} does not divide by {self.heads} heads")
        if len(self.depths) != 5 or len(self.windows) != 5:
            raise ConfigError("depths and windows need five entries, one for each stage")
        for grid, window in zip(self.stage_grids, self.windows, strict=True):
            if window < 2 or window % 2 or grid % window:
                raise ConfigError(f"window {window} does not tile a grid of {grid} tokens a side")
        self._check_choices()

    def _check_choices(self) -> None:
        for name, (published, other) in CHOICES.items():
            value = getattr(self, name)
            if value not in (published, other):
                raise ConfigError(f"{name} is '{published}' or '{other}', got {value!r}")
        if self.body == "convolution" and (self.attention != "masked" or self.block != "mat"):
            raise ConfigError(
                "a body of 'convolution' has no attention and no transformer blocks: "
                "leave attention and block at 'masked' and 'mat' with it"
            )

    def _has_tuples(self) -> bool:
        return isinstance(self.depths, tuple) and isinstance(self.windows, tuple)

    # -- what follows from the sizes ------------------------------------------------------------

    @property
    def ablations(self) -> dict[str, str]:
        """The choices that are not published, by field; empty for the published network."""
        return {
            name: getattr(self, name)
            for name, (published, _) in CHOICES.items()
            if getattr(self, name) != published
        }

    def describe_ablations(self) -> str:
        """Like ``attention='plain', style='none'``; empty for the published network."""
        return ", ".join(f"{name}='{value}'" for name, value in self.ablations.items())

    @property
    def log2_resolution(self) -> int:
        """log₂ of the native side."""
        return self.resolution.bit_length() - 1

    @property
    def num_ws(self) -> int:
        """How many layers take a w of their own under style mixing (12 at 512, 10 at 256)."""
        return 2 * self.log2_resolution - 6

    @property
    def stage_grids(self) -> tuple[int, int, int, int, int]:
        """Tokens a side in each transformer stage, at the native size."""
        return (TOKEN_GRID, TOKEN_GRID // 2, BOTTLENECK, TOKEN_GRID // 2, TOKEN_GRID)

    @property
    def encoder_resolutions(self) -> tuple[int, ...]:
        """Sides of stage two's octaves, from the native size down to the bottleneck."""
        return tuple(2**n for n in range(self.log2_resolution, 3, -1))

    @property
    def noise_resolutions(self) -> dict[str, int]:
        """Name of each noise input of stage two and its side at the native size, in order."""
        names = {"noise_16": BOTTLENECK}
        for r in reversed(self.encoder_resolutions[:-1]):
            names[f"noise_{r}_0"] = r
            names[f"noise_{r}_1"] = r
        return names

    @property
    def style_dim_tokens(self) -> int:
        """Width of stage one's style [t, v]; 0 without styles."""
        return 3 * self.token_dim if self.style == "full" else 0

    @property
    def style_dim_pixels(self) -> int:
        """Width of stage two's style [w, t]; 0 without styles."""
        return self.latent_dim + 2 * self.channels(BOTTLENECK) if self.style == "full" else 0

    def channels(self, resolution: int) -> int:
        """Channels of stage two on a grid with this native side."""
        return max(1, min(self.max_channels, self.base_channels // resolution))

    def bottleneck_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the smallest grid for an image of this size (pixels)."""
        factor = self.resolution // BOTTLENECK
        return height // factor, width // factor

    def check_size(self, height: int, width: int) -> None:
        """Raise ConfigError unless both sides are positive multiples of the native one."""
        r = self.resolution
        if height < r or width < r or height % r or width % r:
            raise ConfigError(
                f"{self.name} takes heights and widths that are multiples of {r}, "
                f"got {height}x{width}"
            )

    # -- as text ----------------------------------------------------------------------------------

    def to_json(self) -> str:
        """One line of JSON that from_json reads back; published choices are left out of it."""
        entries = asdict(self)
        for name in CHOICES.keys() - self.ablations.keys():
            del entries[name]
        return json.dumps(entries, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> GeneratorConfig:
        """The configuration that to_json wrote.

        Raises:
            ConfigError: If the text is no JSON object with just these fields, choices optional.
        """
        try:
            entries: dict[str, Any] = json.loads(text)
            entries["depths"] = tuple(entries["depths"])
            entries["windows"] = tuple(entries["windows"])
            return cls(**entries)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"not a generator configuration: {error}") from error


PRESETS: dict[str, GeneratorConfig] = {
    config.name: config
    for config in (
        GeneratorConfig("mat-512", 512),
        GeneratorConfig("mat-256", 256),
        # Half the token width with heads of the same 30 channels, so the attention kernels of the
        # published models serve it unchanged; a third of the stage-two width keeps it in a second
        # on two cores, and 16-bit weights within 16 MiB.
        GeneratorConfig(
            "mat-tiny-256",
            256,
            latent_dim=128,
            token_dim=90,
            heads=3,
            base_channels=10240,
            max_channels=160,
            mapping_layers=4,
        ),
    )
}
"""Every configuration that has a name. The first two are the published ones."""


def preset(name: str) -> GeneratorConfig:
    """The preset of this name.

    Raises:
        ConfigError: If there is none; the message lists those there are.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"unknown preset '{name}'; known: {', '.join(PRESETS)}") from None
