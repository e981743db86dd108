"""Timing engines: in turns, on the GPU, as graphs."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
from fake_gpu import FakeBackend, FakeEngine, FakeGpu
from test_engine_runtime import PLAN, inputs_of, launches, use

from engines import cuda
from engines.runtime import Engine
from engines.timing import time_engines
from mat_export.contract import UserError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    fake = use(monkeypatch, FakeGpu())
    yield fake
    gc.collect()
    assert fake.errors == []
    assert not fake.live


def test_engines_take_turns_as_graphs_with_inputs_on_the_gpu(gpu: FakeGpu) -> None:
    inputs = {**inputs_of(), "unread": np.zeros(1, np.float32)}
    with (
        Engine(FakeBackend(FakeEngine(gpu)), PLAN) as one,
        Engine(FakeBackend(FakeEngine(gpu)), PLAN) as other,
    ):
        first, second = time_engines([one, other], inputs, runs=5, warmup=3)
        assert len(first) == len(second) == 5
        assert all(time > 0 for time in (*first, *second))
        captured, launched = launches(gpu)
        assert captured == 2
        assert launched == 2 * (5 + 3 - 1)  # all but each engine's first
        assert gpu.log.count("run") == 2 * (5 + 3)
        assert gpu.log.count("h2d") == len(inputs)
        assert gpu.log.count("d2h") == 0


def test_inputs_that_do_not_fit_are_a_sentence(gpu: FakeGpu) -> None:
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine, pytest.raises(UserError):
        time_engines([engine], inputs_of(batch=64))


def test_an_engine_that_fails_is_no_endless_wait(gpu: FakeGpu) -> None:
    fake = FakeEngine(gpu)
    fake.refuse_runs = True
    with (
        Engine(FakeBackend(fake), PLAN) as engine,
        pytest.raises((RuntimeError, cuda.CudaError)),
    ):
        time_engines([engine], inputs_of())
