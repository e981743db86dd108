"""The process that builds an engine: ``python -m engines.worker FOLDER``.

TensorRT may crash, hang or be killed for want of memory; here it takes nobody with it. The parent
(`engines.build`) puts ``model.onnx`` and ``request.json`` into the folder and reads events from
standard output, one JSON object a line; the plan appears as ``engine.plan``. When the parent closes
standard input, or dies, this process saves its timing cache, removes the folder and ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from engines.backend import Backend, BuildHooks, Progress, open_backend
from engines.layers import summarise
from engines.options import BuildOptions
from engines.profiles import Profiles
from mat_export.contract import UserError
from mat_export.files import atomic_write

__all__ = ["CacheFile", "CacheKeeper", "Percentage", "Request", "main", "no_room"]

MODEL, REQUEST, PLAN = "model.onnx", "request.json", "engine.plan"
"""Names of the files in the folder."""

CANCELLED = 130
"""Exit status when the parent has closed standard input."""

_SAVE_SECONDS = 20.0
"""How often a growing timing cache is saved."""

_POLL_SECONDS = 0.2

_TELL_POINTS, _TELL_SECONDS = 5, 2.0
"""Progress is told in steps of so many percent, or less after so long: each is a line in a log."""

_QUIET_SECONDS = 10.0
"""After so long it is told though nothing has risen: TensorRT 8.6 spends half of a build on layouts
when it has been through all layers."""

_LAST_SAVE_SECONDS = 3.0
"""How long a cancelled build may take to save its timing cache."""


@dataclass(frozen=True)
class Request:
    """What to build.

    Attributes:
        options: Checked, with backend and target resolved.
        profiles: Shapes of every dynamic input.
        cache: The timing cache's file, or None to keep none.
        own_cache: The file is of our cache folder: what is no timing cache in it is replaced.
        inspect: Load the plan on this machine's GPU when it is built, and tell its layers.
        plugin: The library of the operators that the model calls, or None.
    """

    options: BuildOptions
    profiles: Profiles
    cache: Path | None
    inspect: bool
    plugin: Path | None = None
    own_cache: bool = False

    def to_json(self) -> str:
        """Text that from_json reads back."""
        return json.dumps(
            {
                "options": self.options.to_dict(),
                "profiles": self.profiles,
                "cache": None if self.cache is None else str(self.cache),
                "inspect": self.inspect,
                "plugin": None if self.plugin is None else str(self.plugin),
                "own_cache": self.own_cache,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Request:
        """The request that to_json wrote."""
        entries = json.loads(text)
        return cls(
            options=BuildOptions.from_dict(entries["options"]),
            profiles={
                name: (tuple(low), tuple(best), tuple(high))
                for name, (low, best, high) in entries["profiles"].items()
            },
            cache=None if entries["cache"] is None else Path(entries["cache"]),
            inspect=entries["inspect"],
            plugin=None if entries["plugin"] is None else Path(entries["plugin"]),
            own_cache=entries["own_cache"],
        )


def main(arguments: list[str]) -> int:
    """Build what the folder asks for; 0 if ``done`` or ``refused`` was said."""
    folder = Path(arguments[0])
    events = _Events(_private_output())
    state = _State()
    threading.Thread(target=_leave_with_parent, args=(folder, state), daemon=True).start()
    try:
        outcome: dict[str, Any] = {"done": _build(folder, events, state)}
    except UserError as error:
        outcome = {"refused": str(error)}
    state.finished.set()
    events.tell(**outcome)
    return 0


class _State:
    """What the threads of this process tell each other.

    Attributes:
        cancelled: The build is to stop.
        saved: There is nothing to save of the timing cache.
        finished: The outcome is known; the folder is the parent's.
    """

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.saved = threading.Event()
        self.saved.set()
        self.finished = threading.Event()


def _build(folder: Path, events: _Events, state: _State) -> dict[str, Any]:
    request = Request.from_json((folder / REQUEST).read_text(encoding="utf-8"))
    backend = open_backend(request.options.backend, target=request.options.target)
    if request.plugin is not None:
        backend.load_plugins(request.plugin)
    progress = Percentage(lambda phase, done, total: events.tell(progress=[phase, done, total]))

    def log(severity: str, text: str) -> None:
        events.tell(log=[severity, text])

    cache = None if request.cache is None else CacheFile(request.cache, own=request.own_cache)
    hooks = BuildHooks(
        log=log,
        progress=progress,
        cancelled=state.cancelled.is_set,
        timing_cache=None
        if cache is None
        else lambda config: CacheKeeper(config, cache, log, state.cancelled, state.saved),
    )
    model = (folder / MODEL).read_bytes()
    plan = backend.build(model, request.options, request.profiles, hooks)
    try:
        (folder / PLAN).write_bytes(plan)
    except OSError as error:
        raise no_room(folder.parent, error) from error
    progress.complete()
    return _inspect(backend, plan, request, log) if request.inspect else {}


def no_room(folder: Path | str | None, error: OSError) -> UserError:
    """What to raise where temporary files cannot be written; None is no folder at all."""
    where = "" if folder is None else f" to '{folder}'"
    return UserError(
        f"cannot write temporary files{where} ({error.strerror}): "
        "set TMPDIR to a folder with room for the model and the engine"
    )


def _inspect(
    backend: Backend, plan: bytes, request: Request, log: Callable[[str, str], None]
) -> dict[str, Any]:
    """Facts of a built engine that only a GPU can tell: that it loads, its memory, its layers."""
    backend.allow_host_code = request.options.version_compatible
    engine = backend.deserialize(plan)
    facts: dict[str, Any] = {"context_bytes": backend.context_memory(engine)}
    try:
        facts["layers"] = summarise(backend.layer_information(engine)).to_dict()
    except UserError as error:
        log("warning", str(error))
    return facts


# -- talking to the parent -----------------------------------------------------------------------


class _Events:
    """Lines of JSON for the parent; any thread may tell."""

    def __init__(self, channel: TextIO) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    def tell(self, **event: Any) -> None:
        """Write one event."""
        line = json.dumps(event)
        with self._lock:
            self._channel.write(f"{line}\n")
            self._channel.flush()


def _private_output() -> TextIO:
    """Standard output for events alone: what C++ code prints goes to standard error instead."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def _leave_with_parent(folder: Path, state: _State) -> None:
    """Wait until standard input ends; then save what is worth saving, and end at once.

    A build in TensorRT 8.6 cannot be cancelled, so this does not wait for it.
    """
    while os.read(0, 4096):
        pass
    if state.finished.is_set():
        return
    state.cancelled.set()
    state.saved.wait(_LAST_SAVE_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(CANCELLED)


# -- progress ------------------------------------------------------------------------------------


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Percentage(Progress):
    """Nested phases as one percentage that only rises, told now and then.

    Args:
        report: Called with what is being done, the percentage, and 100.
    """

    def __init__(self, report: Callable[[str, int, int], None]) -> None:
        self._report = report
        self._phases: dict[str, _Phase] = {}
        self._percent = -_TELL_POINTS
        self._told = float("-inf")
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = _Phase(parent if parent in self._phases else None, max(1, steps))
            percent = self._current()
        self.tell(name, percent)

    def step(self, name: str) -> None:
        with self._lock:
            if name in self._phases:
                self._phases[name].done += 1
            percent = self._current()
        self.tell(name, percent)

    def finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)

    def tell(self, name: str, percent: int) -> None:
        with self._lock:
            percent, now = max(min(percent, 99), self._percent), time.monotonic()
            risen = percent - self._percent
            wait = _TELL_SECONDS if risen else _QUIET_SECONDS
            if risen < _TELL_POINTS and now < self._told + wait:
                return
            self._percent, self._told = percent, now
        self._report(name, percent, 100)

    def complete(self) -> None:
        """Everything is done."""
        self._report("built", 100, 100)

    def _current(self) -> int:
        return int(100 * self._fraction(None))

    def _fraction(self, parent: str | None) -> float:
        """How much of a phase's running step its children have done; several may run at once."""
        return max(
            (
                min(1.0, (phase.done + self._fraction(name)) / phase.steps)
                for name, phase in self._phases.items()
                if phase.parent == parent
            ),
            default=0.0,
        )


