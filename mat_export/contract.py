"""The contract of the graph, as data: inputs, outputs, metadata and masks. No torch here.

Every backend (PyTorch, ONNX Runtime, TensorRT) takes these inputs and gives these outputs, so a
runner, a parity check or an engine builder needs to know nothing else of the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from mat_torch.config import ConfigError, GeneratorConfig

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

__all__ = [
    "CALIBRATION_KEY",
    "METADATA_KEY",
    "OPERATOR_DOMAIN",
    "SINGLE_KEY",
    "STATE_PREFIX",
    "Closing",
    "GraphSpec",
    "RunError",
    "TensorSpec",
    "UserError",
    "axes_of_size",
    "check_inputs",
    "mask_state_names",
    "plugin_problem",
    "require_exportable",
]

METADATA_KEY = "mat.graph"
"""ONNX metadata property that holds a GraphSpec as JSON."""

CALIBRATION_KEY = "mat.calibration"
"""ONNX metadata property of an INT8 model: what it was calibrated on, and how well it does, as
JSON."""

SINGLE_KEY = "mat.single"
"""ONNX metadata property of a graph whose types the builder chooses: the tensors that have to be in
single precision, with spaces between."""

OPERATOR_DOMAIN = "mat"
"""ONNX domain of the custom operators, and the plugin namespace of the quick ones."""

STATE_PREFIX = "mask_state/"
"""How the names of mask states begin: tensors in a graph, and outputs of a runner that gives them
beside those of its specification."""

FORMAT = 1
"""Version of the contract; a file of another version is refused."""


_C = TypeVar("_C", bound="Closing")


class Closing:
    """Something that is closed by leaving its context: a runner, an engine."""

    def close(self) -> None:
        """Release what it holds; using it afterwards is an error, closing again is nothing."""
        raise NotImplementedError

    def __enter__(self: _C) -> _C:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class UserError(Exception):
    """Something the user can put right: one sentence that says what was got and what to do.

    The command line prints it and exits with 2; it never shows a traceback.
    """


class RunError(RuntimeError):
    """A model that was open did not run, by no mistake of the user's: one sentence that says why.

    The command line shows it as it does a UserError.
    """


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of the graph.

    Attributes:
        name: Name in the graph.
        shape: A number, or the name of a dynamic axis, for each axis.
        dtype: NumPy's name of the element type.
        meaning: What it holds, with its value range.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    meaning: str


@dataclass(frozen=True)
class GraphSpec:
    """What one exported graph takes and gives.

    Attributes:
        config: The network.
        batch: Images at once, or None for a dynamic batch.
        dynamic_size: Height and width are any multiples of the native size; else just that.
        noise: ``const`` keeps the checkpoint's maps in the graph, ``input`` takes them.
        io: ``float`` or ``uint8`` images and masks.
        coarse: Stage one's image is an output too.
        precision: The types inside, ``fp32`` unless a later pass says otherwise.
        checkpoint: Digest of the weights.
        source: Where they came from, in words.
    """

    config: GeneratorConfig
    batch: int | None = 1
    dynamic_size: bool = False
    noise: str = "const"
    io: str = "float"
    coarse: bool = False
    precision: str = "fp32"
    checkpoint: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if self.batch is not None and (type(self.batch) is not int or self.batch < 1):
            raise UserError(f"a batch is a whole number of images from 1 up, got {self.batch!r}")
        for field, kind in (
            ("dynamic_size", bool),
            ("coarse", bool),
            ("precision", str),
            ("checkpoint", str),
            ("source", str),
        ):
            if not isinstance(getattr(self, field), kind):
                raise UserError(f"{field} is a {kind.__name__}, got {getattr(self, field)!r}")
        if self.noise not in ("const", "input"):
            raise UserError(f"noise is 'const' or 'input', got '{self.noise}'")
        if self.io not in ("float", "uint8"):
            raise UserError(f"io is 'float' or 'uint8', got '{self.io}'")
        if self.dynamic_size and self.noise == "const":
            raise UserError(
                "the checkpoint's noise maps fit the native size only: "
                "a dynamic size needs --noise input"
            )

    # -- tensors -------------------------------------------------------------------------------

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Every input, in the order of the graph."""
        c = self.config
        B: int | str = "batch" if self.batch is None else self.batch
        H, W = self._image_axes()
        h, w = c.bottleneck_grid(c.resolution, c.resolution)
        tokens: int | str = "tokens" if self.dynamic_size else h * w
        grid = ("grid_height", "grid_width") if self.dynamic_size else (h, w)
        specs = [
            *self._picture_inputs(B, H, W),
            TensorSpec("z", (B, c.latent_dim), "float32", "latent, standard normal"),
            TensorSpec("truncation", (1,), "float32", "ψ in [0, 2]: 0 mean style, 1 free"),
            TensorSpec("gate_tokens", (B, tokens, c.token_dim), "float32", "0/1 gate of stage one"),
            TensorSpec(
                "gate_bottleneck",
                (B, c.channels(16), *grid),
                "float32",
                "0/1 gate of stage two",
            ),
        ]
        if self.noise == "input":
            for name, r in c.noise_resolutions.items():
                side = self._noise_axes(r)
                specs.append(TensorSpec(name, (B, 1, *side), "float32", "noise, standard normal"))
        return tuple(specs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Every output, in the order of the graph."""
        B: int | str = "batch" if self.batch is None else self.batch
        H, W = self._image_axes()
        shape = (B, 3, H, W) if self.io == "float" else (B, H, W, 3)
        dtype, values = ("float32", "[-1, 1]") if self.io == "float" else ("uint8", "0 to 255")
        specs = [TensorSpec("output", shape, dtype, f"the filled image, {values}")]
        if self.coarse:
            specs.append(TensorSpec("coarse", shape, dtype, f"stage one's image, {values}"))
        return tuple(specs)

    def _image_axes(self) -> tuple[int | str, int | str]:
        r = self.config.resolution
        return ("height", "width") if self.dynamic_size else (r, r)

    def _noise_axes(self, r: int) -> tuple[int | str, int | str]:
        return (f"height_{r}", f"width_{r}") if self.dynamic_size else (r, r)

    def _picture_inputs(
        self, B: int | str, H: int | str, W: int | str
    ) -> tuple[TensorSpec, TensorSpec]:
        if self.io == "uint8":
            return (
                TensorSpec("image", (B, H, W, 3), "uint8", "RGB, 0 to 255"),
                TensorSpec("mask", (B, H, W), "uint8", "128 and above keep, below is the hole"),
            )
        return (
            TensorSpec("image", (B, 3, H, W), "float32", "RGB in [-1, 1]"),
            TensorSpec("mask", (B, 1, H, W), "float32", "1 keep, 0 hole"),
        )

    # -- as metadata ---------------------------------------------------------------------------

    def with_changes(self, **fields: Any) -> GraphSpec:
        """A copy with some fields replaced."""
        return replace(self, **fields)

    def to_arguments(self) -> list[str]:
        """The options of ``mat-export onnx`` that ask for this graph."""
        batch = "dynamic" if self.batch is None else str(self.batch)
        size = "dynamic" if self.dynamic_size else "native"
        options = ["--batch", batch, "--size", size, "--noise", self.noise, "--io", self.io]
        return [*options, "--coarse"] if self.coarse else options

    def to_json(self) -> str:
        """JSON that from_json reads back."""
        fields = asdict(self)
        fields["config"] = json.loads(self.config.to_json())
        return json.dumps({"format": FORMAT, **fields}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> GraphSpec:
        """The specification that to_json wrote.

        Raises:
            UserError: If it is none, or of another version of the contract.
        """
        try:
            fields = json.loads(text)
            version = fields.pop("format")
            if version != FORMAT:
                raise UserError(
                    f"the file follows version {version} of the graph contract and this "
                    f"mat-export knows version {FORMAT}: export it again"
                )
            fields["config"] = GeneratorConfig.from_json(json.dumps(fields["config"]))
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"unreadable graph metadata ({error}): export it again") from error

    @classmethod
    def of_model(cls, model: onnx.ModelProto) -> GraphSpec | None:
        """The specification in an ONNX model, or None if the model is not ours."""
        return cls.from_metadata({entry.key: entry.value for entry in model.metadata_props})

    def write_to(self, model: onnx.ModelProto) -> None:
        """Put this specification in the place of the one that a model of ours has."""
        entry = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
        entry.value = self.to_json()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> GraphSpec | None:
        """The specification in a model's metadata, or None if the model is not ours."""
        text = metadata.get(METADATA_KEY)
        return None if text is None else cls.from_json(text)


def mask_state_names(config: GeneratorConfig) -> tuple[str, ...]:
    """The masks of stage one that reach the output, by the layer that makes them, in order.

    In a graph the tensor ``mask_state/NAME`` holds each as 0/1, [B, 1, h, w]. The mask that leaves
    the second transformer stage's last conv is not among them: nothing reads it.
    """
    levels = config.resolution.bit_length() - 1 - 6
    return (
        "conv_first",
        *(f"enc_conv.{i}" for i in range(levels)),
        *(f"tran.0.blocks.{j}" for j in range(config.depths[0])),
        "tran.0.conv",
        "tran.1.downsample",
        *(f"tran.1.blocks.{j}" for j in range(config.depths[1])),
    )


def require_exportable(config: GeneratorConfig) -> None:
    """Raise UserError unless a network is the published one, whatever its sizes."""
    if config.ablations:
        raise UserError(
            f"only the published network can be exported and '{config.name}' has "
            f"{config.describe_ablations()}: run it in PyTorch (mat_torch.Generator)"
        )


def plugin_problem(config: GeneratorConfig) -> str:
    """Why the plugins have no kernel for a network, in a sentence; empty if they have.

    The limits are those of ``mat_attention_problem`` (engines/plugins/kernels.cu).
    """
    strange = sorted({window for window in config.windows if window not in (8, 16)})
    if strange:
        return (
            f"plugins have kernels for windows of 8 and 16 tokens a side, and '{config.name}' has "
            f"windows of {' and '.join(map(str, strange))}"
        )
    size = config.token_dim // config.heads
    if size % 2 or size > 32:
        return (
            "plugins have kernels for heads of an even number of channels up to 32, and those of "
            f"'{config.name}' have {size}"
        )
    return ""


# -- holding arrays against it ---------------------------------------------------------------------


def check_inputs(spec: GraphSpec, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Hold inputs, by name, against a specification: names, types, shapes, and no axis empty.

    Axes of one name must agree among the inputs, and those that follow from the image's size must
    follow it.

    Raises:
        UserError: With the input, what it is and what it has to be.
    """
    expected = {tensor.name: tensor for tensor in spec.inputs}
    for missing in (name for name in expected if name not in inputs):
        raise UserError(f"input '{missing}' is missing; the model takes {', '.join(expected)}")
    for unknown in (name for name in inputs if name not in expected):
        raise UserError(f"the model has no input '{unknown}'; it takes {', '.join(expected)}")
    axes: dict[str, int] = {}
    for name, tensor in expected.items():
        array = inputs[name]
        fits = array.ndim == len(tensor.shape) and all(
            size >= 1 and size == (axis if isinstance(axis, int) else axes.setdefault(axis, size))
            for axis, size in zip(tensor.shape, array.shape, strict=True)
        )
        if not fits or str(array.dtype) != tensor.dtype:
            wanted = ", ".join(str(axes.get(str(axis), axis)) for axis in tensor.shape)
            raise UserError(
                f"input '{name}' is {array.dtype} {list(array.shape)}, "
                f"the model takes {tensor.dtype} [{wanted}]"
            )
        if name == "image" and spec.dynamic_size:
            axes |= axes_of_size(spec.config, axes["height"], axes["width"])


def axes_of_size(config: GeneratorConfig, height: int, width: int) -> dict[str, int]:
    """Length of every other axis that follows from the size of the image, by the axis's name.

    Args:
        config: The network.
        height: Height of the image in pixels, a multiple of ``config.resolution``.
        width: Likewise.

    Returns:
        ``tokens``, ``grid_height``, ``grid_width``, and ``height_R`` and ``width_R`` for each
        native side R of a noise map.

    Raises:
        UserError: If the network takes no image of that size.
    """
    try:
        config.check_size(height, width)
    except ConfigError as error:
        raise UserError(str(error)) from error
    h, w = config.bottleneck_grid(height, width)
    axes = {"tokens": h * w, "grid_height": h, "grid_width": w}
    for side in config.noise_resolutions.values():
        axes[f"height_{side}"] = side * height // config.resolution
        axes[f"width_{side}"] = side * width // config.resolution
    return axes
