"""Training MAT: the loop around `train_step`, with logs, pictures, checkpoints and resuming.

``torchrun --nproc-per-node=N`` spreads a run over N devices; without it the run is one process. All
draws depend on the seed and the samples' numbers alone (`mat_torch.training_draws`), so a run that
was cut and resumed computes what it would have without the cut: on a CPU the same bits.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mat_torch.distributed import World, join_world
from mat_torch.losses import Perceptual
from mat_torch.training_draws import draw_for_training
from mat_torch.training_log import Meter, RunLog, format_line, picture_grid
from mat_torch.training_options import (
    TRAINING_PRESETS,
    TrainingError,
    TrainingOptions,
    training_preset,
)
from mat_torch.training_state import (
    InitialWeights,
    TrainingState,
    export_ema,
    latest_checkpoint,
    load_state,
    prune_checkpoints,
    save_state,
)
from mat_torch.training_step import (
    Batch,
    Networks,
    StepReport,
    is_out_of_memory,
    prepare,
    train_step,
)

__all__ = [
    "TRAINING_PRESETS",
    "Batch",
    "MakeLoader",
    "MakePerceptual",
    "Networks",
    "StepReport",
    "TrainingError",
    "TrainingOptions",
    "TrainingState",
    "World",
    "export_ema",
    "join_world",
    "load_state",
    "picture_columns",
    "prepare",
    "save_state",
    "train",
    "train_step",
    "training_preset",
]

MakeLoader: TypeAlias = Callable[[int, int, int], Iterable[Batch]]
"""(start number, rank, world) → batches without end, one a step.

Samples are dealt to the processes in turn: each batch has ``batch / world`` of them, and the
numbers of the first are ``start + rank``, ``start + rank + world``, …; each later one goes on from
there, as `mat_torch.data.CountingSampler` does. So the discriminator's groups of four are the same
for any number of processes. What a sample is depends on its number alone.
"""

MakePerceptual: TypeAlias = Callable[[torch.device], Perceptual]


def train(
    options: TrainingOptions,
    make_loader: MakeLoader,
    folder: str | os.PathLike[str],
    *,
    make_perceptual: MakePerceptual | None = None,
    initial: InitialWeights | None = None,
    surroundings: Mapping[str, Any] | None = None,
    resume: bool = False,
    device: torch.device | None = None,
    report: Callable[[str], None] | None = None,
) -> TrainingState:
    """Train, or go on training, until ``options.images`` or an interruption.

    In the folder: ``checkpoints/checkpoint-IMAGES.pt``, ``log.jsonl``, ``grids/IMAGES.png``, and
    ``tensorboard/`` if asked. Ctrl-C or SIGTERM ends the step, saves and returns; a second Ctrl-C
    interrupts at once.

    Args:
        options: The run.
        make_loader: Its data from a sample on.
        folder: Where the run is kept.
        make_perceptual: Makes the perceptual loss for a device; needed unless its weight is 0.
        initial: Weights to begin with (fine-tuning); random ones without. A resumed run has its
            own.
        surroundings: What beside the options makes it this run, see `TrainingState`: a resumed run
            has to give the same.
        resume: Go on from the folder's newest checkpoint; from the beginning if there is none.
        device: Where to compute; by default CUDA, one device a process, or the CPU.
        report: Takes a line of progress now and then, in the first process.

    Returns:
        The state at the end; ``counters.images`` tells whether the run is complete.

    Raises:
        TrainingError: If the run cannot start or go on; one sentence says why and what to do.
    """
    if options.perceptual_weight > 0.0 and make_perceptual is None:
        raise TrainingError(
            f"perceptual_weight is {options.perceptual_weight} and no perceptual loss is given; "
            "pass make_perceptual, or set the weight to 0"
        )
    folder = Path(folder)
    with join_world(device) as world, _arithmetic(options, world.device), _Interruption() as stop:
        options.micro_batch(world.size)
        try:
            state = TrainingState.start(options, world.device)
            state.surroundings = dict(surroundings or {})
            _begin(state, folder, resume, initial, world)
            perceptual = None
            if make_perceptual is not None and options.perceptual_weight > 0.0:
                perceptual = make_perceptual(world.device)
            run = _Run(state, world, folder, make_loader, report)
            try:
                run.loop(prepare(state, world), perceptual, stop)
            finally:
                run.close()
        except RuntimeError as error:  # steps say so themselves, and what to do
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"{world.device} has no memory for the networks and their optimizers: "
                "end what else runs there, or train a smaller network"
            ) from error
    return state


def _begin(
    state: TrainingState,
    folder: Path,
    resume: bool,
    initial: InitialWeights | None,
    world: World,
) -> None:
    """Take over the newest checkpoint, or the weights to begin with."""
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is not None and not resume:
        raise TrainingError(
            f"{folder} already holds a run ({newest.name}); resume it, or choose another folder"
        )
    if newest is not None:
        load_state(state, newest)
    elif initial is not None:
        state.begin_with(initial)
        if world.rank == 0:  # so that a run cut before its first checkpoint resumes from these
            save_state(state, folder / "checkpoints")


class _Run:
    """What happens around the steps; logs and files in the first process only."""

    def __init__(
        self,
        state: TrainingState,
        world: World,
        folder: Path,
        make_loader: MakeLoader,
        report: Callable[[str], None] | None,
    ) -> None:
        self._state, self._world = state, world
        self._checkpoints = folder / "checkpoints"
        self._make_loader, self._report = make_loader, report
        self._saved = state.counters.images if state.counters.images else -1
        self._log: RunLog | None = None
        self._pictures: Batch | None = None
        if world.rank == 0:
            options, counters = state.options, state.counters
            self._log = RunLog(
                folder,
                step=counters.steps,
                images=counters.images,
                tensorboard=options.tensorboard,
            )
            if options.grid_every:
                self._pictures = _first_pictures(make_loader, options)

    def loop(self, networks: Networks, perceptual: Perceptual | None, stop: _Interruption) -> None:
        """Steps until the end or an interruption, and a checkpoint then."""
        state, world, options = self._state, self._world, self._state.options
        counters, meter = state.counters, Meter()
        batches = iter(self._make_loader(counters.images, world.rank, world.size))
        while counters.images < options.images:
            # Data.
            before = time.perf_counter()
            batch = _next(batches, counters.images, stop)
            waited = time.perf_counter() - before
            if world.any(stop.requested or batch is None) or batch is None:
                break
            # A step.
            step = train_step(state, networks, batch, perceptual=perceptual, world=world)
            scalars = {} if step.skipped else step.scalars
            meter.add(scalars, images=options.batch, waited=waited)
            if counters.skipped_in_row >= options.max_skipped:
                raise _diverged(state, step)
            # What is due.
            if self._due(options.log_every):
                self._write_line(meter)
            if self._due(options.grid_every):
                self._write_grid()
            if self._due(options.checkpoint_every):
                self._save()
        self._save()

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def _due(self, every: int) -> bool:
        """Whether the last step crossed a multiple of so many images, or ended the run."""
        if not every or self._world.rank != 0:
            return False
        images, options = self._state.counters.images, self._state.options
        return images // every > (images - options.batch) // every or images >= options.images

    def _write_line(self, meter: Meter) -> None:
        assert self._log is not None, "the first process has a log"
        counters, options = self._state.counters, self._state.options
        line: dict[str, Any] = {
            "step": counters.steps,
            "images": counters.images,
            "skipped": counters.skipped,
            **meter.line(images_left=max(0, options.images - counters.images)),
        }
        self._log.write(line)
        if self._report is not None:
            self._report(format_line(line, options.images))

    def _write_grid(self) -> None:
        assert self._log is not None, "the first process has a log"
        assert self._pictures is not None, "made at the start where grids are asked for"
        columns = picture_columns(self._state, self._pictures)
        self._log.grid(picture_grid(columns), self._state.counters.images)

    def _save(self) -> None:
        images, options = self._state.counters.images, self._state.options
        if self._world.rank != 0 or images in (0, self._saved):
            return
        save_state(self._state, self._checkpoints)
        self._saved = images
        prune_checkpoints(
            self._checkpoints, keep_last=options.keep_last, keep_every=options.keep_every
        )


def _next(batches: Iterator[Batch], images: int, stop: _Interruption) -> Batch | None:
    """The next batch; None if an interruption reached the loader's processes first."""
    try:
        return next(batches)
    except StopIteration:
        raise TrainingError(
            f"the data ended after {images} images; make_loader must give batches without end"
        ) from None
    except Exception:
        if stop.requested:
            return None
        raise


