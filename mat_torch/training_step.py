"""One step of adversarial training: the generator's update, then the discriminator's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from mat_torch.distributed import World
from mat_torch.generator import Generator
from mat_torch.layers import full_precision
from mat_torch.losses import (
    Perceptual,
    fake_loss,
    generator_loss,
    gradient_penalty,
    lazy_r1_weight,
    real_loss,
    reconstruction_loss,
)
from mat_torch.training_draws import draw_for_training
from mat_torch.training_graphs import Replayed, Work
from mat_torch.training_options import TrainingError
from mat_torch.training_state import TrainingState

__all__ = [
    "Batch",
    "Networks",
    "StepReport",
    "StyledGenerator",
    "is_out_of_memory",
    "prepare",
    "train_step",
]

Batch = Mapping[str, Tensor]
"""``image`` uint8 [B, 3, r, r]; ``mask`` uint8 [B, 1, r, r], 1 keep and 0 hole; ``number`` int64
[B], the samples' numbers in the run: a process's share of one step, ``images + rank``,
``images + rank + world``, …"""


class StyledGenerator(nn.Module):
    """The generator as training calls it: two latents an image, mixed at a layer, truncated.

    Args:
        generator: Whose weights these are.
        truncation: ψ of every w, towards the average w before this step.
    """

    def __init__(self, generator: Generator, truncation: float) -> None:
        super().__init__()
        self.generator = generator
        self.truncation = truncation

    def forward(
        self,
        image: Tensor,
        mask: Tensor,
        z: Tensor,
        cutoff: Tensor,
        gate_tokens: Tensor,
        gate_bottleneck: Tensor,
        noise: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(output, coarse, w of the first latents [B, latent_dim] before truncation)."""
        mapping = self.generator.mapping
        # Styles: layers before the cutoff take the first latent's.
        with full_precision(z):
            w = mapping(z.flatten(0, 1)).unflatten(0, (-1, 2))
        first = torch.arange(self.generator.config.num_ws, device=z.device) < cutoff[:, None]
        ws = torch.where(first[:, :, None], w[:, :1], w[:, 1:])
        ws = torch.lerp(mapping.w_avg, ws, self.truncation)
        # Pictures.
        output, coarse = self.generator.synthesis(
            image, mask, ws, gate_tokens, gate_bottleneck, noise
        )
        return output, coarse, w[:, 0].detach()


