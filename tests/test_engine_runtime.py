"""The TensorRT runtime on the GPU of paper: right results, and nothing undefined on the way."""

from __future__ import annotations

import concurrent.futures
import gc
import importlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu import (
    LARGE,
    SMALL,
    TENSORS,
    CudaArray,
    DlpackArray,
    FakeBackend,
    FakeContext,
    FakeEngine,
    FakeGpu,
    FakeTensor,
    Status,
    expected,
)
from numpy.typing import NDArray

from engines import cuda
from engines.arrays import DeviceArray, as_device_array, as_host_array, read_capsule
from engines.backend.messages import logger_of
from engines.papers import OpenedPlan
from engines.runner import EngineRunner
from engines.runtime import Engine
from mat_export.contract import GraphSpec, RunError, UserError
from mat_export.runners import Runner
from mat_torch import preset

Arrays = dict[str, NDArray[Any]]
PLAN = b"plan"


def use(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> FakeGpu:
    monkeypatch.setattr(cuda, "cudart", lambda: gpu)
    return gpu


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    fake = use(monkeypatch, FakeGpu())
    yield fake
    gc.collect()  # what is released late is released to this GPU
    assert fake.errors == []


def inputs_of(batch: int = 1, side: int = 8, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.uniform(-1, 1, (batch, 3, side, side)).astype(np.float32),
        "z": rng.standard_normal((batch, 4)).astype(np.float32),
        "truncation": rng.uniform(0, 2, 1).astype(np.float32),
    }


def assert_right(results: Mapping[str, NDArray[Any]], inputs: Mapping[str, NDArray[Any]]) -> None:
    wanted = expected(inputs)
    assert set(results) == set(wanted)
    for name, value in wanted.items():
        assert results[name].dtype == value.dtype
        np.testing.assert_array_equal(results[name], value)


def launches(gpu: FakeGpu) -> tuple[int, int]:
    """Graphs captured and graphs launched so far."""
    return gpu.calls["cudaStreamBeginCapture"], gpu.calls["cudaGraphLaunch"]


def on_gpu(gpu: FakeGpu, arrays: Mapping[str, NDArray[Any]], stream: int) -> dict[str, CudaArray]:
    return {name: CudaArray(gpu, value, stream) for name, value in arrays.items()}


def empty_outputs(
    gpu: FakeGpu, inputs: Mapping[str, NDArray[Any]], stream: int
) -> dict[str, CudaArray]:
    zeros = {name: np.zeros_like(value) for name, value in expected(inputs).items()}
    return on_gpu(gpu, zeros, stream)


def read(gpu: FakeGpu, results: Mapping[str, DeviceArray], stream: int) -> Arrays:
    """What enqueue gave, as another library reads it, once the stream is done."""
    gpu.cudaStreamSynchronize(stream)
    found = {}
    for name, result in results.items():
        interface = result.__cuda_array_interface__
        assert interface["strides"] is None
        view = gpu.view(interface["data"][0], interface["shape"], interface["typestr"], 2)
        found[name] = view.copy()
    return found


# -- run -------------------------------------------------------------------------------------------


def test_run_gives_what_the_engine_computes(gpu: FakeGpu) -> None:
    backend = FakeBackend(FakeEngine(gpu))
    with Engine(backend, PLAN) as engine:
        assert [(t.name, t.mode) for t in engine.tensors] == [
            (t.name, t.mode.lower()) for t in TENSORS
        ]
        assert engine.tensors[0].shape == (-1, 3, -1, -1)
        assert engine.tensors[-1].dtype == np.uint8
        for seed, (batch, side) in enumerate([(1, 8), (2, 16), (8, 64), (1, 4), (1, 8), (3, 9)]):
            inputs = inputs_of(batch, side, seed)
            assert_right(engine.run(inputs), inputs)
    assert backend.deserialized == 1


def test_results_are_the_callers_own(gpu: FakeGpu) -> None:
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        first, second = inputs_of(seed=1), inputs_of(seed=2)
        kept = engine.run(first)
        other = engine.run(second)
        other["output"][...] = 0
        assert_right(kept, first)
        assert_right(engine.run(second), second)
    assert_right(kept, first)


def test_inputs_may_lie_in_memory_as_they_like(gpu: FakeGpu) -> None:
    plain = inputs_of(2, 8)
    odd = {
        "image": np.asfortranarray(plain["image"]),
        "z": np.repeat(plain["z"], 2, axis=0)[::2],
        "truncation": plain["truncation"].copy(),
    }
    odd["truncation"].flags.writeable = False
    assert not odd["image"].flags.c_contiguous
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        assert_right(engine.run(odd), plain)


def test_torch_tensors_on_the_host_are_inputs_too(gpu: FakeGpu) -> None:
    inputs = inputs_of(2, 8)
    tensors: Any = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        assert_right(engine.run(tensors), inputs)
        stream = gpu.new_stream()
        assert_right(read(gpu, engine.enqueue(tensors, stream=stream), stream), inputs)


def test_an_engine_of_fixed_shapes_needs_no_profile(gpu: FakeGpu) -> None:
    fixed = {"image": (2, 3, 8, 8), "z": (2, 4), "output": (2, 3, 8, 8)}
    tensors = [
        FakeTensor(**{**vars(t), "shape": fixed.get(t.name, t.shape)})
        for t in TENSORS
        if t.name != "coarse"
    ]
    fake = FakeEngine(gpu, tensors, profiles=({},), sharing=False, modern=False)
    with Engine(FakeBackend(fake), PLAN, contexts=2) as engine:
        inputs = inputs_of(2, 8)
        results = engine.run(inputs)
        np.testing.assert_array_equal(results["output"], expected(inputs)["output"])
        with pytest.raises(UserError, match=r"'image' has shape \[1, 3, 8, 8\].* \[2, 3, 8, 8\]:"):
            engine.run({**inputs, "image": inputs["image"][:1]})


# -- graphs ----------------------------------------------------------------------------------------


def test_a_graph_is_captured_once_and_replays_the_same_bits(gpu: FakeGpu) -> None:
    inputs = inputs_of()
    fake = FakeEngine(gpu)
    with Engine(FakeBackend(fake), PLAN, contexts=3) as engine:
        plain = engine.run(inputs)
        assert launches(gpu) == (1, 0)
        assert gpu.log.count("graph") == 0
        for count in range(1, 5):
            replayed = engine.run(inputs)
            assert launches(gpu) == (1, count)
            for name, value in plain.items():
                assert replayed[name].tobytes() == value.tobytes()
        assert len(fake.contexts) == 1  # the others would be of no use
        fresh = inputs_of(seed=7)
        assert_right(engine.run(fresh), fresh)
        assert gpu.log.count("graph") == 5
        assert gpu.calls["cudaGraphUpload"] == 1
        assert engine.graphs


def test_each_shape_keeps_its_graph_where_contexts_suffice(gpu: FakeGpu) -> None:
    shapes = [(1, 8), (2, 16), (1, 4)]
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN, contexts=3) as engine:
        for round_ in range(4):
            for batch, side in shapes:
                inputs = inputs_of(batch, side, round_)
                assert_right(engine.run(inputs), inputs)
        assert launches(gpu) == (3, 9)


