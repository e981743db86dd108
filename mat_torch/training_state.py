"""Everything a training run is between two steps, and its checkpoints.

A checkpoint is one torch file that `torch.load(weights_only=True)` reads. It holds the networks,
the average, both optimizers, the counters and the options; together with the data's numbering that
is all a run needs to go on as if it had never stopped.
"""

from __future__ import annotations

import copy
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mat_torch.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_discriminator,
    save_checkpoint,
    weights_digest,
)
from mat_torch.discriminator import Discriminator
from mat_torch.generator import Generator
from mat_torch.layers import ModulatedConv
from mat_torch.sampling import words
from mat_torch.training_options import TrainingError, TrainingOptions

__all__ = [
    "Counters",
    "InitialWeights",
    "TrainingState",
    "export_ema",
    "latest_checkpoint",
    "load_state",
    "prune_checkpoints",
    "read_options",
    "save_state",
]

_FORMAT = 1
_NAME = re.compile(r"checkpoint-([0-9]{12,})\.pt")
_NETWORKS = ("generator", "discriminator", "ema")
_OPTIMIZERS = ("generator_adam", "discriminator_adam")


@dataclass
class Counters:
    """How far a run is.

    Attributes:
        images: Samples taken from the data so far, which is also the next sample's number.
        steps: Steps so far, skipped ones included.
        skipped: Steps skipped because a loss or gradient was not finite.
        skipped_in_row: Of those, how many just now without one between that was fine.
    """

    images: int = 0
    steps: int = 0
    skipped: int = 0
    skipped_in_row: int = 0


@dataclass(frozen=True)
class InitialWeights:
    """What a run begins with instead of random weights.

    Attributes:
        generator: Of the generator and of its average.
        discriminator: State dict of the discriminator; None: it begins with random weights.
    """

    generator: Checkpoint
    discriminator: Mapping[str, Tensor] | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InitialWeights:
        """Read any file that `load_checkpoint` reads, with its discriminator if it has one.

        Raises:
            TrainingError: If it cannot be read, or a network in it is damaged.
        """
        try:
            generator = load_checkpoint(path)
            return cls(generator, load_discriminator(path, generator.config))
        except CheckpointError as error:
            raise TrainingError(str(error)) from error