def _diverged(state: TrainingState, step: StepReport) -> TrainingError:
    values = ", ".join(f"{name} {value:g}" for name, value in step.scalars.items())
    return TrainingError(
        f"{state.counters.skipped_in_row} steps in a row had a loss or gradient that is not finite "
        f"({values}) after {state.counters.images} images; resume from an earlier checkpoint, in "
        "a new folder with a lower learning_rate if it happens again"
    )


# -- pictures --------------------------------------------------------------------------------------


def _first_pictures(make_loader: MakeLoader, options: TrainingOptions) -> Batch:
    """The first samples of the whole run, so that grids compare over time and over a resume."""
    batch = next(iter(make_loader(0, 0, 1)))
    return {name: values[: options.grid_images].clone() for name, values in batch.items()}


@torch.no_grad()
def picture_columns(state: TrainingState, batch: Batch) -> list[Tensor]:
    """What a grid shows: input with its hole in grey, coarse, output, original.

    By the average generator, each sample with its own fixed draws, without style mixing.

    Args:
        state: The run.
        batch: uint8 images and masks, and numbers.

    Returns:
        Four tensors [B, 3, r, r] in [-1, 1] on the state's device.
    """
    options, rows = state.options, []
    for i in range(len(batch["number"])):
        draws = draw_for_training(
            options.config,
            options.seed,
            "grid",
            batch["number"][i : i + 1].tolist(),
            style_mixing=0.0,
            device=state.device,
        )
        image = batch["image"][i : i + 1].to(state.device).float() / 127.5 - 1.0
        mask = batch["mask"][i : i + 1].to(state.device).float()
        output, coarse = state.ema(
            image,
            mask,
            draws.z[:, 0],
            options.truncation,
            draws.gate_tokens,
            draws.gate_bottleneck,
        )
        rows.append((image * mask, coarse, output, image))
    return [torch.cat(column) for column in zip(*rows, strict=True)]


# -- the process -----------------------------------------------------------------------------------


class _Interruption:
    """Turns the first SIGINT or SIGTERM into a flag; the second acts as it did before."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            self._before = {n: signal.signal(n, self._note) for n in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextmanager
def _arithmetic(options: TrainingOptions, device: torch.device) -> Iterator[None]:
    """CUDA's settings for this run: TF32 or not."""
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends
    settings = (
        (backends.cuda.matmul, "fp32_precision", "tf32" if options.tf32 else "ieee"),
        (backends.cudnn.conv, "fp32_precision", "tf32" if options.tf32 else "ieee"),
    )
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