def test_shapes_that_take_turns_on_one_context_do_without_graphs(gpu: FakeGpu) -> None:
    small, large = inputs_of(1, 8), inputs_of(2, 16)
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        for inputs in (small, large):
            engine.run(inputs)
        assert launches(gpu) == (2, 0)
        for inputs in (small, large, small, large):
            assert_right(engine.run(inputs), inputs)
        assert launches(gpu) == (2, 0)
        for _ in range(3):  # the last was large already
            assert_right(engine.run(large), large)
        assert launches(gpu) == (3, 3)
        assert gpu.live["graphs"] == 1


def test_graphs_can_be_turned_off(gpu: FakeGpu) -> None:
    inputs = inputs_of()
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN, graphs=False) as engine:
        for _ in range(3):
            assert_right(engine.run(inputs), inputs)
        assert launches(gpu) == (0, 0)
        assert engine.graphs_refused is None


def _fails(gpu: FakeGpu, fake: FakeEngine, where: str) -> None:
    if where == "TensorRT":
        fake.refuse_capture = True
    else:
        gpu.failures[where] = itertools.repeat(Status.cudaErrorMemoryAllocation)


@pytest.mark.parametrize(
    "where", ["cudaStreamBeginCapture", "cudaGraphInstantiate", "cudaGraphUpload", "TensorRT"]
)
def test_where_a_capture_fails_the_engine_goes_on_without(gpu: FakeGpu, where: str) -> None:
    fake = FakeEngine(gpu)
    with Engine(FakeBackend(fake), PLAN) as engine:
        _fails(gpu, fake, where)
        for seed in range(3):
            inputs = inputs_of(seed=seed)
            assert_right(engine.run(inputs), inputs)
        assert not engine.graphs
        assert ("TensorRT" if where == "TensorRT" else where) in str(engine.graphs_refused)
        assert launches(gpu) == (1, 0)
        gc.collect()
        assert "graphs" not in gpu.live


def test_a_capture_that_fails_in_enqueue_costs_no_result(gpu: FakeGpu) -> None:
    fake = FakeEngine(gpu)
    fake.refuse_capture = True
    stream, inputs = gpu.new_stream(), inputs_of()
    with Engine(FakeBackend(fake), PLAN) as engine:
        for _ in range(3):
            assert_right(read(gpu, engine.enqueue(inputs, stream=stream), stream), inputs)
        assert launches(gpu) == (1, 0)
        assert not engine.graphs


def test_a_context_that_is_not_ready_to_be_captured_is_asked_again(gpu: FakeGpu) -> None:
    fake = FakeEngine(gpu)
    fake.runs_before_capturable = 3
    inputs = inputs_of()
    with Engine(FakeBackend(fake), PLAN) as engine:
        for _ in range(5):
            assert_right(engine.run(inputs), inputs)
        assert launches(gpu) == (1, 2)
        assert engine.graphs


# -- memory ----------------------------------------------------------------------------------------


def test_nothing_is_allocated_after_the_first_call_of_a_shape(gpu: FakeGpu) -> None:
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        for batch, side in [(1, 8), (2, 16)]:
            engine.run(inputs_of(batch, side))
        before, made = gpu.allocated, gpu.live
        captures = gpu.calls["cudaGraphInstantiate"]
        for seed in range(3):
            engine.run(inputs_of(2, 16, seed))
        assert gpu.calls["cudaGraphInstantiate"] == captures
        for batch, side in [(1, 8), (2, 16), (1, 4)]:  # the last is new, and smaller
            inputs = inputs_of(batch, side)
            assert_right(engine.run(inputs), inputs)
        assert gpu.allocated == before
        assert gpu.live == made


def test_enqueue_allocates_nothing_the_second_time_either(gpu: FakeGpu) -> None:
    stream = gpu.new_stream()
    inputs = inputs_of()
    arrays: dict[str, Any] = dict(on_gpu(gpu, inputs, stream))
    arrays["z"] = inputs["z"]  # staged
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        engine.enqueue(arrays, stream=stream)
        before = gpu.allocated
        for _ in range(3):
            assert_right(read(gpu, engine.enqueue(arrays, stream=stream), stream), inputs)
        assert gpu.allocated == before


def test_closing_releases_everything(gpu: FakeGpu) -> None:
    stream = gpu.new_stream()
    own = gpu.live
    fake = FakeEngine(gpu)
    engine = Engine(FakeBackend(fake), PLAN, contexts=2)
    for batch, side in [(1, 8), (2, 16), (1, 8), (2, 16)]:
        engine.run(inputs_of(batch, side))
    engine.enqueue(inputs_of(), stream=stream)
    assert gpu.live["graphs"] == 2
    engine.close()
    assert gpu.live == own
    assert len(fake.contexts) == 0
    engine.close()


def test_an_engine_that_is_never_closed_is_released_when_collected(gpu: FakeGpu) -> None:
    engine = Engine(FakeBackend(FakeEngine(gpu)), PLAN)
    engine.run(inputs_of())
    del engine
    gc.collect()
    assert gpu.live == {}


def test_a_closed_engine_is_not_run(gpu: FakeGpu) -> None:
    stream = gpu.new_stream()
    engine = Engine(FakeBackend(FakeEngine(gpu)), PLAN)
    result = engine.enqueue(inputs_of(), stream=stream)["output"]
    engine.close()
    with pytest.raises(RuntimeError, match="was closed"):
        engine.run(inputs_of())
    with pytest.raises(RuntimeError, match="was closed"):
        engine.enqueue(inputs_of(), stream=stream)
    with pytest.raises(RuntimeError, match="released"):
        _ = result.__cuda_array_interface__


def test_closing_waits_for_work_on_the_callers_stream(gpu: FakeGpu) -> None:
    stream, inputs = gpu.new_stream(), inputs_of()
    outputs = empty_outputs(gpu, inputs, stream)
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        engine.enqueue(inputs, outputs, stream=stream)
    assert_right({name: output.view for name, output in outputs.items()}, inputs)


@pytest.mark.usefixtures("gpu")
def test_too_little_memory_for_buffers_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = use(monkeypatch, FakeGpu(memory=1 << 20))
    with Engine(FakeBackend(FakeEngine(gpu), context_bytes=1 << 19), PLAN) as engine:
        small, huge = inputs_of(1, 8), inputs_of(8, 64)
        engine.run(small)
        for _ in range(2):
            with pytest.raises(UserError, match=r"0\.4 MiB are needed and 0\.1 MiB are free; clo"):
                engine.run(huge)
        assert_right(engine.run(small), small)
        assert_right(engine.run(small), small)
    assert gpu.errors == []
    assert gpu.live == {}


def test_no_memory_to_pin_is_a_users_error(gpu: FakeGpu) -> None:
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        gpu.failures["cudaHostAlloc"] = iter([Status.cudaErrorMemoryAllocation])
        with pytest.raises(UserError, match=r"pins no further 0\.0 MiB"):
            engine.run(inputs_of())
        inputs = inputs_of()
        assert_right(engine.run(inputs), inputs)


@pytest.mark.usefixtures("gpu")
def test_too_little_memory_for_a_context_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = use(monkeypatch, FakeGpu(memory=1 << 20))
    with pytest.raises(UserError, match=r"no context .* needs 2\.0 MiB .* 1\.0 MiB are free"):
        Engine(FakeBackend(FakeEngine(gpu), context_bytes=2 << 20), PLAN)
    gc.collect()
    assert gpu.live == {}


