"""With the plugin library or without it: build both, keep the faster one that passes parity.

A plugin may beat TensorRT's own kernels, but it stands between layers that TensorRT would fuse.
Which weighs more depends on its version and the GPU, so both engines are measured where they are
to run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engines.backend import Backend, find_gpu
from engines.build import (
    Build,
    BuildReport,
    Note,
    Progress,
    build_engine,
    check_build,
    find_built,
    run_build,
)
from engines.index import remember_engine
from engines.options import BuildOptions, Size
from engines.papers import open_plan, save_engine
from engines.plugins.library import check_library, describe_library, library_for
from engines.process import temporary_folder
from engines.profiles import best_of, ranges_of
from engines.timing import time_plans
from mat_export.contract import GraphSpec, RunError, UserError, plugin_problem
from mat_export.files import file_digest

__all__ = ["Contest", "Verdict", "build_chosen", "find_library"]

Prepare = Callable[[bool], tuple[bytes, dict[str, Any]]]
"""The graph that calls the plugins, or holds functions, as a file, and its sources (see
`engines.build.check_build`)."""

_TRIAL_ERRORS = (UserError, RunError)
"""What an engine may fail with when it is run."""


@dataclass(frozen=True)
class Verdict:
    """What a parity check of an engine found.

    Attributes:
        passed: Whether it reaches the bar of its precision.
        words: The figure that counts, or what failed.
        figures: Everything, of JSON's types.
    """

    passed: bool
    words: str
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Contest:
    """How two engines of one model are held against each other.

    Attributes:
        judge: Called with a plan, a batch, a size in pixels and a progress: the parity of that
            engine, held against the model's reference. UserError where that cannot be run.
        inputs: Called with a specification, a batch and a size: inputs to time engines with.
        problem: Why parity cannot be checked on this machine at all; empty where it can.
    """

    judge: Callable[[Path, int, Size, Progress], Verdict]
    inputs: Callable[[GraphSpec, int, Size], Mapping[str, NDArray[Any]]]
    problem: str = ""


def find_library(
    backend: Backend,
    options: BuildOptions,
    precision: str,
    spec: GraphSpec,
    given: Path | None = None,
    *,
    progress: Progress = lambda phase, done, total: None,
) -> tuple[Path | None, str]:
    """The plugin library that a build can use: the one given, one in the cache, or one built now.

    Args:
        backend: What builds the engine.
        options: What is asked; ``plugins`` says whether there must, may or must not be a library.
        precision: What the graph is typed in.
        spec: The graph; nothing is compiled for a network that there are no kernels for.
        given: The library to use.
        progress: Hears how far a library is that has to be built.

    Returns:
        The library, or None and in a few words why there is none.

    Raises:
        UserError: If plugins are ``on`` or a library is given, and it cannot be used: the backend
            has no plugin layers, no kernel is for the network, the library is for another TensorRT
            or GPU, or what it takes to build one is missing.
    """
    if options.plugins == "off":
        if given is not None:
            raise UserError(
                f"--plugins off leaves no use for the plugin library '{given}': leave out one of "
                "the two"
            )
        return None, "plugins are off"
    problem = plugin_problem(spec.config)
    if problem and options.plugins == "auto" and given is None:
        return None, problem
    if problem:
        raise UserError(f"{problem}: build with --plugins off")
    try:
        backend.check_plugins(precision, options)
        capability = find_gpu().capability
        if given is None:
            return library_for(backend.major, capability, progress=progress).absolute(), ""
        check_library(describe_library(given), backend.major, capability)
        return given.absolute(), ""
    except UserError as error:
        if options.plugins == "auto" and given is None:
            return None, str(error)
        raise UserError(f"the engine cannot call plugins: {error}") from error


def build_chosen(
    prepare: Prepare,
    output: Path,
    options: BuildOptions,
    library: Path | None,
    why: str,
    contest: Contest,
    *,
    progress: Progress = lambda phase, done, total: None,
    note: Note = lambda text: None,
    force: bool = False,
    timing_cache: Path | None = None,
) -> BuildReport:
    """Build an engine with plugins, without, or whichever of the two is faster.

    The manifest's ``sources`` say what became of it: ``plugin`` is the library that the engine
    calls, and ``plugin_choice`` has the reason and, of a contest, both times and parities; with
    ``missed``, what the engine that was kept failed in, and with ``undecided``, that the contest is
    to be held again.

    Args:
        prepare: Makes the graph.
        output: The plan to write; its manifest goes beside it.
        options: What to build it for. With ``auto``, a library and a reference both are built.
        library: What `find_library` found.
        why: Why it found none.
        contest: How the two are compared.
        progress: Hears how far the work is.
        note: Called with lines about the work.
        force: Build even if the same request built it before.
        timing_cache: As in `build_engine`.

    Raises:
        UserError: As `build_engine`; of two builds one may fail.
    """
    if options.plugins == "auto" and library is not None and contest.problem:
        library, why = None, contest.problem
    if options.plugins == "auto" and library is not None:
        return _build_faster(
            prepare, output, options, library, contest, progress, note, force, timing_cache
        )
    if options.plugins == "auto":
        note(f"building without plugins: {why}")
    model, sources = prepare(library is not None)
    sources |= {
        "plugin": None if library is None else _papers_of(library),
        "plugin_choice": {"asked": options.plugins, "why": why or "plugins are on"},
    }
    return build_engine(
        model,
        output,
        options,
        sources=sources,
        progress=progress,
        note=note,
        force=force,
        timing_cache=timing_cache,
    )


def _papers_of(library: Path) -> dict[str, str]:
    """How a manifest names a library."""
    return {"path": str(library), "sha256": file_digest(library)}


# -- the contest -----------------------------------------------------------------------------------


@dataclass
class _Trial:
    """One of the two engines.

    Attributes:
        name: ``with plugins`` or ``without plugins``.
        build: What to build.
        path: The plan.
        manifest: Its manifest, once it is built.
        verdict: Of its parity, once it is checked.
        milliseconds: Median on the GPU, once it is timed.
        problem: Why it cannot be kept, or the times are not known; empty if nothing went wrong.
    """

    name: str
    build: Build
    path: Path
    manifest: dict[str, Any] | None = None
    verdict: Verdict | None = None
    milliseconds: float | None = None
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is built and passes parity."""
        return self.verdict is not None and self.verdict.passed

    def figures(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "milliseconds": self.milliseconds,
            "parity": None if self.verdict is None else dict(self.verdict.figures),
            "problem": self.problem or None,
        }

    def __str__(self) -> str:
        measured = "not timed" if self.milliseconds is None else f"{self.milliseconds:.2f} ms"
        said = "" if self.verdict is None else self.verdict.words
        return f"{self.name}: {measured}, {'; '.join(filter(None, (said, self.problem)))}"