# -- timing cache --------------------------------------------------------------------------------


class CacheFile:
    """A timing cache on disk, under a digest: TensorRT is never given a damaged one.

    Args:
        path: The file; its folder is made when it is first saved.
        own: It is of our cache folder, and nobody misses what is in it.
    """

    _MAGIC = b"mat-export timing cache 1\n"

    def __init__(self, path: Path, *, own: bool = False) -> None:
        self.path = path
        self.own = own

    def read(self) -> bytes | None:
        """All of the file, or None if it is not there. Raises UserError if it is unreadable."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(
                f"the timing cache '{self.path}' is unreadable: {error.strerror}"
            ) from error

    def load(self) -> bytes | None:
        """The cache, or None if there is none.

        Raises:
            UserError: If the file is no timing cache, or damaged.
        """
        data = self.read()
        return None if data is None else self._unpacked(data)

    def require_cache(self) -> None:
        """Raise UserError if there is something else, which will not be replaced."""
        data = self.read()
        if data:
            self._unpacked(data)

    def _unpacked(self, data: bytes) -> bytes:
        start = len(self._MAGIC)
        digest, cache = data[start : start + 32], data[start + 32 :]
        if not data.startswith(self._MAGIC) or hashlib.sha256(cache).digest() != digest:
            raise UserError(
                f"'{self.path}' is no timing cache of mat-export, or a damaged one: name another "
                "file, which need not be there yet"
            )
        return cache

    def save(self, cache: bytes) -> None:
        """Write the cache whole or not at all. Raises UserError or OSError if that fails."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, self._MAGIC + hashlib.sha256(cache).digest() + cache)