def test_another_failure_of_cuda_is_no_users_error(gpu: FakeGpu) -> None:
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        gpu.failures["cudaMalloc"] = iter([Status.cudaErrorLaunchFailure])
        with pytest.raises(cuda.CudaError, match=r"cudaMalloc failed: text of 719 \(cudaError"):
            engine.run(inputs_of())
        gpu.failures["cudaHostAlloc"] = iter([Status.cudaErrorLaunchFailure])
        with pytest.raises(cuda.CudaError, match="cudaHostAlloc"):
            engine.run(inputs_of())


# -- shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "side", "profile"),
    [(1, 4, 0), (8, 64, 1), (1, 8, 0), (2, 16, 0), (4, 16, 1), (1, 32, 1)],
)
def test_the_profile_is_the_one_tuned_nearest_to_the_shape(
    gpu: FakeGpu, batch: int, side: int, profile: int
) -> None:
    fake = FakeEngine(gpu)
    with Engine(FakeBackend(fake), PLAN) as engine:
        inputs = inputs_of(batch, side)
        assert_right(engine.run(inputs), inputs)
        assert [context.profile for context in fake.contexts] == [profile]


def test_of_profiles_that_both_fit_the_nearer_is_taken(gpu: FakeGpu) -> None:
    wide = {"image": ((1, 3, 4, 4), (2, 3, 16, 16), (8, 3, 64, 64)), "z": ((1, 4), (2, 4), (8, 4))}
    fake = FakeEngine(gpu, profiles=(wide, LARGE))
    with Engine(FakeBackend(fake), PLAN) as engine:
        for side, profile in [(16, 0), (32, 1), (8, 0), (64, 1)]:
            engine.run(inputs_of(4, side))
            assert [context.profile for context in fake.contexts] == [profile]


def test_a_shape_outside_every_profile_is_named_with_the_ranges(gpu: FakeGpu) -> None:
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        with pytest.raises(UserError) as caught:
            engine.run(inputs_of(9, 8))
        assert str(caught.value) == (
            "input 'image' has shape [9, 3, 8, 8] and the engine was built for "
            "[1, 3, 4, 4] to [2, 3, 16, 16] or [1, 3, 8, 8] to [8, 3, 64, 64]: "
            "give such a shape, or build an engine for yours"
        )
        with pytest.raises(UserError, match=r"do not go together: .*'z' \[1, 4\] to \[2, 4\]; "):
            engine.run({**inputs_of(1, 4), "z": np.zeros((8, 4), np.float32)})


@pytest.mark.parametrize("modern", [True, False])
def test_shapes_that_contradict_each_other_are_a_users_error(gpu: FakeGpu, modern: bool) -> None:
    with Engine(FakeBackend(FakeEngine(gpu, modern=modern)), PLAN) as engine:
        inputs = inputs_of(2, 8)
        assert_right(engine.run(inputs), inputs)
        with pytest.raises(UserError, match=r"'image' \[2, 3, 8, 8\], 'z' \[1, 4\].* go together"):
            engine.run({**inputs, "z": inputs["z"][:1]})
        assert_right(engine.run(inputs), inputs)


def test_outputs_whose_shapes_tensorrt_cannot_tell_are_refused(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeContext, "get_tensor_shape", lambda self, name: [2, -1])
    with (
        Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine,
        pytest.raises(UserError, match="TensorRT finds no outputs for them"),
    ):
        engine.run(inputs_of())


def _without(inputs: Arrays) -> Arrays:
    return {name: value for name, value in inputs.items() if name != "z"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, "input 'z' is missing; the engine takes image, z, truncation"),
        (lambda i: {**i, "noise": i["z"]}, "no input 'noise'; it takes image, z, truncation"),
        (
            lambda i: {**i, "z": i["z"].astype(np.float64)},
            r"'z' is float64 \[1, 4\], the engine takes float32 \[1, 4\] to \[2, 4\] or",
        ),
        (lambda i: {**i, "z": i["z"].astype(">f4")}, r"'z' is >f4 \[1, 4\]"),
        (lambda i: {**i, "z": i["z"][0]}, r"'z' is float32 \[4\], the engine takes float32 \[1, 4"),
        (lambda i: {**i, "z": [1.0]}, "input 'z' is a list: give a NumPy array"),
        (lambda i: {**i, "z": np.float32(1)}, "input 'z' is a float32: give a NumPy array"),
    ],
)
def test_a_wrong_input_is_named(
    gpu: FakeGpu, change: Callable[[Arrays], Any], message: str
) -> None:
    stream = gpu.new_stream()
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        wrong = change(inputs_of())
        with pytest.raises(UserError, match=message):
            engine.run(wrong)
        with pytest.raises(UserError, match=message):
            engine.enqueue(wrong, stream=stream)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("HALF", "float16"),
        ("BOOL", "bool"),
        ("INT32", "int32"),
        ("INT64", "int64"),
        ("INT8", "int8"),
    ],
)
def test_types_of_tensors_are_numpys(gpu: FakeGpu, theirs: str, ours: str) -> None:
    tensors = [*TENSORS, FakeTensor(name="extra", mode="OUTPUT", dtype=theirs, shape=(1,))]
    with Engine(FakeBackend(FakeEngine(gpu, tensors)), PLAN) as engine:
        assert engine.tensors[-1].dtype == np.dtype(ours)