def _build_faster(
    prepare: Prepare,
    output: Path,
    options: BuildOptions,
    library: Path,
    contest: Contest,
    progress: Progress,
    note: Note,
    force: bool,
    timing_cache: Path | None,
) -> BuildReport:
    """Build both, unless the one to keep is known from the same contest; keep one."""
    started = time.monotonic()
    papers = _papers_of(library)
    builds = []
    for plugin in (None, papers):
        model, sources = prepare(plugin is not None)
        sources["plugin"] = plugin
        builds.append(
            check_build(model, output, options, sources=sources, weighed=papers["sha256"])
        )
    found = None if force else find_built(output, builds, note)
    if found is not None:
        return BuildReport(output, found, True, time.monotonic() - started)
    note("building twice, without plugins and with them (--plugins on or off builds once)")
    with temporary_folder() as folder:
        plain = _Trial("without plugins", builds[0], folder / "without.plan")
        ours = _Trial("with plugins", builds[1], folder / "with.plan")
        for trial, start in ((plain, 0), (ours, 50)):
            _build(trial, _part(progress, trial, start, 40), note, timing_cache)
            _check_parity(trial, contest, _part(progress, trial, start + 40, 9))
        _measure((plain, ours), contest)
        for trial in (plain, ours):
            note(str(trial))
        kept, why = _choose(plain, ours)
        if kept.manifest is None:
            raise UserError(kept.problem)
        note(f"kept the engine {kept.name}: {why}")
        choice: dict[str, Any] = {
            "asked": options.plugins,
            "why": why,
            "library": papers,
            "with_plugins": ours.figures(),
            "without_plugins": plain.figures(),
        }
        if plain.passed and ours.passed and None in (plain.milliseconds, ours.milliseconds):
            choice["undecided"] = True
        manifest = save_engine(kept.path.read_bytes(), output, _manifest(kept, choice))
        if "undecided" not in choice:  # the engine of either request is the one that won
            remember_engine(output, manifest, [build.key for build in builds])
    progress("built", 100, 100)
    return BuildReport(output, manifest, False, time.monotonic() - started)


