"""Two processes with half of the batch each train as one with the whole, and decide alike."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from training_data import Loaders, batch_of, l1, options, seasoned_state

from mat_torch.distributed import World, join_world
from mat_torch.training import train
from mat_torch.training_options import TrainingError
from mat_torch.training_state import TrainingState, latest_checkpoint, load_state
from mat_torch.training_step import prepare, train_step

_WORLD = 2
_SETTINGS = options(batch=16, accumulate=2, perceptual_weight=0.1, r1_interval=1)
_RUN = options(batch=8, images=16, checkpoint_every=8, log_every=8, grid_every=16, grid_images=2)


def _gradients_of_a_step(state: TrainingState, world: World) -> dict[str, Tensor]:
    """The gradients that the optimizers meet, by name."""
    found: dict[str, Tensor] = {}
    for network, optimizer in (
        (state.generator, state.generator_adam),
        (state.discriminator, state.discriminator_adam),
    ):

        def note(*_: Any, network: torch.nn.Module = network) -> None:
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None, name
                found[f"{type(network).__name__}.{name}"] = parameter.grad.clone()

        optimizer.register_step_pre_hook(note)
    batch = batch_of(list(range(world.rank, 16, world.size)))
    report = train_step(state, prepare(state, world), batch, perceptual=l1, world=world)
    return {**found, **{k: torch.tensor(v) for k, v in report.scalars.items()}}


def _poisoned_step(world: World) -> dict[str, Any]:
    """A step whose loss is not finite in the second process alone."""
    state = seasoned_state(_SETTINGS)
    before = state.generator.mapping.get_parameter("fc0.weight").clone()

    def perceptual(output: Tensor, image: Tensor) -> Tensor:
        return l1(output, image) * (float("inf") if world.rank == 1 else 1.0)

    batch = batch_of(list(range(world.rank, 16, world.size)))
    report = train_step(state, prepare(state, world), batch, perceptual=perceptual, world=world)
    unchanged = torch.equal(before, state.generator.mapping.get_parameter("fc0.weight"))
    return {"skipped": report.skipped, "unchanged": unchanged, "count": state.counters.skipped}


def _process(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(_WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with join_world() as world:
        state = seasoned_state(_SETTINGS)
        gradients = _gradients_of_a_step(state, world)
        poisoned = _poisoned_step(world)
    os.environ["MASTER_PORT"] = str(port + 1)
    run = train(_RUN, Loaders(8), folder / "run")
    results = {
        "gradients": gradients,
        "weights": {**state.generator.state_dict(), **state.discriminator.state_dict()},
        "poisoned": poisoned,
        "run": run.ema.state_dict(),
    }
    torch.save(results, folder / f"{rank}.pt")


def _free_port() -> int:
    """A port such that it and the next are free."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """What each of two processes found, and the folder of their run."""
    folder = tmp_path_factory.mktemp("ddp")
    spawn(_process, args=(_free_port(), folder), nprocs=_WORLD)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt") for rank in range(_WORLD)], folder / "run"


def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(
    ranks: tuple[list[dict[str, Any]], Path],
) -> None:
    """With R1, the perceptual loss, two micro-batches each, and the groups of four."""
    expected = _gradients_of_a_step(seasoned_state(_SETTINGS), World())
    found = ranks[0][0]["gradients"]
    assert found.keys() == expected.keys()
    for kind in ("Generator", "Discriminator"):
        names = [name for name in expected if name.startswith(kind)]
        assert len(names) > 50
        whole = torch.stack([expected[name].norm() for name in names]).norm()
        error = torch.stack([(found[name] - expected[name]).norm() for name in names]).norm()
        assert float(error / whole) <= 1e-5, kind
        for name in names:
            if name.endswith("attn.k.bias"):
                continue  # rounding alone: softmax does not see them
            error = (found[name] - expected[name]).norm()
            assert float(error / expected[name].norm().clamp(min=1e-3 * whole)) <= 2e-4, name
    for name in ("loss_generator", "loss_discriminator", "perceptual", "r1"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=0.0)


def test_all_processes_hold_the_same_bits(ranks: tuple[list[dict[str, Any]], Path]) -> None:
    first, second = ranks[0]
    for what in ("gradients", "weights", "run"):
        assert first[what].keys() == second[what].keys()
        assert all(torch.equal(first[what][name], second[what][name]) for name in first[what])


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(
    ranks: tuple[list[dict[str, Any]], Path],
) -> None:
    for rank in ranks[0]:
        assert rank["poisoned"] == {"skipped": True, "unchanged": True, "count": 1}


def test_the_first_process_writes_and_one_process_can_go_on(
    ranks: tuple[list[dict[str, Any]], Path],
) -> None:
    results, folder = ranks
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2
    assert len(list((folder / "grids").iterdir())) == 1
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    state = TrainingState.start(_RUN)
    load_state(state, newest)
    assert state.counters.images == 16
    for name, tensor in state.ema.state_dict().items():
        assert torch.equal(tensor, results[0]["run"][name])


def test_incomplete_variables_of_the_launcher_are_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(TrainingError, match="RANK, MASTER_ADDR, MASTER_PORT not set; start with to"),
        join_world(),
    ):
        pass


def test_a_batch_that_does_not_divide_by_the_processes_is_a_sentence() -> None:
    assert options(batch=32, accumulate=2).micro_batch(4) == 4
    with pytest.raises(TrainingError, match="a batch of 32 does not divide into 16 parts"):
        options(batch=32, accumulate=2).micro_batch(8)