def test_bfloat16_is_that_of_ml_dtypes(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [*TENSORS, FakeTensor(name="extra", mode="OUTPUT", dtype="BF16", shape=(1,))]
    with Engine(FakeBackend(FakeEngine(gpu, tensors)), PLAN) as engine:
        assert str(engine.tensors[-1].dtype) == "bfloat16"
        assert engine.tensors[-1].dtype.itemsize == 2
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(UserError, match="pip install ml_dtypes"):
        Engine(FakeBackend(FakeEngine(gpu, tensors)), PLAN)


def test_a_type_without_counterpart_is_refused(gpu: FakeGpu) -> None:
    tensors = [*TENSORS, FakeTensor(name="extra", mode="OUTPUT", dtype="FP8", shape=(1,))]
    with pytest.raises(UserError, match="'extra' is of type FP8"):
        Engine(FakeBackend(FakeEngine(gpu, tensors)), PLAN)


def test_a_plan_that_tensorrt_refuses_is_a_users_error(gpu: FakeGpu) -> None:
    with pytest.raises(UserError, match="does not load"):
        Engine(FakeBackend(FakeEngine(gpu)), b"broken")
    with pytest.raises(UserError, match="at least one context, got 0"):
        Engine(FakeBackend(FakeEngine(gpu)), PLAN, contexts=0)


def test_an_execution_that_tensorrt_refuses_is_an_error(gpu: FakeGpu) -> None:
    fake = FakeEngine(gpu)
    backend = FakeBackend(fake)
    with Engine(backend, PLAN) as engine:
        fake.refuse_runs = True
        error = backend.module.ILogger.Severity.ERROR  # as TensorRT or a plugin says it
        logger_of(backend.module).log(error, "MaskPropagation: no kernel\n for sm_89")
        for reason in ("MaskPropagation: no kernel for sm_89", "it gave no reason"):
            with pytest.raises(RunError, match=f"TensorRT refused to run the engine: {reason}$"):
                engine.run(inputs_of())
        fake.refuse_runs = False
        inputs = inputs_of(seed=3)
        assert_right(engine.run(inputs), inputs)


# -- threads and contexts --------------------------------------------------------------------------


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Let threads do some work at the same time; the first failure is raised."""
    start = threading.Barrier(count)

    def wait_and_work(index: int) -> None:
        start.wait(10)
        work(index)

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(wait_and_work, index) for index in range(count)]:
            future.result(60)


SIZES = [(1, 8), (2, 16), (1, 4), (8, 64)]


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("contexts", [1, 3])
def test_many_threads_get_right_results(gpu: FakeGpu, contexts: int, sharing: bool) -> None:
    fake = FakeEngine(gpu, sharing=sharing, modern=sharing)

    def work(index: int) -> None:
        for turn in range(25):
            inputs = inputs_of(*SIZES[(index + turn // 5) % len(SIZES)], seed=100 * index + turn)
            assert_right(engine.run(inputs), inputs)

    with Engine(FakeBackend(fake), PLAN, contexts=contexts) as engine:
        in_threads(8, work)
        if contexts > 1:
            assert len(fake.contexts) > 1
        most = contexts if sharing else min(contexts, len(fake.profiles))
        assert len(fake.contexts) <= most
        assert (engine.contexts_refused is None) == (most == contexts)
        assert gpu.live.get("graphs", 0) <= contexts


@pytest.mark.parametrize("contexts", [1, 3])
def test_threads_may_mix_run_and_enqueue(gpu: FakeGpu, contexts: int) -> None:
    fake = FakeEngine(gpu)

    def work(index: int) -> None:
        stream = gpu.new_stream()
        inputs = inputs_of(*SIZES[index % 3], seed=index)
        outputs = empty_outputs(gpu, inputs, stream)
        arrays = on_gpu(gpu, inputs, stream)
        for turn in range(12):
            fresh = inputs_of(*SIZES[index % 3], seed=1000 * index + turn)
            if index % 2:
                assert_right(engine.run(fresh), fresh)
            else:
                for name, array in arrays.items():
                    array.fill(fresh[name], stream)
                assert_right(
                    read(gpu, engine.enqueue(arrays, outputs, stream=stream), stream), fresh
                )

    with Engine(FakeBackend(fake), PLAN, contexts=contexts) as engine:
        in_threads(6, work)


def test_contexts_that_cannot_be_made_are_done_without(gpu: FakeGpu) -> None:
    fake = FakeEngine(gpu)

    def work(index: int) -> None:
        inputs = inputs_of(*SIZES[index % 4], seed=index)
        for _ in range(5):
            assert_right(engine.run(inputs), inputs)

    with Engine(FakeBackend(fake, most=1), PLAN, contexts=4) as engine:
        in_threads(4, work)
        assert len(fake.contexts) == 1
        assert "no context" in str(engine.contexts_refused)
        assert "MiB are free" in str(engine.contexts_refused)


def test_a_context_keeps_its_profile_while_another_has_the_wanted_one(gpu: FakeGpu) -> None:
    fake = FakeEngine(gpu)
    with Engine(FakeBackend(fake), PLAN, contexts=2) as engine:
        for batch, side in [(1, 4), (8, 64), (8, 32)]:
            engine.run(inputs_of(batch, side))
        assert sorted(context.profile for context in fake.contexts) == [0, 1]


def test_a_context_keeps_its_shapes_while_another_has_the_wanted_ones(gpu: FakeGpu) -> None:
    fake, stream = FakeEngine(gpu), gpu.new_stream()
    with Engine(FakeBackend(fake), PLAN, contexts=2) as engine:
        for batch, side in [(1, 4), (1, 8)]:
            engine.run(inputs_of(batch, side))
        engine.enqueue(on_gpu(gpu, inputs_of(1, 8), stream), stream=stream)
        sides = sorted(context.shapes["image"][-1] for context in fake.contexts)
        assert sides == [4, 8]


def test_a_profile_that_contexts_cannot_share_stays_with_one(gpu: FakeGpu) -> None:
    fake = FakeEngine(gpu, sharing=False, modern=False)
    with Engine(FakeBackend(fake), PLAN, contexts=3) as engine:
        for batch, side in [(1, 8), (2, 16), (8, 64), (1, 4), (8, 32), (1, 8), (8, 64)]:
            inputs = inputs_of(batch, side)
            assert_right(engine.run(inputs), inputs)
        held = sorted(context.profile for context in fake.contexts if context.runs)
        assert held == [0, 1]


def test_contexts_that_can_get_no_profile_are_released(gpu: FakeGpu) -> None:
    fake = FakeEngine(gpu, profiles=(SMALL,), sharing=False, modern=False)
    backend = FakeBackend(fake)

    def work(index: int) -> None:
        inputs = inputs_of(1, 4 + index)
        for _ in range(5):
            assert_right(engine.run(inputs), inputs)

    with Engine(backend, PLAN, contexts=4) as engine:
        made = gpu.live
        in_threads(4, work)
        assert len(fake.contexts) == 1
        assert gpu.live["streams"] == made["streams"]
        assert str(engine.contexts_refused).endswith("and the engine has 1")


def test_a_profile_that_tensorrt_never_gives_is_an_error(gpu: FakeGpu) -> None:
    fake = FakeEngine(gpu, sharing=False)
    foreign = FakeBackend(fake).create_context(fake)  # not of the pool, and holds profile 0
    with Engine(FakeBackend(fake), PLAN, contexts=2) as engine:
        with pytest.raises(RuntimeError, match="refused optimization profile 0"):
            engine.run(inputs_of(1, 4))
        inputs = inputs_of(8, 64)
        assert_right(engine.run(inputs), inputs)
    del foreign


def test_closing_turns_away_callers_that_wait(gpu: FakeGpu) -> None:
    fake = FakeEngine(gpu)
    engine = Engine(FakeBackend(fake), PLAN)
    inside, leave = threading.Event(), threading.Event()
    results: list[Arrays] = []
    errors: list[BaseException] = []
    held = inputs_of(seed=1)

    class Slow:
        """An input that stops its caller while he has the context."""

        def __init__(self) -> None:
            self.context = next(iter(fake.contexts))
            self.execute = self.context.execute_async_v3

        def __call__(self, stream: int) -> bool:
            inside.set()
            assert leave.wait(10)
            return self.execute(stream)

    def run_first() -> None:
        results.append(engine.run(held))

    def run_second() -> None:
        try:
            engine.run(inputs_of())
        except RuntimeError as error:
            errors.append(error)

    slow: Any = Slow()
    slow.context.execute_async_v3 = slow
    threads = [threading.Thread(target=run_first)]
    threads[0].start()
    assert inside.wait(10)
    threads += [threading.Thread(target=run_second), threading.Thread(target=engine.close)]
    threads[1].start()
    threads[2].start()
    threads[1].join(10)
    assert not threads[1].is_alive()
    assert [str(error) for error in errors] == ["this engine was closed"]
    assert threads[2].is_alive()  # it waits for the first
    leave.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert_right(results[0], held)
    del slow
    gc.collect()
    assert gpu.live == {}


def test_closing_waits_for_a_context_that_is_being_made(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FakeBackend(FakeEngine(gpu))
    engine = Engine(backend, PLAN, contexts=2)
    engine.run(inputs_of(1, 8))
    making, leave = threading.Event(), threading.Event()
    make = backend.create_context

    def create_context(fake: FakeEngine) -> Any:
        making.set()
        assert leave.wait(10)
        return make(fake)

    monkeypatch.setattr(backend, "create_context", create_context)
    with ThreadPoolExecutor(2) as pool:
        caller = pool.submit(engine.run, inputs_of(2, 16))
        assert making.wait(10)
        closing = pool.submit(engine.close)
        with pytest.raises(concurrent.futures.TimeoutError):
            closing.result(0.05)
        leave.set()
        closing.result(10)
        with pytest.raises(RuntimeError, match="was closed"):
            caller.result(10)
    assert gpu.live == {}


# -- enqueue ---------------------------------------------------------------------------------------


def test_enqueue_reads_and_writes_arrays_where_they_lie(gpu: FakeGpu) -> None:
    stream = gpu.new_stream()
    inputs = inputs_of(2, 8)
    arrays, outputs = on_gpu(gpu, inputs, stream), empty_outputs(gpu, inputs, stream)
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        results = engine.enqueue(arrays, outputs, stream=stream)
        assert "run" not in gpu.log  # it returned before the work was done
        assert_right(read(gpu, results, stream), inputs)
        for name, output in outputs.items():
            assert results[name].pointer == output.pointer
            assert results[name].owner is output
            assert results[name].__cuda_array_interface__["stream"] == stream
            np.testing.assert_array_equal(output.view, expected(inputs)[name])
        assert gpu.log == ["run"]


def test_enqueue_replays_a_graph_when_the_same_buffers_come_again(gpu: FakeGpu) -> None:
    stream = gpu.new_stream()
    first = inputs_of(2, 8)
    arrays, outputs = on_gpu(gpu, first, stream), empty_outputs(gpu, first, stream)
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        for seed in range(4):
            inputs = inputs_of(2, 8, seed)
            for name, array in arrays.items():
                array.fill(inputs[name], stream)
            assert_right(read(gpu, engine.enqueue(arrays, outputs, stream=stream), stream), inputs)
        assert launches(gpu) == (1, 3)
        assert set(gpu.log) == {"run", "graph"}
        waits = gpu.calls["cudaEventSynchronize"]
        for _ in range(3):
            engine.enqueue(arrays, outputs, stream=stream)
        assert gpu.calls["cudaEventSynchronize"] == waits


def test_a_graph_is_not_used_for_other_buffers(gpu: FakeGpu) -> None:
    stream = gpu.new_stream()
    inputs, others = inputs_of(seed=1), inputs_of(seed=2)
    mine, theirs = on_gpu(gpu, inputs, stream), on_gpu(gpu, others, stream)
    outputs = empty_outputs(gpu, inputs, stream)
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        for arrays, values in [(mine, inputs)] * 3 + [(theirs, others), (mine, inputs)]:
            assert_right(read(gpu, engine.enqueue(arrays, outputs, stream=stream), stream), values)
        assert launches(gpu) == (1, 2)


def test_two_sets_of_buffers_keep_their_graphs_in_two_contexts(gpu: FakeGpu) -> None:
    stream = gpu.new_stream()
    inputs, others = inputs_of(seed=1), inputs_of(seed=2)
    sets = [(on_gpu(gpu, values, stream), values) for values in (inputs, others)]
    outputs = empty_outputs(gpu, inputs, stream)
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN, contexts=2) as engine:
        for index in (0, 1, 0, 1, 1, 0, 0, 1):
            arrays, values = sets[index]
            assert_right(read(gpu, engine.enqueue(arrays, outputs, stream=stream), stream), values)
        assert launches(gpu) == (2, 6)


@pytest.mark.parametrize("times", [1, 3])  # without a graph, and with one
def test_a_context_is_changed_only_when_it_has_done_its_work(gpu: FakeGpu, times: int) -> None:
    stream = gpu.new_stream()
    calls = []
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        for batch, side in [(1, 4)] * 3 + [(1, 8)] * 3 + [(8, 64)] * 3 + [(1, 4)]:
            inputs = inputs_of(batch, side)
            arrays, outputs = on_gpu(gpu, inputs, stream), empty_outputs(gpu, inputs, stream)
            for _ in range(times):
                results = engine.enqueue(arrays, outputs, stream=stream)
            calls.append((results, inputs))
        assert launches(gpu) == ((0, 0) if times == 1 else (10, 20))
    for results, inputs in calls:
        assert_right(read(gpu, results, stream), inputs)


def test_a_copy_that_fails_spoils_nothing_later(gpu: FakeGpu) -> None:
    stream = gpu.new_stream()
    small, large = inputs_of(1, 8), inputs_of(2, 16)
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        engine.enqueue(large, stream=stream)
        gpu.failures["cudaMemcpyAsync"] = iter([None] * 4 + [Status.cudaErrorLaunchFailure])
        with pytest.raises(cuda.CudaError, match="cudaMemcpyAsync"):
            engine.run(small)  # all is under way but the copy of the last output
        assert_right(engine.run(large), large)
        gpu.failures["cudaMemcpyAsync"] = iter([None] * 2 + [Status.cudaErrorLaunchFailure])
        with pytest.raises(cuda.CudaError, match="cudaMemcpyAsync"):
            engine.run(small)
        assert_right(engine.run(large), large)


@pytest.mark.parametrize("versioned", [True, False])
def test_enqueue_takes_dlpack_and_gives_it_back(gpu: FakeGpu, versioned: bool) -> None:
    stream, theirs = gpu.new_stream(), gpu.new_stream()
    inputs = inputs_of(2, 8)
    arrays: dict[str, Any] = {
        name: DlpackArray(gpu, value, theirs, versioned=versioned) for name, value in inputs.items()
    }
    assert not hasattr(arrays["z"], "__cuda_array_interface__")
    target = DlpackArray(gpu, np.zeros((2, 3, 8, 8), np.float32), theirs, versioned=versioned)
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        results = engine.enqueue(arrays, {"output": target}, stream=stream)
        assert target.held == 1  # its owner may go, its memory stays
        assert_right(read(gpu, results, stream), inputs)
        assert results["output"].pointer == target.pointer
        assert all(array.streams == [stream] for array in (*arrays.values(), target))
        del results
        gc.collect()
        assert [array.held for array in (*arrays.values(), target)] == [0, 0, 0, 0]
        assert "d2d" not in gpu.log


def test_enqueue_waits_for_the_stream_that_an_array_names(gpu: FakeGpu) -> None:
    stream, theirs, others = (gpu.new_stream() for _ in range(3))
    inputs = inputs_of(2, 8)
    arrays = {
        name: CudaArray(gpu, value, theirs, extra={"stream": theirs})
        for name, value in inputs.items()
    }
    outputs = {
        name: CudaArray(gpu, np.zeros_like(value), others, extra={"stream": others})
        for name, value in expected(inputs).items()
    }
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        results = engine.enqueue(arrays, outputs, stream=stream)
        assert_right(read(gpu, results, stream), inputs)
        gpu.cudaStreamSynchronize(others)
        assert_right(read(gpu, results, stream), inputs)  # their zeros came before, not after


def test_enqueue_on_the_default_stream(gpu: FakeGpu) -> None:
    inputs = inputs_of()
    arrays = {name: CudaArray(gpu, value, 0, extra={"stream": 1}) for name, value in inputs.items()}
    dlpack = DlpackArray(gpu, inputs["z"], gpu.new_stream())
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        records = gpu.calls["cudaEventRecord"]
        for _ in range(3):
            results = engine.enqueue(arrays, stream=0)
            assert_right(read(gpu, results, 0), inputs)
        assert gpu.calls["cudaEventRecord"] == records + 3  # 1 is 0: nothing else to wait for
        assert launches(gpu) == (1, 2)
        assert results["output"].__cuda_array_interface__["stream"] == 1
        assert_right(read(gpu, engine.enqueue({**arrays, "z": dlpack}, stream=0), 0), inputs)
        assert dlpack.streams == [1]


def test_one_context_serves_several_streams_in_order(gpu: FakeGpu) -> None:
    streams = [gpu.new_stream() for _ in range(3)]
    calls = []
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        for turn in range(9):
            stream, inputs = streams[turn % 3], inputs_of(2, 8, turn)
            arrays, outputs = on_gpu(gpu, inputs, stream), empty_outputs(gpu, inputs, stream)
            calls.append((engine.enqueue(arrays, outputs, stream=stream), inputs, stream))
        own = inputs_of(2, 8, 99)
        assert_right(engine.run(own), own)
        for results, inputs, stream in reversed(calls):
            assert_right(read(gpu, results, stream), inputs)


def test_a_result_of_one_call_is_an_input_of_the_next(gpu: FakeGpu) -> None:
    stream, other = gpu.new_stream(), gpu.new_stream()
    inputs = inputs_of(2, 8)
    with (
        Engine(FakeBackend(FakeEngine(gpu)), PLAN) as first,
        Engine(FakeBackend(FakeEngine(gpu)), PLAN) as second,
    ):
        image = first.enqueue(inputs, stream=stream)["output"]
        results = second.enqueue({**inputs, "image": image}, stream=other)
        assert_right(read(gpu, results, other), {**inputs, "image": expected(inputs)["output"]})


def test_host_arrays_may_change_once_enqueue_has_returned(gpu: FakeGpu) -> None:
    streams = [gpu.new_stream(), gpu.new_stream()]
    calls = []
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        for turn in range(4):
            inputs = inputs_of(2, 8, turn)
            outputs = empty_outputs(gpu, inputs, streams[turn % 2])
            given = {name: value.copy() for name, value in inputs.items()}
            results = engine.enqueue(given, outputs, stream=streams[turn % 2])
            for value in given.values():
                value[...] = np.nan
            calls.append((results, inputs, streams[turn % 2]))
        for results, inputs, stream in calls:
            assert_right(read(gpu, results, stream), inputs)


def test_arrays_that_are_not_aligned_are_copied_on_the_gpu(gpu: FakeGpu) -> None:
    stream = gpu.new_stream()
    inputs = inputs_of(2, 8)
    arrays: dict[str, Any] = dict(on_gpu(gpu, inputs, stream))
    arrays["z"] = CudaArray(gpu, inputs["z"], stream, offset=16)
    arrays["truncation"] = DlpackArray(gpu, inputs["truncation"], stream, offset=4)
    zeros = np.zeros((2, 3, 8, 8), np.float32)
    target = CudaArray(gpu, zeros, stream, offset=4)
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        for count in range(1, 4):
            results = engine.enqueue(arrays, {"output": target}, stream=stream)
            assert_right(read(gpu, results, stream), inputs)
            assert results["output"].pointer == target.pointer
            assert gpu.log.count("d2d") == 3 * count
        assert launches(gpu) == (1, 2)
        assert "h2d" not in gpu.log


def test_a_buffer_that_grows_ends_the_arrays_that_lay_in_it(gpu: FakeGpu) -> None:
    stream = gpu.new_stream()
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        small = engine.enqueue(inputs_of(1, 8), stream=stream)["output"]
        assert small.__cuda_array_interface__["shape"] == (1, 3, 8, 8)
        engine.enqueue(inputs_of(2, 16), stream=stream)
        with pytest.raises(RuntimeError, match="before the next call"):
            _ = small.__cuda_array_interface__
        with pytest.raises(RuntimeError, match="before the next call"):
            engine.enqueue({**inputs_of(1, 8), "image": small}, stream=stream)


def test_enqueue_then_run_of_one_shape_makes_one_graph(gpu: FakeGpu) -> None:
    stream, inputs = gpu.new_stream(), inputs_of()
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        for _ in range(2):
            engine.enqueue(inputs, stream=stream)
        assert_right(engine.run(inputs), inputs)
        assert launches(gpu) == (1, 2)


def _transposed(gpu: FakeGpu, value: NDArray[Any], stream: int) -> Any:
    return CudaArray(gpu, value, stream, extra={"strides": (4, 4 * value.shape[0])})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_transposed, r"input 'z' of shape \[2, 4\] is not contiguous"),
        (
            lambda g, v, s: DlpackArray(g, v, s, strides=(1, 2)),
            r"input 'z' of shape \[2, 4\] is not contiguous",
        ),
        (lambda g, v, s: CudaArray(g, v, s, extra={"mask": object()}), "'z' is a masked array"),
        (lambda g, v, s: CudaArray(g, v, s, extra={"data": (64, False)}), "'z' .* not on a GPU"),
        (lambda g, v, s: CudaArray(g, v, s, extra={"typestr": "<f8"}), "'z' is float64"),
        (lambda g, v, s: DlpackArray(g, v, s, device=(2, 1)), "'z' lies on GPU 1 and .* on GPU 0"),
        (lambda g, v, s: DlpackArray(g, v, s, device=(10, 0)), "'z' .*not a CUDA GPU"),
        (lambda g, v, s: DlpackArray(g, v, s, element=(0, 32)), "'z' is int32"),
        (lambda g, v, s: DlpackArray(g, v, s, element=(5, 64)), "NumPy does not know"),
    ],
)
def test_an_array_that_cannot_be_read_in_place_is_named(
    gpu: FakeGpu, make: Callable[[FakeGpu, NDArray[Any], int], Any], message: str
) -> None:
    stream = gpu.new_stream()
    inputs = inputs_of(2, 8)
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        with pytest.raises(UserError, match=message):
            engine.enqueue({**inputs, "z": make(gpu, inputs["z"], stream)}, stream=stream)
        assert_right(read(gpu, engine.enqueue(inputs, stream=stream), stream), inputs)


def test_axes_of_length_one_have_no_stride(gpu: FakeGpu) -> None:
    stream = gpu.new_stream()
    inputs = inputs_of(1, 8)
    arrays: dict[str, Any] = dict(inputs)
    arrays["z"] = CudaArray(gpu, inputs["z"], stream, extra={"strides": (999, 4)})
    arrays["truncation"] = DlpackArray(gpu, inputs["truncation"], stream, strides=(7,))
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        assert_right(read(gpu, engine.enqueue(arrays, stream=stream), stream), inputs)


ZEROS = np.zeros((2, 3, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("output", lambda g, s: ZEROS, "output 'output' is not on the GPU: .* use run"),
        ("output", lambda g, s: CudaArray(g, ZEROS[:1], s), r"\[1, 3, 8, 8\], the engine writes"),
        (
            "output",
            lambda g, s: CudaArray(g, ZEROS.astype(np.float16), s),
            r"float16 \[2, 3, 8, 8\], the engine writes float32 \[2, 3, 8, 8\]",
        ),
        (
            "outputs",
            lambda g, s: CudaArray(g, ZEROS, s),
            "no output 'outputs'; it gives output, co",
        ),
        ("output", lambda g, s: DlpackArray(g, ZEROS, s, flags=1), "'output' is read-only"),
        (
            "output",
            lambda g, s: CudaArray(
                g, ZEROS, s, extra={"data": (CudaArray(g, ZEROS, s).pointer, 1)}
            ),
            "'output' is read-only",
        ),
    ],
)
def test_an_output_that_cannot_be_written_is_named(
    gpu: FakeGpu, name: str, make: Callable[[FakeGpu, int], Any], message: str
) -> None:
    stream, inputs = gpu.new_stream(), inputs_of(2, 8)
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        with pytest.raises(UserError, match=message):
            engine.enqueue(inputs, {name: make(gpu, stream)}, stream=stream)
        assert_right(read(gpu, engine.enqueue(inputs, stream=stream), stream), inputs)


def test_run_sends_arrays_on_the_gpu_to_enqueue(gpu: FakeGpu) -> None:
    stream, inputs = gpu.new_stream(), inputs_of()
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        for array in (
            CudaArray(gpu, inputs["z"], stream),
            DlpackArray(gpu, inputs["z"], stream),
        ):
            wrong: Any = {**inputs, "z": array}
            with pytest.raises(UserError, match=r"'z' lies on a GPU: .* use enqueue"):
                engine.run(wrong)


def test_what_a_library_refuses_to_hand_out_is_named(gpu: FakeGpu) -> None:
    needs_gradient: Any = torch.zeros((1, 4), requires_grad=True)
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        with pytest.raises(UserError, match=r"'z' is not handed out by its library: .*grad"):
            engine.run({**inputs_of(), "z": needs_gradient})

        class Refusing:
            @property
            def __cuda_array_interface__(self) -> Any:
                raise RuntimeError("this needs a gradient\nand more")

        with pytest.raises(UserError, match=r"'z' is not .* library: this needs a gradient$"):
            engine.enqueue({**inputs_of(), "z": Refusing()}, stream=0)


# -- arrays of other libraries ---------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, (1, 0)])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool],
)
def test_capsules_of_torch_are_read(dtype: torch.dtype, version: tuple[int, int] | None) -> None:
    tensor = torch.zeros((3, 4, 5), dtype=dtype)[1:]
    options: dict[str, Any] = {} if version is None else {"max_version": version}
    view = read_capsule(tensor.__dlpack__(**options), "input 'x'")
    assert view.pointer == tensor.data_ptr()
    assert view.shape == (2, 4, 5)
    assert str(view.dtype) == str(dtype).removeprefix("torch.")
    assert view.nbytes == tensor.numel() * tensor.element_size()
    with pytest.raises(UserError, match="not contiguous"):
        read_capsule(tensor.transpose(0, 1).__dlpack__(**options), "input 'x'")


def test_a_capsule_keeps_its_memory(gpu: FakeGpu) -> None:
    array = DlpackArray(gpu, ZEROS, gpu.new_stream())
    view = as_device_array(array, name="input 'x'", device=0, stream=0)
    assert array.held == 1
    del view
    assert array.held == 0


def test_a_dlpack_of_the_future_is_refused(gpu: FakeGpu) -> None:
    array = DlpackArray(gpu, ZEROS, gpu.new_stream())
    capsule = array.__dlpack__()
    array._kept[-5].major = 2
    with pytest.raises(UserError, match="input 'x' comes by DLPack 2, this program knows 1"):
        read_capsule(capsule, "input 'x'")


def test_arrays_of_the_host_are_no_device_arrays(gpu: FakeGpu) -> None:
    for value in (ZEROS, torch.zeros(3), [1], np.float32(2), None):
        assert as_device_array(value, name="x", device=0, stream=0) is None
    tensor = torch.arange(6).reshape(2, 3)
    array = as_host_array(tensor, name="x")
    array[0, 0] = 7
    assert tensor[0, 0] == 7
    assert gpu.calls == {}


# -- CUDA ------------------------------------------------------------------------------------------


def test_without_cuda_python_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda.cudart.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(UserError, match=r"through cuda-python, .*pip install mat-export\[trt\]"):
        cuda.device_info()


@pytest.mark.parametrize("name", ["cuda.bindings.runtime", "cuda.cudart"])
def test_cuda_python_is_found_under_either_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = SimpleNamespace()

    def import_module(wanted: str) -> Any:
        if wanted == name:
            return found
        raise ModuleNotFoundError(wanted)

    cuda.cudart.cache_clear()
    monkeypatch.setattr(importlib, "import_module", import_module)
    assert cuda.cudart() is found
    cuda.cudart.cache_clear()


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (RuntimeError("Failed to dlopen libcuda.so.1"), "libcuda.so.1.: install the NVIDIA driver"),
        (
            Status.cudaErrorInsufficientDriver,
            r"text of 35 \(cudaErrorInsufficientDriver\): install",
        ),
        (Status.cudaErrorNoDevice, "no NVIDIA GPU is visible, check 'nvidia-smi'"),
    ],
)
def test_without_a_gpu_the_message_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, reason: Any, message: str
) -> None:
    gpu = use(monkeypatch, FakeGpu(without_driver=reason))
    with pytest.raises(UserError, match=message):
        cuda.device_info()
    with pytest.raises(UserError, match=message):
        Engine(FakeBackend(FakeEngine(gpu)), PLAN)


def test_device_info(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeGpu(devices=2, memory=1000))
    assert cuda.device_info(1) == cuda.DeviceInfo(1, "Paper GPU 1", (8, 9), (12, 4), 1000, 1000)
    assert cuda.device_info().index == 0
    buffer = cuda.DeviceBuffer(100)
    assert cuda.free_memory() == 900
    assert cuda.device_of(buffer.handle + 99) == 0
    assert cuda.device_of(cuda.PinnedBuffer(10).handle) is None
    assert cuda.device_of(12345) is None
    buffer.close()
    assert buffer.closed
    assert cuda.free_memory() == 1000


def test_an_engine_stays_on_its_gpu_whatever_the_thread_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = use(monkeypatch, FakeGpu(devices=2))
    gpu.cudaSetDevice(1)
    inputs = inputs_of()
    with Engine(FakeBackend(FakeEngine(gpu)), PLAN) as engine:
        assert engine.device == 1
        gpu.cudaSetDevice(0)
        stream = gpu.new_stream()
        array = CudaArray(gpu, inputs["z"], stream)
        before = set(gpu.allocations)
        assert_right(engine.run(inputs), inputs)
        assert cuda.current_device() == 0
        made = {memory.device for key, memory in gpu.allocations.items() if key not in before}
        assert made == {1}
        with pytest.raises(UserError, match="'z' lies on GPU 0 and the engine runs on GPU 1"):
            engine.enqueue({**inputs, "z": array}, stream=stream)
        in_threads(2, lambda index: assert_right(engine.run(inputs), inputs))
    assert gpu.errors == []


def test_a_failed_call_leaves_no_error_behind(gpu: FakeGpu) -> None:
    gpu.failures["cudaMalloc"] = iter([Status.cudaErrorMemoryAllocation])
    with pytest.raises(UserError, match=r"2\.0 MiB are needed and 64\.0 MiB are free"):
        cuda.DeviceBuffer(2 << 20)
    assert gpu.last_error == Status.cudaSuccess


def test_copies_events_and_time(gpu: FakeGpu) -> None:
    stream = cuda.Stream()
    source, target = cuda.PinnedBuffer(12), cuda.PinnedBuffer(12)
    first, second = cuda.DeviceBuffer(12), cuda.DeviceBuffer(12)
    source.view((3,), np.dtype(np.float32))[:] = [1, 2, 3]
    target.view((3,), np.dtype(np.float32))[:] = 0
    start, end = cuda.Event(timing=True), cuda.Event(timing=True)
    start.record(stream.handle)
    cuda.copy_to_device(first.handle, source.handle, 12, stream.handle)
    cuda.copy_on_device(second.handle, first.handle, 12, stream.handle)
    cuda.copy_to_host(target.handle, second.handle, 12, stream.handle)
    end.record(stream.handle)
    assert gpu.log == []
    end.synchronize()
    assert gpu.log == ["h2d", "d2d", "d2h"]
    assert target.view((3,), np.dtype(np.float32)).tolist() == [1, 2, 3]
    assert 0 < end.elapsed_ms(since=start) < 10_000


def test_a_capture_whose_work_fails_restores_the_stream(gpu: FakeGpu) -> None:
    stream = cuda.Stream()

    def allocate() -> None:
        cuda.DeviceBuffer(10)

    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(cuda.CudaError, match="cudaMalloc failed: text of 900"):
        cuda.capture(stream.handle, allocate)
    with pytest.raises(KeyError, match="mine"):
        cuda.capture(stream.handle, fail)
    assert "graphs" not in gpu.live
    buffer, source = cuda.DeviceBuffer(4), cuda.PinnedBuffer(4)
    graph = cuda.capture(
        stream.handle,
        lambda: cuda.copy_to_device(buffer.handle, source.handle, 4, stream.handle),
    )
    stream.synchronize()
    assert gpu.log == []
    graph.launch(stream.handle)
    graph.launch(stream.handle)
    stream.synchronize()
    assert gpu.log == ["graph", "h2d"] * 2


# -- the runner ------------------------------------------------------------------------------------


@pytest.fixture
def spec() -> GraphSpec:
    return GraphSpec(preset("mat-tiny-256"), batch=None)


def engine_for(gpu: FakeGpu, spec: GraphSpec) -> FakeEngine:
    """An engine in which TensorRT dropped every input that the fake does not use."""
    kept = [
        t for t in (*spec.inputs, *spec.outputs) if t.name in ("image", "z", "truncation", "output")
    ]
    tensors = [
        FakeTensor(
            name=t.name,
            mode="OUTPUT" if t.name == "output" else "INPUT",
            dtype="FLOAT",
            shape=tuple(axis if isinstance(axis, int) else -1 for axis in t.shape),
        )
        for t in kept
    ]
    profile = {
        t.name: tuple(tuple(batch if n == -1 else n for n in t.shape) for batch in (1, 1, 4))
        for t in tensors
    }
    return FakeEngine(gpu, tensors, profiles=(profile,))


def open_as(monkeypatch: pytest.MonkeyPatch, backend: FakeBackend, spec: GraphSpec) -> list[Path]:
    asked: list[Path] = []

    def open_plan(path: Path) -> Any:
        asked.append(path)
        side = spec.config.resolution
        manifest = {"request": {"profiles": {"image": [[n, 3, side, side] for n in (1, 2, 4)]}}}
        return OpenedPlan(path, PLAN, spec, backend, manifest, notes=("perhaps slower here",))

    monkeypatch.setattr("engines.runner.open_plan", open_plan)
    return asked


def full_inputs(spec: GraphSpec, batch: int) -> Arrays:
    rng = np.random.default_rng(batch)
    return {
        t.name: rng.standard_normal(
            [axis if isinstance(axis, int) else batch for axis in t.shape]
        ).astype(t.dtype)
        for t in spec.inputs
    }


def test_the_runner_is_a_runner(
    gpu: FakeGpu, spec: GraphSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = open_as(monkeypatch, FakeBackend(engine_for(gpu, spec)), spec)
    opened = EngineRunner("some/mat.plan", threads=3)
    runner: Runner = opened
    assert asked == [Path("some/mat.plan")]
    assert runner.name == "TensorRT 8.6.0, Paper GPU 0, perhaps slower here"
    assert runner.spec is spec
    assert opened.image_shapes is not None
    assert [shape[0] for shape in opened.image_shapes] == [1, 2, 4]
    with runner:
        for batch in (1, 3, 3):
            inputs = full_inputs(spec, batch)
            results = runner.run(inputs)
            assert list(results) == ["output"]
            np.testing.assert_array_equal(results["output"], expected(inputs)["output"])
        assert launches(gpu) == (2, 1)
        with pytest.raises(UserError, match="input 'mask' is missing; the model takes"):
            runner.run({name: value for name, value in inputs.items() if name != "mask"})
        with pytest.raises(UserError, match=r"'image' has shape \[5, .*built for \[1, .* to \[4, "):
            runner.run(full_inputs(spec, 5))
    with pytest.raises(RuntimeError, match="was closed"):
        runner.run(inputs)
    assert gpu.live == {}


def test_the_runner_hands_its_options_on(
    gpu: FakeGpu, spec: GraphSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = engine_for(gpu, spec)
    open_as(monkeypatch, FakeBackend(fake), spec)
    with EngineRunner("mat.plan", contexts=2, graphs=False) as runner:
        for batch in (1, 2, 1, 2):
            runner.run(full_inputs(spec, batch))
        assert len(fake.contexts) == 2
        assert launches(gpu) == (0, 0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "other", "mode": "INPUT"}, "other"),
        ({"name": "output", "mode": "OUTPUT", "dtype": "HALF"}, "output"),
        ({"name": "result", "mode": "OUTPUT"}, "output"),
    ],
)
def test_an_engine_that_is_not_what_its_manifest_says_is_refused(
    gpu: FakeGpu,
    spec: GraphSpec,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
    named: str,
) -> None:
    fake = engine_for(gpu, spec)
    replaced = {"other": "z"}.get(change["name"], "output")
    old = fake.tensors[replaced]
    profile = {**fake.profiles[0], "other": fake.profiles[0]["z"]}
    tensors = [
        FakeTensor(**{**vars(t), **change}) if t is old else t for t in fake.tensors.values()
    ]
    backend = FakeBackend(FakeEngine(gpu, tensors, profiles=(profile,)))
    open_as(monkeypatch, backend, spec)
    with pytest.raises(UserError) as caught:  # which keeps the runner from being collected
        EngineRunner("mat.plan")
    assert str(caught.value) == (
        f"'mat.plan' is not the engine its manifest describes (see {named}): "
        "build it again with 'mat-export trt'"
    )
    assert gpu.live == {}


def test_the_profiles_of_the_fake_overlap() -> None:
    assert SMALL["image"][2] > LARGE["image"][0]