@dataclass
class TrainingState:
    """A run between two steps.

    Attributes:
        options: Its settings.
        generator: In training mode, its modulation on the activations.
        discriminator: Of both heads.
        ema: The generator's running average, which is what users get; never trained.
        generator_adam: The generator's optimizer.
        discriminator_adam: The discriminator's.
        counters: How far it is.
        surroundings: What beside the options makes it this run, its data for one: plain values by
            name, which a checkpoint keeps and a resumed run has to have again.
        origin: Whose weights it began with, and their digest; None: random ones.
    """

    options: TrainingOptions
    generator: Generator
    discriminator: Discriminator
    ema: Generator
    generator_adam: Adam
    discriminator_adam: Adam
    counters: Counters = field(default_factory=Counters)
    surroundings: dict[str, Any] = field(default_factory=dict)
    origin: str | None = None

    @classmethod
    def start(cls, options: TrainingOptions, device: torch.device | None = None) -> TrainingState:
        """A run's beginning: weights drawn from the options' seed, the same on every machine."""
        device = device or torch.device("cpu")
        # Modules draw their weights from the global generator, which is put back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(
                int(words(options.seed, "initial weights", 1)[0]) & (2**63 - 1)
            )
            generator, discriminator = Generator(options.config), Discriminator(options.config)
        for network in (generator, discriminator):
            network.to(device).train()
            for parameter in network.parameters() if options.channels_last else ():
                # Module.to(memory_format=…) refuses the 5-D weights of modulated convolutions.
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        for module in generator.modules():
            if isinstance(module, ModulatedConv):
                module.scale_activations = True
        ema = copy.deepcopy(generator).eval().requires_grad_(False)
        adams = _adam(generator, options), _adam(discriminator, options)
        return cls(options, generator, discriminator, ema, *adams)

    def begin_with(self, weights: InitialWeights) -> None:
        """Take over weights before the first step; the optimizers have seen nothing yet.

        Raises:
            TrainingError: If the run has begun, or is of another network.
        """
        if self.counters.steps:
            raise TrainingError("a run takes other weights before its first step alone")
        theirs = weights.generator
        if theirs.config != self.options.config:
            raise TrainingError(
                f"{theirs.source} is of {theirs.config.name}, and the run is of "
                f"{self.options.config.name} or differs in a choice; train the network of that file"
            )
        self.generator.load_state_dict(theirs.tensors)
        self.ema.load_state_dict(theirs.tensors)
        if weights.discriminator is not None:
            self.discriminator.load_state_dict(weights.discriminator)
        self.origin = f"{theirs.source}, weights {theirs.digest}"

    @property
    def device(self) -> torch.device:
        return self.generator.mapping.w_avg.device

    @torch.no_grad()
    def track_ema(self, images: int) -> None:
        """``ema ← β·ema + (1 − β)·generator``, ``β = ½^(batch / half-life)``.

        While ramping up, the half-life is at most that share of `images`, the images so far.
        Buffers (the average w, the noise constants) are copied.
        """
        options = self.options
        half_life = options.ema_half_life
        if options.ema_ramp_up is not None:
            half_life = min(half_life, images * options.ema_ramp_up)
        decay = 0.5 ** (options.batch / half_life) if half_life > 0.0 else 0.0
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        average(list(self.ema.parameters()), list(self.generator.parameters()), 0)
        for mine, current in zip(self.ema.buffers(), self.generator.buffers(), strict=True):
            mine.copy_(current)

    # -- as plain values --------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for `torch.save`."""
        return {
            "format": _FORMAT,
            "options": self.options.to_dict(),
            "counters": asdict(self.counters),
            "surroundings": self.surroundings,
            "origin": self.origin,
            **{name: getattr(self, name).state_dict() for name in _NETWORKS},
            **{name: getattr(self, name).state_dict()["state"] for name in _OPTIMIZERS},
        }

    def load_dict(self, values: dict[str, Any]) -> None:
        """Take over what to_dict gave, wherever it was computed.

        Raises:
            TrainingError: If it is of another run (the difference is named) or incomplete.
        """
        if values.get("format") != _FORMAT:
            raise TrainingError(
                f"this is no checkpoint of a training run of format {_FORMAT}; "
                "give one that `train` wrote"
            )
        try:
            self.options.refuse_other_recipe(values["options"])
            _refuse_other_surroundings(values.get("surroundings", {}), self.surroundings)
            counters = Counters(**values["counters"])
            for name in _NETWORKS:
                network: nn.Module = getattr(self, name)
                network.load_state_dict(values[name])
            for name in _OPTIMIZERS:
                optimizer: Adam = getattr(self, name)
                # Only the moments: rates and kernels are this run's options.
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": values[name], "param_groups": groups})
        except TrainingError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise TrainingError(f"the checkpoint is incomplete ({error}); use another") from error
        self.counters = counters
        self.origin = values.get("origin")