class CacheKeeper:
    """Gives a build the timing cache, and saves it as it grows from a thread of its own.

    A file that this TensorRT did not take for its timing cache is never replaced, unless it is
    empty or of our cache folder.

    Args:
        config: The builder configuration.
        file: Where the cache is kept.
        log: Called with a severity and a line.
        cancelled: Set when the build is to stop: the cache is saved once more.
        saved: Clear while there is something to save.
    """

    def __init__(
        self,
        config: Any,
        file: CacheFile,
        log: Callable[[str, str], None],
        cancelled: threading.Event,
        saved: threading.Event,
    ) -> None:
        self._config, self._file, self._log = config, file, log
        self._cancelled, self._saved = cancelled, saved
        self._cache: Any = None
        self._known: bytes | None = None
        self._found: bytes | None = None
        self._saves = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CacheKeeper:
        self._known = self._load()
        if not self._give(self._known or b"") and self._known:
            self._leave_aside("the timing cache is of another TensorRT or GPU")
            self._known = None
            self._give(b"")
        self._saved.clear()
        self._thread.start()
        return self

    def _give(self, data: bytes) -> bool:
        """Let the build use a cache; False if TensorRT does not take it.

        The object is held for as long as the build runs, and set once: a configuration of
        TensorRT 8.6 that was told twice of a cache that Python then freed began with an empty one.
        """
        self._cache = self._config.create_timing_cache(data)
        return bool(self._cache) and self._config.set_timing_cache(self._cache, False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._save(merge=True)
        self._saved.set()

    def _load(self) -> bytes | None:
        """The cache as it is in the file now; None if there is none to use."""
        try:
            self._found = None
            self._found = self._file.read()
            return self._file.load() if self._found else None
        except UserError as error:
            self._leave_aside(str(error))
            return None

    def _leave_aside(self, why: str) -> None:
        """Go on without what the file holds."""
        self._saves = self._file.own
        self._log("warning", f"{why}: left aside{'' if self._saves else ', and nothing is saved'}")

    def _has_changed(self) -> bool:
        """Whether another build has saved meanwhile."""
        try:
            return self._file.read() != self._found
        except UserError:
            return True

    def _merged(self, own: bytes) -> bytes:
        """What another build has saved, and our timings; copies, for the build may still run."""
        latest = self._load()
        if latest is None:
            return own
        both, ours = map(self._config.create_timing_cache, (latest, own))
        if both and ours and both.combine(ours, False):
            return bytes(both.serialize())
        self._leave_aside("TensorRT cannot merge this build's timing cache with another build's")
        return own

    def _watch(self) -> None:
        waited = 0.0
        while not self._stop.wait(_POLL_SECONDS):
            waited += _POLL_SECONDS
            if self._cancelled.is_set():
                self._save(merge=True)
                self._saved.set()
                return
            if waited >= _SAVE_SECONDS:
                waited = 0.0
                self._save()

    def _save(self, *, merge: bool = False) -> None:
        """Write the timings, with those of other builds if `merge`; else leave a file of theirs."""
        data = bytes(self._config.get_timing_cache().serialize())
        if not self._saves or data == self._known:
            return
        if self._has_changed():
            if not merge:
                return
            data = self._merged(data)
            if not self._saves:
                return
        try:
            self._file.save(data)
            self._known, self._found = data, self._file.read()
        except (OSError, UserError) as error:
            self._log("warning", f"the timing cache is not saved: {error}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
