"""Run the process that builds an engine, and hear what became of it.

The process (`engines.worker`) may crash or be killed; Ctrl-C here ends it at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines import worker
from mat_export.contract import UserError

__all__ = ["WorkerLog", "run_worker", "temporary_folder"]

_PATIENCE_SECONDS = 5.0
"""How long the process may take to end by itself; it saves its timing cache in that time."""

_NOTED_WARNINGS = 10
"""Kinds of TensorRT's warnings that are shown; the manifest has them all."""


@dataclass
class WorkerLog:
    """TensorRT's warnings, by kind.

    Attributes:
        note: Called with the first of each kind.
        counts: How many there were of each kind.
        first: The first of each kind.
    """

    note: Callable[[str], None]
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def __call__(self, severity: str, text: str) -> None:
        if severity == "info":
            return
        line = " ".join(text.split())
        # Messages of one kind differ in names of layers and in figures.
        kind = re.sub(r"\S*[/.]\S*|\d+", "#", line)
        self.counts[kind] += 1
        if kind in self.first:
            return
        self.first[kind] = line
        if len(self.first) <= _NOTED_WARNINGS:
            self.note(f"TensorRT {severity}: {line if len(line) <= 300 else f'{line[:300]}…'}")
        elif len(self.first) == _NOTED_WARNINGS + 1:
            self.note("TensorRT gives more warnings: all are in the manifest")

    def kinds(self) -> list[dict[str, Any]]:
        """The first of each kind, and how many there were."""
        return [{"text": self.first[kind], "count": n} for kind, n in self.counts.items()]


def run_worker(
    model: bytes,
    request: worker.Request,
    label: str,
    progress: Callable[[str, int, int], None],
    log: WorkerLog,
) -> tuple[dict[str, Any], bytes]:
    """Build in a process of its own.

    Args:
        model: A typed ONNX file.
        request: What to build of it.
        label: What to call the backend in messages.
        progress: Called with what is being done, and how much of a total is done.
        log: Hears TensorRT's log.

    Returns:
        What the process tells of the engine, and the plan.

    Raises:
        UserError: If TensorRT refuses, the process dies, or there is no room for its files.
        RuntimeError: If it fails by a fault of ours.
    """
    with temporary_folder() as folder:
        try:
            (folder / worker.MODEL).write_bytes(model)
            (folder / worker.REQUEST).write_text(request.to_json(), encoding="utf-8")
            (folder / "stderr").touch()
        except OSError as error:
            raise worker.no_room(folder.parent, error) from error
        with (folder / "stderr").open("wb") as errors, _worker(folder, errors) as child:
            outcome = _listen(child, progress, log)
        if "refused" in outcome:
            raise UserError(outcome["refused"])
        if "done" not in outcome:
            raise _died(child.returncode, label, outcome.get("phase"), folder / "stderr")
        return outcome["done"], (folder / worker.PLAN).read_bytes()


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that goes, with all in it, when the block is left. Raises UserError without room."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="mat-export-"))
    except OSError as error:
        # Where no place takes a file, Python has not chosen one, and asking it again raises.
        raise worker.no_room(tempfile.tempdir, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _worker(folder: Path, errors: Any) -> Iterator[subprocess.Popen[str]]:
    """A running worker, which has ended when the block is left, however that happens."""
    paths = [str(Path(__file__).parent.parent), *sys.path]
    child = subprocess.Popen(
        [sys.executable, "-m", "engines.worker", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        cwd=folder,  # -m looks there first, and the user's folder may hold anything
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in paths)},
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C is for us alone; we end the worker
    )
    try:
        yield child
    finally:
        _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    """Let a worker end, then make it; a second Ctrl-C makes it at once."""
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(OSError):
            child.stdin.close()
        for harder in (child.terminate, child.kill):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_PATIENCE_SECONDS)
                break
            harder()
        child.wait()
        child.stdout.close()
    except BaseException:
        child.kill()
        child.wait()
        raise


def _listen(
    child: subprocess.Popen[str], progress: Callable[[str, int, int], None], log: WorkerLog
) -> dict[str, Any]:
    """Pass events on until the outcome: ``done``, ``refused``, or the ``phase`` it died in."""
    phase = None
    assert child.stdout is not None
    for line in child.stdout:
        try:
            event: dict[str, Any] = json.loads(line)
        except ValueError:  # cut off in the middle
            break
        if "log" in event:
            log(*event["log"])
        elif "progress" in event:
            phase = event["progress"][0]
            progress(*event["progress"])
        else:
            return event
    return {"phase": phase}


def _died(status: int, label: str, phase: str | None, errors: Path) -> Exception:
    """What to raise when a worker ended without an outcome."""
    lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    where = f", at '{phase}'" if phase else ""
    if status >= 0:  # an exception of ours that nobody foresaw
        return RuntimeError("the building process failed:\n" + "\n".join(lines[-40:]))
    number = -status
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number == signal.SIGKILL:
        return UserError(
            f"the process in which {label} was building was killed ({name}{where}), most likely "
            "for want of memory: close other programs, or ask for less with --batch or --size"
        )
    last = f": {lines[-1].strip()}" if lines else ""
    return UserError(
        f"{label} died while building ({name}{where}){last}; nothing was written: try another "
        "--level or --backend"
    )