def _refuse_other_surroundings(was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [name for name in was if name in now and was[name] != now[name]]
    if changed:
        differences = "; ".join(f"{n} was {was[n]!r} and is now {now[n]!r}" for n in changed)
        raise TrainingError(
            f"the run was started otherwise: {differences}; "
            "resume with what it had, or start a run in another folder"
        )


def _adam(network: nn.Module, options: TrainingOptions) -> Adam:
    parameters = list(network.parameters())
    return Adam(
        parameters,
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
        # A few launches for hundreds of parameters, where launching is what takes time.
        fused=parameters[0].is_cuda,
    )


# -- files -----------------------------------------------------------------------------------------


def save_state(state: TrainingState, folder: str | os.PathLike[str]) -> Path:
    """Write ``checkpoint-IMAGES.pt`` into the folder, complete or not at all.

    Returns:
        Its path.

    Raises:
        TrainingError: If it cannot be written; older checkpoints are still there.
    """
    folder = Path(folder)
    path = folder / f"checkpoint-{state.counters.images:012}.pt"
    temporary = folder / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            torch.save(state.to_dict(), file)
            # On disk before it has its name, so that a crash leaves no half file under it.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's archive writer raises RuntimeError
        try:
            kept = latest_checkpoint(folder)
        except OSError:
            kept = None
        rest = f"{kept.name} is kept" if kept else "no earlier one is there"
        raise TrainingError(
            f"{path}: the checkpoint cannot be written ({_reason(error)}), {rest}; "
            "make space in that folder and resume"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _reason(error: BaseException) -> str:
    """The operating system's own words, where there are some behind an error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).split("\n")[0]


def load_state(state: TrainingState, path: str | os.PathLike[str]) -> None:
    """Make this state what the file holds. Nothing in the file is executed.

    Raises:
        TrainingError: If it cannot be read, is damaged, or is of another run.
    """
    with _reading(Path(path)) as values:
        state.load_dict(values)


def read_options(path: str | os.PathLike[str]) -> tuple[TrainingOptions, str | None]:
    """The options of the run that wrote this checkpoint, and whose weights it began with.

    Raises:
        TrainingError: If it cannot be read or is damaged.
    """
    with _reading(Path(path), mmap=True) as values:
        return TrainingOptions.from_dict(values["options"]), values.get("origin")


@contextmanager
def _reading(path: Path, *, mmap: bool = False) -> Iterator[dict[str, Any]]:
    """What a checkpoint holds; what goes wrong within is told as of this file."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(values, dict):
            raise TrainingError(f"this is a {type(values).__name__}, no checkpoint of `train`")
        yield values
    except TrainingError as error:
        raise TrainingError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise TrainingError(f"{path}: there is no such checkpoint; check the path") from error
    except Exception as error:  # torch.load raises whatever its readers do
        raise TrainingError(
            f"{path}: the checkpoint is damaged or no checkpoint ({_reason(error)}); "
            "take it away, and the run resumes from the one before"
        ) from error


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(images, path) of each checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the folder with the most images, if there is one."""
    found = _checkpoints(Path(folder))
    return found[-1][1] if found else None


def prune_checkpoints(
    folder: str | os.PathLike[str], *, keep_last: int, keep_every: int
) -> list[Path]:
    """Delete all but the newest and the milestones, the first of each `keep_every` images.

    Args:
        folder: Where the checkpoints are; other files in it are left alone.
        keep_last: Newest ones that stay.
        keep_every: Images between milestones; 0: there are none.

    Returns:
        What was deleted, oldest first.
    """
    found = _checkpoints(Path(folder))
    deleted = []
    spans: set[int] = {0}  # what came before the first milestone is none
    for images, path in found[: max(0, len(found) - keep_last)]:
        span = images // keep_every if keep_every else 0
        if span in spans:
            path.unlink(missing_ok=True)
            deleted.append(path)
        spans.add(span)
    return deleted


def export_ema(state: TrainingState, path: str | os.PathLike[str], *, half: bool = True) -> None:
    """Write the averaged generator as safetensors that `load_checkpoint` reads.

    Args:
        state: The run.
        path: Where to; an existing file is replaced.
        half: Store float16, half the size: weights lie near unit variance, so each is rounded by
            at most 2⁻¹¹ of itself, and `load_checkpoint` gives float32 again.

    Raises:
        TrainingError: If a weight is not finite or too large for float16, or the file cannot be
            written.
    """
    tensors: dict[str, Tensor] = {
        name: tensor.detach().float().cpu().contiguous()
        for name, tensor in state.ema.state_dict().items()
    }
    source = f"{state.options.config.name} after {state.counters.images} images"
    checkpoint = Checkpoint(state.options.config, tensors, weights_digest(tensors), source)
    try:
        save_checkpoint(checkpoint, path, dtype="float16" if half else "float32")
    except CheckpointError as error:
        raise TrainingError(str(error)) from error