def _manifest(kept: _Trial, choice: dict[str, Any]) -> dict[str, Any]:
    """What the manifest of the engine that was kept says; of parity, no more than a failure."""
    manifest = {**(kept.manifest or {})}
    if kept.verdict is not None and not kept.passed:
        choice = {**choice, "missed": kept.verdict.words}
        manifest["parity"] = dict(kept.verdict.figures)
    manifest["sources"] = {**kept.build.sources, "plugin_choice": choice}
    return manifest


def _part(progress: Progress, trial: _Trial, start: int, percent: int) -> Progress:
    """Tells a piece of the work as so many percent of the whole."""
    return lambda phase, done, total: progress(
        f"{trial.name}: {phase}", start + percent * done // max(total, 1), 100
    )


def _build(trial: _Trial, progress: Progress, note: Note, timing_cache: Path | None) -> None:
    """Build an engine; why it cannot be built is the trial's problem."""
    try:
        trial.manifest = run_build(
            trial.build, trial.path, progress=progress, note=note, timing_cache=timing_cache
        )
    except UserError as error:
        trial.problem = str(error)


def _check_parity(trial: _Trial, contest: Contest, progress: Progress) -> None:
    """Hold what was built against the reference, at the smallest batch and size."""
    if trial.manifest is None:
        return
    batches, sizes = ranges_of(trial.build.spec, trial.build.options)
    try:
        trial.verdict = contest.judge(trial.path, batches[0], sizes[0], progress)
    except _TRIAL_ERRORS as error:
        trial.problem = f"its parity could not be checked: {error}"


def _measure(trials: Sequence[_Trial], contest: Contest) -> None:
    """Time what was built and runs, in turns, at the batch and size to be fastest at."""
    running = [trial for trial in trials if trial.verdict is not None]
    if not running:
        return
    build = running[0].build
    try:
        inputs = contest.inputs(build.spec, *best_of(build.spec, build.options))
        times = time_plans([open_plan(trial.path) for trial in running], inputs)
        for trial, milliseconds in zip(running, times, strict=True):
            trial.milliseconds = milliseconds
    except _TRIAL_ERRORS as error:
        for trial in running:
            trial.problem = f"it could not be timed: {error}"


def _choose(plain: _Trial, ours: _Trial) -> tuple[_Trial, str]:
    """The engine to keep, and why."""
    if plain.passed and ours.passed:
        if plain.milliseconds is None or ours.milliseconds is None:
            return plain, f"both pass parity, and {plain.problem or ours.problem}"
        fast, slow = sorted((plain, ours), key=lambda trial: trial.milliseconds or 0.0)
        return fast, f"{fast.milliseconds:.2f} ms against {slow.milliseconds:.2f} ms"
    if plain.passed:
        return plain, f"the one with plugins does not pass: {_reason(ours)}"
    if ours.passed:
        return ours, f"the one without plugins does not pass: {_reason(plain)}"
    return plain, f"parity of neither is proven: {_reason(plain)}"


def _reason(trial: _Trial) -> str:
    """Why an engine does not pass."""
    return trial.problem if trial.verdict is None else trial.verdict.words
