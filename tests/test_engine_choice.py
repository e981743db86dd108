"""With plugins or without: what is built, what is kept, what is refused, and what is said of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import GPU
from test_engine_build import Install, caches, gpu, install, leftovers, model_of

from engines.backend import open_backend
from engines.build import BuildReport
from engines.choice import Contest, Verdict, build_chosen, find_library
from engines.cuda import CudaError
from engines.options import BuildOptions
from engines.papers import open_plan, read_engine_manifest
from engines.plugins.library import LibraryDescription
from mat_export.contract import GraphSpec, UserError
from mat_export.files import file_digest
from mat_torch import preset

__all__ = ["caches", "gpu", "install"]  # the fixtures

pytestmark = pytest.mark.usefixtures("gpu", "machine")

SPEC = GraphSpec(preset("mat-tiny-256"), batch=None, precision="fp16")
FITTING = LibraryDescription("V3", "10.13.3", 10, ("sm_86",), "13.0.88", "digest of sources")
PASSED = Verdict(True, "PSNR 60.0 dB or more", {"passed": True})
MISSED = Verdict(False, "parity FAILED", {"passed": False})
WITHOUT, WITH = b"plan without plugins", b"plan with plugins"


@pytest.fixture
def machine(install: Install) -> None:
    install("10.13.3")


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libmat_plugins.so"
    path.write_bytes(b"code")
    return path


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return tmp_path / "mat.plan"


class Engine:
    """Stands for `engines.runtime.Engine`; it knows its plan."""

    def __init__(self, backend: Any, plan: bytes) -> None:
        self.plan = plan

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@dataclass
class World:
    """How builds, parities and times turn out, by the plan they are of, and what was asked.

    Attributes:
        builds: What a build raises, if anything.
        verdicts: What parity gives or raises.
        times: Milliseconds, or one error for all.
        built: The plans that were built, in order.
        judged: Batch and size of each parity.
        timed: Specification, batch and size of the inputs to time with.
        notes: Lines about the work.
        told: Progress.
        problem: Why parity cannot be checked, if so.
    """

    builds: dict[bytes, BaseException] = field(default_factory=dict)
    verdicts: dict[bytes, Verdict | Exception] = field(default_factory=dict)
    times: Mapping[bytes, float] | Exception = field(
        default_factory=lambda: {WITHOUT: 7.0, WITH: 5.0}
    )
    built: list[bytes] = field(default_factory=list)
    judged: list[tuple[int, Any]] = field(default_factory=list)
    timed: list[tuple[GraphSpec, int, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    told: list[tuple[str, int, int]] = field(default_factory=list)
    problem: str = ""

    def run_worker(
        self, model: bytes, request: Any, label: str, progress: Any, log: Any
    ) -> tuple[dict[str, Any], bytes]:
        plan = WITHOUT if request.plugin is None else WITH
        assert model == graph(plan == WITH)
        for percent in (0, 50, 100):
            progress("timing kernels", percent, 100)
        if plan in self.builds:
            raise self.builds[plan]
        self.built.append(plan)
        return {}, plan

    def judge(self, path: Path, batch: int, size: Any, progress: Any) -> Verdict:
        opened = open_plan(path)  # its papers are in order
        progress("one-window", 0, 2)
        self.judged.append((batch, size))
        found = self.verdicts.get(opened.plan, PASSED)
        if isinstance(found, Exception):
            raise found
        progress("done", 2, 2)
        return found

    def inputs(self, spec: GraphSpec, batch: int, size: Any) -> dict[str, Any]:
        self.timed.append((spec, batch, size))
        return {}

    def time_engines(self, engines: list[Engine], inputs: Any) -> list[list[float]]:
        if isinstance(self.times, Exception):
            raise self.times
        return [[self.times[e.plan] + 1, self.times[e.plan], 0.0] for e in engines]

    def build(
        self, plan: Path, options: BuildOptions, library: Path | None, why: str = "", **more: Any
    ) -> BuildReport:
        return build_chosen(
            lambda plugins: (graph(plugins), {"command": ["mat-export", "trt", "mat.onnx"]}),
            plan,
            options,
            library,
            why,
            Contest(self.judge, self.inputs, self.problem),
            progress=lambda *event: self.told.append(event),
            note=self.notes.append,
            **more,
        )


def graph(plugins: bool) -> bytes:
    return model_of(SPEC, operator="MaskPropagation" if plugins else "Unique")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr("engines.build.run_worker", made.run_worker)
    monkeypatch.setattr("engines.timing.time_engines", made.time_engines)
    monkeypatch.setattr("engines.timing.Engine", Engine)
    return made


AUTO, ON, OFF = (BuildOptions(plugins=choice) for choice in ("auto", "on", "off"))


# -- which library ---------------------------------------------------------------------------------


def found(options: BuildOptions, given: Path | None = None, **more: Any) -> tuple[Path | None, str]:
    backend = open_backend(more.pop("backend", "tensorrt"), target=options.target)
    spec = replace(SPEC, config=more.pop("config", SPEC.config))
    return find_library(backend, options, more.pop("precision", "fp16"), spec, given)


def offer(
    monkeypatch: pytest.MonkeyPatch, result: Path | UserError | LibraryDescription
) -> list[tuple[Any, ...]]:
    """Let library_for, or describe_library, give or raise this; what they were asked."""
    asked: list[tuple[Any, ...]] = []

    def give(*arguments: Any, **_: Any) -> Any:
        asked.append(arguments)
        if isinstance(result, UserError):
            raise result
        return result

    name = "describe_library" if isinstance(result, LibraryDescription) else "library_for"
    monkeypatch.setattr(f"engines.choice.{name}", give)
    return asked


@pytest.mark.parametrize("options", [AUTO, ON])
def test_a_library_is_taken_from_the_cache_or_built(
    library: Path, options: BuildOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = offer(monkeypatch, library)
    assert found(options) == (library, "")
    assert asked == [(10, (8, 6))]


@pytest.mark.parametrize("options", [AUTO, ON])
def test_a_library_that_is_given_is_taken_if_it_fits(
    library: Path, options: BuildOptions, monkeypatch: pytest.MonkeyPatch, install: Install
) -> None:
    offer(monkeypatch, FITTING)
    assert found(options, library) == (library, "")
    monkeypatch.setitem(GPU, "capability", (9, 0))
    with pytest.raises(UserError, match=r"cannot call plugins: .*has code for sm_86, which no GPU"):
        found(options, library)
    monkeypatch.setitem(GPU, "capability", (8, 6))
    install("8.6.0")
    with pytest.raises(UserError, match=r"cannot call plugins: .* for TensorRT 10, .* TensorRT 8"):
        found(options, library)


@pytest.mark.parametrize("options", [AUTO, ON])
def test_what_is_given_and_is_no_library_is_refused(
    library: Path, options: BuildOptions, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="there is no plugin library"):
        found(options, tmp_path / "absent.so")
    with pytest.raises(UserError, match="is no plugin library of this toolkit"):
        found(options, library)


def test_off_looks_for_no_library(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = offer(monkeypatch, library)
    assert found(OFF) == (None, "plugins are off")
    assert not asked
    with pytest.raises(UserError, match="leave out one of the two"):
        found(OFF, library)


def test_where_none_can_be_built_auto_goes_without_and_on_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(monkeypatch, UserError("CUDA's compiler nvcc is not on the PATH"))
    assert found(AUTO) == (None, "CUDA's compiler nvcc is not on the PATH")
    with pytest.raises(UserError, match="cannot call plugins: CUDA's compiler nvcc is not"):
        found(ON)


@pytest.mark.parametrize(
    ("options", "precision", "why"),
    [
        (BuildOptions(), "bf16", "8.6.0 has no bf16"),
        (BuildOptions(version_compatible=True), "fp16", "cannot be version-compatible"),
    ],
)
def test_what_the_backend_cannot_do_is_told_before_a_library_is_built(
    options: BuildOptions,
    precision: str,
    why: str,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    install: Install,
) -> None:
    install("8.6.0")
    asked = offer(monkeypatch, library)
    none, reason = found(options, precision=precision)
    assert none is None
    assert why in reason
    with pytest.raises(UserError, match=why):
        found(replace(options, plugins="on"), precision=precision)
    with pytest.raises(UserError, match=why):
        found(options, library, precision=precision)
    assert not asked


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"windows": (8, 16, 16, 4, 2)}, r"'mat-tiny-256' has windows of 2 and 4$"),
        ({"token_dim": 99}, r"those of 'mat-tiny-256' have 33$"),
    ],
)
def test_for_a_network_without_kernels_auto_goes_without_and_no_library_is_built(
    changes: dict[str, Any], why: str, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = offer(monkeypatch, library)
    config = replace(SPEC.config, **changes)
    none, reason = found(AUTO, config=config)
    assert none is None
    assert re.search(why, reason)
    for options, given in ((ON, None), (ON, library), (AUTO, library)):
        with pytest.raises(UserError, match=rf"{why[:-1]}: build with --plugins off$"):
            found(options, given, config=config)
    assert found(OFF, config=config) == (None, "plugins are off")
    assert not asked


def test_rtx_has_no_plugin_layers() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    options = BuildOptions(target="sm_89")
    none, reason = found(options, backend="tensorrt-rtx")
    assert none is None
    assert "no plugin layers" in reason
    with pytest.raises(UserError, match=r"cannot call plugins: TensorRT-RTX .* no plugin layers"):
        found(replace(options, plugins="on"), backend="tensorrt-rtx")


def test_without_a_gpu_there_are_no_plugins(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    def none(index: int | None = None) -> None:
        raise UserError("no NVIDIA GPU can be used here")

    offer(monkeypatch, library)
    monkeypatch.setattr("engines.cuda.device_info", none)
    assert found(AUTO) == (None, "no NVIDIA GPU can be used here")


# -- on, off, and auto without a library -----------------------------------------------------------


def test_on_builds_the_graph_that_calls_the_library(
    world: World, plan: Path, library: Path
) -> None:
    report = world.build(plan, ON, library)
    assert world.built == [WITH]
    assert report.plugins
    manifest = read_engine_manifest(plan)
    papers = {"path": str(library), "sha256": file_digest(library)}
    assert manifest["sources"]["plugin"] == papers
    assert manifest["sources"]["plugin_choice"] == {"asked": "on", "why": "plugins are on"}
    assert manifest["request"]["plugin"] == papers["sha256"]
    assert manifest["request"]["options"]["plugins"] == "on"
    assert world.build(plan, ON, library).cached
    assert world.built == [WITH]
    assert not world.judged


def test_off_builds_the_graph_with_functions(world: World, plan: Path) -> None:
    report = world.build(plan, OFF, None, "plugins are off")
    assert world.built == [WITHOUT]
    assert not report.plugins
    assert world.notes == []
    manifest = read_engine_manifest(plan)
    assert manifest["sources"]["plugin"] is None
    assert manifest["sources"]["plugin_choice"] == {"asked": "off", "why": "plugins are off"}
    assert world.build(plan, OFF, None, "plugins are off").cached


def test_auto_without_a_library_says_why(world: World, plan: Path) -> None:
    report = world.build(plan, AUTO, None, "there is no nvcc")
    assert world.built == [WITHOUT]
    assert world.notes == ["building without plugins: there is no nvcc"]
    choice = report.manifest["sources"]["plugin_choice"]
    assert choice == {"asked": "auto", "why": "there is no nvcc"}
    assert world.build(plan, AUTO, None, "there is no nvcc").cached


def test_auto_takes_no_plugins_on_trust(world: World, plan: Path, library: Path) -> None:
    world.problem = "there is no onnxruntime"
    report = world.build(plan, AUTO, library)
    assert world.built == [WITHOUT]
    assert world.notes == ["building without plugins: there is no onnxruntime"]
    assert report.manifest["sources"]["plugin_choice"]["why"] == "there is no onnxruntime"
    world.build(plan, ON, library)
    assert world.built == [WITHOUT, WITH]


def test_the_choice_is_part_of_the_request(world: World, plan: Path, library: Path) -> None:
    world.build(plan, OFF, None, "plugins are off")
    world.build(plan, AUTO, None, "there is no nvcc")
    world.build(plan, ON, library)
    assert world.built == [WITHOUT, WITHOUT, WITH]
    assert "options.plugins: off, now auto" in "".join(world.notes)
    assert "options.plugins: auto, now on" in "".join(world.notes)


# -- auto with a library ---------------------------------------------------------------------------


def test_auto_keeps_the_faster_of_two_and_tells_of_both(
    world: World, plan: Path, library: Path, tmp_path: Path
) -> None:
    report = world.build(plan, AUTO, library)
    assert world.built == [WITHOUT, WITH]
    assert plan.read_bytes() == WITH
    assert report.plugins
    manifest = read_engine_manifest(plan)
    assert manifest == json.loads(json.dumps(report.manifest))
    papers = {"path": str(library), "sha256": file_digest(library)}
    assert manifest["sources"]["plugin"] == papers
    assert manifest["sources"]["plugin_choice"] == {
        "asked": "auto",
        "why": "5.00 ms against 7.00 ms",
        "library": papers,
        "with_plugins": {"milliseconds": 5.0, "parity": {"passed": True}, "problem": None},
        "without_plugins": {"milliseconds": 7.0, "parity": {"passed": True}, "problem": None},
    }
    assert manifest["command"] == ["mat-export", "trt", "mat.onnx"]
    assert manifest["parity"] is None  # that is of the whole suite
    assert open_plan(plan).plan == WITH
    assert world.notes == [
        "building twice, without plugins and with them (--plugins on or off builds once)",
        "without plugins: 7.00 ms, PSNR 60.0 dB or more",
        "with plugins: 5.00 ms, PSNR 60.0 dB or more",
        "kept the engine with plugins: 5.00 ms against 7.00 ms",
    ]
    percents = [done for _, done, _ in world.told]
    assert percents == sorted(percents)
    assert world.told[-1] == ("built", 100, 100)
    assert sorted(leftovers(tmp_path)) == [plan, Path(f"{plan}.json")]


@dataclass(frozen=True)
class Outcome:
    """What happens, which engine is kept, and what is said."""

    kept: bytes
    why: str
    times: Mapping[bytes, float] | Exception = field(
        default_factory=lambda: {WITHOUT: 7.0, WITH: 5.0}
    )
    builds: dict[bytes, BaseException] = field(default_factory=dict)
    verdicts: dict[bytes, Verdict | Exception] = field(default_factory=dict)


OUTCOMES = {
    "functions are faster": Outcome(
        WITHOUT, "4.00 ms against 5.00 ms", times={WITHOUT: 4.0, WITH: 5.0}
    ),
    "equally fast": Outcome(WITHOUT, "5.00 ms against 5.00", times={WITHOUT: 5.0, WITH: 5.0}),
    "plugins miss parity": Outcome(
        WITHOUT, "the one with plugins does not pass: parity FAILED", verdicts={WITH: MISSED}
    ),
    "functions miss parity": Outcome(
        WITH,
        "the one without plugins does not pass: parity FAILED",
        times={WITHOUT: 4.0, WITH: 5.0},
        verdicts={WITHOUT: MISSED},
    ),
    "both miss parity": Outcome(
        WITHOUT, "parity of neither is proven", verdicts={WITHOUT: MISSED, WITH: MISSED}
    ),
    "no reference": Outcome(
        WITHOUT,
        "parity of neither is proven",
        verdicts=dict.fromkeys((WITHOUT, WITH), UserError("ONNX Runtime cannot run it")),
    ),
    "plugins crash": Outcome(
        WITHOUT,
        "does not pass: its parity could not be checked: cudaGraphLaunch failed: illegal",
        times=CudaError("cudaGraphLaunch", 700, "illegal"),
        verdicts={WITH: CudaError("cudaGraphLaunch", 700, "illegal")},
    ),
    "plugins are not built": Outcome(
        WITHOUT, "does not pass: no implementation", builds={WITH: UserError("no implementation")}
    ),
    "functions are not built": Outcome(
        WITH, "does not pass: no implementation", builds={WITHOUT: UserError("no implementation")}
    ),
    "no times": Outcome(
        WITHOUT,
        "both pass parity, and it could not be timed: the GPU has too little memory",
        times=UserError("the GPU has too little memory"),
    ),
}


@pytest.mark.parametrize("outcome", OUTCOMES.values(), ids=OUTCOMES)
def test_auto_keeps_what_is_proven(
    world: World, plan: Path, library: Path, outcome: Outcome
) -> None:
    world.times, world.builds = outcome.times, outcome.builds
    world.verdicts = outcome.verdicts
    report = world.build(plan, AUTO, library)
    assert plan.read_bytes() == outcome.kept
    assert report.plugins == (outcome.kept == WITH)
    choice = read_engine_manifest(plan)["sources"]["plugin_choice"]
    assert outcome.why in choice["why"]
    assert choice["why"] in world.notes[-1]
    for entry, made in (("with_plugins", WITH), ("without_plugins", WITHOUT)):
        judged = outcome.verdicts.get(made, PASSED)
        ran = made not in outcome.builds and isinstance(judged, Verdict)
        timed = ran and not isinstance(outcome.times, Exception)
        assert (choice[entry]["milliseconds"] is not None) == timed
        assert (choice[entry]["parity"] is not None) == ran
        problem = choice[entry]["problem"]
        assert (problem is None) == timed
        assert problem is None or any(problem in line for line in world.notes)


@pytest.mark.parametrize("with_plugins", [MISSED, UserError("too little memory")])
def test_an_engine_that_misses_parity_says_so_every_time(
    world: World, plan: Path, library: Path, with_plugins: Verdict | Exception
) -> None:
    world.verdicts = {WITHOUT: MISSED, WITH: with_plugins}
    for cached in (False, True):
        report = world.build(plan, AUTO, library)
        assert report.cached is cached
        assert report.missed == "parity FAILED"
        assert report.manifest["parity"] == {"passed": False}
    world.verdicts = {}
    report = world.build(plan, AUTO, library, force=True)
    assert report.missed is None
    assert report.manifest["parity"] is None


def test_a_contest_without_times_is_held_again(world: World, plan: Path, library: Path) -> None:
    times, world.times = world.times, UserError("the GPU has too little memory")
    for _ in range(2):
        assert not world.build(plan, AUTO, library).cached
        assert plan.read_bytes() == WITHOUT
    world.times = times
    world.notes.clear()
    assert not world.build(plan, AUTO, library).cached
    assert "the last contest with plugins was not decided" in world.notes[0]
    assert plan.read_bytes() == WITH
    assert world.build(plan, AUTO, library).cached


def test_where_neither_can_be_built_nothing_is_written(
    world: World, plan: Path, library: Path, tmp_path: Path
) -> None:
    world.builds = {WITHOUT: UserError("too little memory"), WITH: UserError("no implementation")}
    with pytest.raises(UserError, match="too little memory"):
        world.build(plan, AUTO, library)
    assert not leftovers(tmp_path)


def test_an_engine_that_misses_parity_does_not_stand_in_for_one_that_is_not_built(
    world: World, plan: Path, library: Path
) -> None:
    world.builds, world.verdicts = {WITHOUT: UserError("too little memory")}, {WITH: MISSED}
    with pytest.raises(UserError, match="too little memory"):
        world.build(plan, AUTO, library)
    assert not plan.exists()


def test_ctrl_c_between_the_builds_leaves_nothing(
    world: World, plan: Path, library: Path, tmp_path: Path
) -> None:
    world.builds = {WITH: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        world.build(plan, AUTO, library)
    assert world.built == [WITHOUT]
    assert not leftovers(tmp_path)


def test_parity_is_checked_where_it_is_small_and_time_where_it_is_best(
    world: World, plan: Path, library: Path
) -> None:
    world.build(plan, replace(AUTO, batch=(2, 4, 8)), library)
    native = (256, 256)
    assert world.judged == [(2, native), (2, native)]
    assert world.timed == [(SPEC, 4, native)]


@pytest.mark.parametrize("faster", [WITHOUT, WITH])
def test_what_was_chosen_is_not_built_again(
    world: World, plan: Path, library: Path, faster: bytes
) -> None:
    world.times = {WITHOUT: 6.0, WITH: 6.0, faster: 5.0}
    first = world.build(plan, AUTO, library)
    again = world.build(plan, AUTO, library)
    assert again.cached
    assert again.manifest == json.loads(json.dumps(first.manifest))
    assert plan.read_bytes() == faster
    assert world.built == [WITHOUT, WITH]
    assert not world.build(plan, AUTO, library, force=True).cached
    assert len(world.built) == 4


@pytest.mark.parametrize("faster", [WITHOUT, WITH])
def test_what_was_chosen_is_copied_to_another_output(
    world: World, plan: Path, library: Path, tmp_path: Path, faster: bytes
) -> None:
    world.times = {WITHOUT: 6.0, WITH: 6.0, faster: 5.0}
    first = world.build(plan, AUTO, library)
    moved = library.rename(tmp_path / "libmoved.so")
    world.notes.clear()
    other = tmp_path / "other.plan"
    report = world.build(other, AUTO, moved)
    assert report.cached
    assert report.plugins == (faster == WITH)
    assert world.notes == [f"the same request built '{plan}' before: copied"]
    assert world.built == [WITHOUT, WITH]
    assert other.read_bytes() == faster
    choice = first.manifest["sources"]["plugin_choice"]
    sources = read_engine_manifest(other)["sources"]
    assert sources["plugin_choice"] == choice
    papers = {"path": str(moved), "sha256": file_digest(moved)}
    assert sources["plugin"] == (papers if faster == WITH else None)
    assert open_plan(other).plan == faster


def test_the_last_contest_says_which_engine_is_copied(
    world: World, plan: Path, library: Path, tmp_path: Path
) -> None:
    world.build(plan, AUTO, library)
    world.times = {WITHOUT: 4.0, WITH: 5.0}
    world.build(tmp_path / "forced.plan", AUTO, library, force=True)
    assert world.build(plan, AUTO, library).cached  # what is there is from such a contest too
    assert plan.read_bytes() == WITH
    other = tmp_path / "other.plan"
    assert world.build(other, AUTO, library).cached
    assert other.read_bytes() == WITHOUT


def test_a_contest_that_was_not_decided_gives_nothing_to_copy(
    world: World, plan: Path, library: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.plan"
    times, world.times = world.times, {WITHOUT: 4.0, WITH: 5.0}
    world.build(plan, AUTO, library)
    world.times = UserError("the GPU has too little memory")
    world.build(plan, AUTO, library, force=True)  # the same plan, which now stands undecided
    world.times = times
    assert not world.build(other, AUTO, library).cached
    assert other.read_bytes() == WITH
    assert world.build(plan, AUTO, library).cached
    assert plan.read_bytes() == WITH


def test_a_miss_of_parity_is_copied_with_the_engine(
    world: World, plan: Path, library: Path, tmp_path: Path
) -> None:
    world.verdicts = {WITHOUT: MISSED, WITH: MISSED}
    world.build(plan, AUTO, library)
    report = world.build(tmp_path / "other.plan", AUTO, library)
    assert report.cached
    assert report.missed == "parity FAILED"
    assert report.manifest["parity"] == {"passed": False}


def test_an_engine_without_a_contest_is_copied_with_the_reason_of_now(
    world: World, plan: Path, library: Path, tmp_path: Path
) -> None:
    world.build(plan, AUTO, None, "there is no nvcc")
    report = world.build(tmp_path / "other.plan", AUTO, None, "there is no CMake")
    assert report.cached
    choice = {"asked": "auto", "why": "there is no CMake"}
    assert report.manifest["sources"]["plugin_choice"] == choice
    assert not world.build(tmp_path / "off.plan", OFF, None, "plugins are off").cached
    assert not world.build(tmp_path / "contest.plan", AUTO, library).cached
    assert world.built == [WITHOUT, WITHOUT, WITHOUT, WITH]


Change = Callable[[World, Path, Path], None]


def another_library(world: World, plan: Path, library: Path) -> None:
    library.write_bytes(b"other code")
    world.build(plan, AUTO, library)


def no_library(world: World, plan: Path, library: Path) -> None:
    world.build(plan, AUTO, None, "there is no nvcc")


def another_level(world: World, plan: Path, library: Path) -> None:
    world.build(plan, replace(AUTO, level=1), library)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (another_library, "weighed_plugin: "),
        (no_library, "weighed_plugin: "),
        (another_level, "options.level: none, now 1"),
    ],
)
@pytest.mark.parametrize("faster", [WITHOUT, WITH])
def test_another_contest_is_held_anew_and_says_why(
    world: World, plan: Path, library: Path, faster: bytes, change: Change, why: str
) -> None:
    world.times = {WITHOUT: 6.0, WITH: 6.0, faster: 5.0}
    world.build(plan, AUTO, library)
    world.notes.clear()
    change(world, plan, library)
    (line,) = (note for note in world.notes if "anew" in note)
    assert why in line
    assert ("model: " in line) == (change is no_library and faster == WITH)
    assert len(world.built) > 2