@dataclass(frozen=True)
class Networks:
    """The state's networks as a step runs them: compiled if asked, and averaging over processes.

    Attributes:
        generator: A StyledGenerator.
        generator_synced: The same, for the last micro-batch.
        discriminator: Of the state.
        discriminator_synced: The same, for the last backward pass.
        replayed: What was captured into CUDA graphs, by name; None: nothing is to be.
    """

    generator: nn.Module
    generator_synced: nn.Module
    discriminator: nn.Module
    discriminator_synced: nn.Module
    replayed: dict[str, Replayed] | None = None

    def compute(
        self, name: str, network: nn.Module, work: Work, inputs: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Do a piece of work that leaves gradients in a network, or replay it by its name."""
        if self.replayed is None:
            return work(*inputs)
        if name not in self.replayed:
            self.replayed[name] = Replayed(network.parameters())
        return self.replayed[name](work, inputs)


def prepare(state: TrainingState, world: World) -> Networks:
    """The networks of a run, once for all of its steps."""
    options = state.options
    generator: nn.Module = StyledGenerator(state.generator, options.truncation)
    discriminator: nn.Module = state.discriminator
    for network in (state.generator, state.discriminator):
        network.requires_grad_(True)
    if options.compile:
        generator, discriminator = map(_compiled, (generator, discriminator))
    synced = world.synced(generator), world.synced(discriminator)
    alone = world.size == 1 and options.accumulate == 1
    graphs = options.cuda_graphs and alone and state.device.type == "cuda"
    replayed: dict[str, Replayed] | None = {} if graphs else None
    return Networks(generator, synced[0], discriminator, synced[1], replayed)


def _compiled(network: nn.Module) -> nn.Module:
    # Inductor's attention patterns (PyTorch 2.13, _sfdp_replacement_27) take the windowed attention
    # in 16 bits for one of four dimensions, and fail on its fifth.
    compiled: Any = torch.compile(network, options={"pattern_matcher": False})
    assert isinstance(compiled, nn.Module), "torch.compile makes a module of a module"
    return compiled


@dataclass(frozen=True)
class StepReport:
    """What a step gave, the same in every process.

    Attributes:
        scalars: Means over the step's images by name: ``loss_generator``, ``loss_discriminator``,
            ``perceptual``, ``reconstruction`` and ``r1`` where they were computed, and the
            gradients' norms. While warming up nothing of the discriminator is among them.
        skipped: Whether an update was left out, for a loss or gradient was not finite.
    """

    scalars: dict[str, float]
    skipped: bool


@dataclass(frozen=True)
class _Part:
    """A micro-batch on the device."""

    image: Tensor
    mask: Tensor
    numbers: list[int]
    last: bool


def train_step(
    state: TrainingState,
    networks: Networks,
    batch: Batch,
    *,
    perceptual: Perceptual | None = None,
    world: World | None = None,
) -> StepReport:
    """Update the generator, its average and, once warm, the discriminator; count the step.

    An update whose losses or gradients are not finite in any process is left out in all of them.

    Args:
        state: Changed in place.
        networks: What `prepare` made of it.
        batch: This process's share of the samples.
        perceptual: Distance of outputs from photographs, of weight ``perceptual_weight``.
        world: The run's processes.

    Raises:
        TrainingError: If the batch is not the one of this step, or the device's memory is too
            small for it.
    """
    world = world or World(device=state.device)
    parts = _parts(state, batch, world)
    try:
        report = _updates(state, networks, parts, perceptual, world)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise _too_large(state, world) from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise TrainingError(
                f"torch.compile failed ({str(error).strip().splitlines()[0]}); "
                "--set compile=false trains without it"
            ) from error
        raise
    counters = state.counters
    counters.images += state.options.batch
    counters.steps += 1
    counters.skipped += report.skipped
    counters.skipped_in_row = counters.skipped_in_row + 1 if report.skipped else 0
    return report


def _updates(
    state: TrainingState,
    networks: Networks,
    parts: list[_Part],
    perceptual: Perceptual | None,
    world: World,
) -> StepReport:
    # The generator, against a discriminator that takes no gradients.
    state.discriminator.requires_grad_(False)
    scalars, w = _generator_gradients(state, networks, parts, perceptual)
    scalars, w, finite = _agree(state.generator, "gradient_generator", scalars, w, world)
    _finish(state.generator_adam, finite, state.options.gradient_limit)
    if not finite:
        return StepReport(scalars, skipped=True)
    state.generator.mapping.track_average(w[None], state.options.w_avg_decay)
    state.track_ema(state.counters.images + state.options.batch)
    if _warming_up(state):
        return StepReport(scalars, skipped=False)
    # The discriminator, on fresh fakes of the generator as it is now.
    state.discriminator.requires_grad_(True)
    mine = _discriminator_gradients(state, networks, parts)
    mine, _, finite = _agree(state.discriminator, "gradient_discriminator", mine, w[:0], world)
    _finish(state.discriminator_adam, finite, state.options.gradient_limit)
    return StepReport(scalars | mine, skipped=not finite)


def _warming_up(state: TrainingState) -> bool:
    return state.counters.images < state.options.warm_up


def _finish(optimizer: Adam, finite: bool, limit: float | None) -> None:
    """Take the gradients, if they are finite, and give their memory back."""
    if finite:
        if limit is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_value_(parameters, limit)
        optimizer.step()
    optimizer.zero_grad()


# -- gradients -------------------------------------------------------------------------------------


def _generator_gradients(
    state: TrainingState, networks: Networks, parts: list[_Part], perceptual: Perceptual | None
) -> tuple[dict[str, Any], Tensor]:
    """``∇[E softplus(−D(G)) + λ·perceptual + μ·reconstruction]``, the first once warm.

    Returns the means of the terms, and of w.
    """
    options = state.options
    weights = {} if _warming_up(state) else {"loss_generator": 1.0}
    if perceptual is not None and options.perceptual_weight > 0.0:
        weights["perceptual"] = options.perceptual_weight
    if options.reconstruction_weight > 0.0:
        weights["reconstruction"] = options.reconstruction_weight

    def work(network: nn.Module, image: Tensor, mask: Tensor, *draws: Tensor) -> list[Tensor]:
        with _autocast(state):
            output, coarse, w = _generate(state, network, image, mask, draws)
            terms = []
            if "loss_generator" in weights:
                terms.append(generator_loss(*networks.discriminator(output, coarse, mask)))
            if perceptual is not None and "perceptual" in weights:
                terms.append(perceptual(output, image))
            if "reconstruction" in weights:
                terms.append(reconstruction_loss(output, coarse, image))
            weighted = [weight * term for weight, term in zip(weights.values(), terms, strict=True)]
        (torch.stack(weighted).sum() / len(parts)).backward()  # type: ignore[no-untyped-call]
        return [torch.stack(terms).detach() / len(parts), w.mean(dim=0) / len(parts)]

    results = []
    for part in parts:
        network = networks.generator_synced if part.last else networks.generator
        inputs = (part.image, part.mask, *_draws(state, part, "generator"))
        own = partial(work, network)
        results.append(networks.compute("+".join(weights), state.generator, own, inputs))
    means, w_mean = _sums(results)
    return dict(zip(weights, means, strict=True)), w_mean


def _discriminator_gradients(
    state: TrainingState, networks: Networks, parts: list[_Part]
) -> dict[str, Any]:
    """``∇E[softplus(D(G)) + softplus(−D(x))]``, and in R1's steps ``+ interval·γ/2·∇E[R1]``."""
    options = state.options
    with_r1 = options.r1_gamma > 0.0 and state.counters.steps % options.r1_interval == 0
    weight = lazy_r1_weight(options.r1_gamma, options.r1_interval)

    def work(network: nn.Module, image: Tensor, mask: Tensor, *draws: Tensor) -> list[Tensor]:
        # Fakes.
        with _autocast(state):
            # Compiled, the graph with gradients serves here too: another one takes minutes to make.
            with torch.set_grad_enabled(options.compile):
                output, coarse, _ = _generate(state, networks.generator, image, mask, draws)
            output, coarse = output.detach(), coarse.detach()
            fake = fake_loss(*networks.discriminator(output, coarse, mask))
        (fake / len(parts)).backward()  # type: ignore[no-untyped-call]
        results = []
        # R1, in float32 and by the eager network: it differentiates twice.
        if with_r1:
            penalty, penalty_coarse = gradient_penalty(state.discriminator, image, mask)
            r1 = (penalty + penalty_coarse).mean()
            (weight / len(parts) * r1).backward()  # type: ignore[no-untyped-call]
            results.append(r1.detach() / len(parts))
        # Photographs. Last, as every parameter takes part, and all gradients go out with these.
        with _autocast(state):
            real = real_loss(*network(image, image, mask))
        (real / len(parts)).backward()  # type: ignore[no-untyped-call]
        return [(fake + real).detach() / len(parts), *results]

    names = ["loss_discriminator", "r1"][: 1 + with_r1]
    results = []
    for part in parts:
        network = networks.discriminator_synced if part.last else networks.discriminator
        inputs = (part.image, part.mask, *_draws(state, part, "discriminator"))
        own = partial(work, network)
        results.append(networks.compute("+".join(names), state.discriminator, own, inputs))
    return dict(zip(names, _sums(results), strict=True))


def _sums(results: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Of each result over the micro-batches."""
    return [torch.stack(values).sum(dim=0) for values in zip(*results, strict=True)]


def _draws(state: TrainingState, part: _Part, purpose: str) -> tuple[Tensor, ...]:
    """What `_generate` takes beside pictures."""
    options = state.options
    draws = draw_for_training(
        options.config,
        options.seed,
        purpose,
        part.numbers,
        style_mixing=options.style_mixing,
        device=state.device,
    )
    # Gates are 0 and 1, exact in 16 bits too; a float32 one would make the features float32.
    kind = torch.bfloat16 if options.bf16 else torch.float32
    gates = draws.gate_tokens.to(kind), draws.gate_bottleneck.to(kind)
    return (draws.z, draws.cutoff, *gates, *draws.noise.values())


def _generate(
    state: TrainingState, network: nn.Module, image: Tensor, mask: Tensor, draws: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    z, cutoff, gate_tokens, gate_bottleneck, *maps = draws
    noise = dict(zip(state.options.config.noise_resolutions, maps, strict=True))
    pictures: tuple[Tensor, Tensor, Tensor] = network(
        image, mask, z, cutoff, gate_tokens, gate_bottleneck, noise
    )
    return pictures


def _autocast(state: TrainingState) -> torch.autocast:
    return torch.autocast(state.device.type, torch.bfloat16, enabled=state.options.bf16)


def _agree(
    network: nn.Module, name: str, scalars: dict[str, Any], extra: Tensor, world: World
) -> tuple[dict[str, float], Tensor, bool]:
    """Scalars, with the gradient's norm as `name`, and `extra` averaged over the processes.

    And whether all of them are finite, which every process decides from the same numbers. The one
    place where the host waits for the device.
    """
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    scalars = {**scalars, name: torch.nn.utils.get_total_norm(gradients)}
    values = torch.cat([torch.stack([v.float() for v in scalars.values()]), extra.float()])
    values = world.mean(values)
    numbers = values[: len(scalars)].tolist()
    finite = bool(values.isfinite().all())
    return dict(zip(scalars, numbers, strict=True)), values[len(scalars) :], finite


# -- data ------------------------------------------------------------------------------------------


def _parts(state: TrainingState, batch: Batch, world: World) -> list[_Part]:
    """The batch on the device in micro-batches, images in [-1, 1], checked."""
    options, side = state.options, state.options.config.resolution
    size = options.micro_batch(world.size)
    share = size * options.accumulate
    shapes = {"image": (share, 3, side, side), "mask": (share, 1, side, side), "number": (share,)}
    for name, shape in shapes.items():
        if name not in batch or tuple(batch[name].shape) != shape:
            got = [*batch[name].shape] if name in batch else "none"
            raise TrainingError(f"the data's '{name}' is {got}; this run needs {[*shape]} a step")
    numbers = batch["number"].tolist()
    first = state.counters.images + world.rank
    needed = list(range(first, first + share * world.size, world.size))
    if numbers != needed:
        raise TrainingError(
            f"the data has samples {_listed(numbers)} where the run needs {_listed(needed)}; "
            "make_loader(start, rank, world) must deal them to the processes in turn from start on"
        )
    image, mask = (batch[name].to(state.device, non_blocking=True) for name in ("image", "mask"))
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    parts = options.accumulate
    # Dealt in turn here too: the discriminator's groups stay those of the whole batch.
    return [
        _Part(
            (image[i::parts].float() / 127.5 - 1.0).contiguous(memory_format=layout),
            mask[i::parts].float(),
            numbers[i::parts],
            last=i == parts - 1,
        )
        for i in range(parts)
    ]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:3])) + (f" … {numbers[-1]}" if len(numbers) > 3 else "")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or this machine, had no memory for what was asked."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _too_large(state: TrainingState, world: World) -> TrainingError:
    options, size = state.options, state.options.micro_batch(world.size)

    def smaller(batch: int = options.batch, accumulate: int = options.accumulate) -> bool:
        try:
            changed = replace(options, batch=batch, accumulate=accumulate)
            return changed.micro_batch(world.size) < size
        except TrainingError:
            return False

    advice = []
    if smaller(accumulate=2 * options.accumulate):
        advice.append(f"accumulate={2 * options.accumulate} (the same result)")
    batch = next((b for b in range(options.batch // 2, 0, -1) if smaller(batch=b)), None)
    if batch is not None:
        advice.append(f"batch={batch}")
    wanted = f"try {' or '.join(advice)}" if advice else "train a smaller network"
    return TrainingError(f"{state.device} ran out of memory with {size} images at once; {wanted}")
