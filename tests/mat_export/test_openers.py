"""Further file types open by a table of names, in this process and in those of the benchmark."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mat_export.bench import bench
from mat_export.contract import UserError
from mat_export.openers import OPENERS, opener_of, register_opener
from mat_export.parity import open_candidate
from mat_export.runners import open_runner

MODULE = '''
"""A file type of somebody else, which holds a colour."""
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
from fake_runner import FakeRunner
from mat_export.contract import UserError


class ShadeRunner(FakeRunner):
    def __init__(self, path, *, threads=None):
        text = Path(path).read_text()
        if text == "broken":
            raise UserError("'shade' is broken: make another")
        super().__init__(shade=float(text))
        self.name = f"shade {{text}}, {{threads}} threads"
'''


@pytest.fixture(autouse=True)
def _empty_table() -> Iterator[None]:
    before = dict(OPENERS)
    OPENERS.clear()
    yield
    OPENERS.clear()
    OPENERS.update(before)


@pytest.fixture
def shade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file whose type is registered, by a module that nothing has imported yet."""
    (tmp_path / "shade_files.py").write_text(MODULE.format(tests=str(Path(__file__).parent)))
    monkeypatch.syspath_prepend(str(tmp_path))
    register_opener(".Shade", "shade_files:ShadeRunner")
    path = tmp_path / "one.shade"
    path.write_text("0.25")
    yield path
    sys.modules.pop("shade_files", None)


def test_registering_imports_nothing(shade: Path) -> None:
    assert OPENERS == {".shade": "shade_files:ShadeRunner"}
    assert "shade_files" not in sys.modules
    assert opener_of("x.other") is None
    assert "shade_files" not in sys.modules
    opener = opener_of("x.SHADE")
    assert opener is sys.modules["shade_files"].ShadeRunner


def test_a_registered_type_opens_to_run_and_to_be_judged(shade: Path) -> None:
    for open_file in (open_runner, open_candidate):
        with open_file(shade, threads=3) as runner:
            assert runner.name == "shade 0.25, 3 threads"


def test_its_errors_and_a_missing_file_are_one_sentence(shade: Path) -> None:
    with pytest.raises(UserError, match=r"no file '.*two\.shade'"):
        open_runner(shade.with_name("two.shade"))
    shade.write_text("broken")
    with pytest.raises(UserError, match="'shade' is broken"):
        open_candidate(shade)


def test_an_unregistered_type_is_read_as_a_checkpoint(shade: Path) -> None:
    OPENERS.clear()
    with pytest.raises(UserError, match="no checkpoint"):
        open_runner(shade)


def test_the_benchmarks_processes_know_the_table(shade: Path) -> None:
    assert not list(shade.parent.glob("*.pyc"))
    report = bench([shade], runs=1, warmup=0, batch=2, threads=1)
    assert report.models[0].runner == "shade 0.25, 1 threads"
    assert report.models[0].batch == 2
    assert "shade_files" not in sys.modules  # it ran in the other process alone


def test_registering_anew_replaces() -> None:
    register_opener(".a", "one:Thing")
    register_opener(".A", "package.two:Thing")
    assert OPENERS == {".a": "package.two:Thing"}


@pytest.mark.parametrize(
    ("suffix", "target"),
    [
        ("plan", "m:A"),
        ("", "m:A"),
        (".", "m:A"),
        (".tar.gz", "m:A"),
        (".onnx", "m:A"),
        (".ONNX", "m:A"),
        (".x", "m"),
        (".x", "m:"),
        (".x", ":A"),
        (".x", "m.py:A B"),
        (".x", "m:A.b"),
    ],
)
def test_what_names_no_type_or_no_code_is_refused(suffix: str, target: str) -> None:
    with pytest.raises(ValueError, match="got '"):
        register_opener(suffix, target)
    assert OPENERS == {}
