"""The model card says what was measured, and what was measured is of the model that ships."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mat_export.contract import UserError
from mat_torch.photographs import PACKAGES
from mat_torch.training_options import training_preset

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/model_card.py as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("model_card")


def picture(file: str, **changes: Any) -> dict[str, Any]:
    """An entry of photographs.json."""
    entry = {"file": file, "package": "some-photos", "version": "1.0", "author": "A <a@b.c>"}
    return {**entry, "licence": "CC0-1.0", "texture": False, **changes}


PICTURES = [
    picture("train/some-photos--hill.jpg"),
    picture("train/some-photos--brick.jpg", texture=True, licence="GPL-2+", author="B_C"),
    picture("heldout/some-photos--lake.jpg"),
]

RUN = {
    "commands": ["mat-export train --data pictures -o run"],
    "options": {**training_preset("small").to_dict(), "images": 1234},
    "counters": {"images": 1234, "steps": 40, "skipped": 1, "skipped_in_row": 0},
    "hours": 1.5,
    "images_per_second": 250.0,
    "waiting_share": 0.02,
}


# -- how sections are made ------------------------------------------------------------------------


def test_sections_are_made_from_the_files_that_they_name(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "photographs.json").write_text(json.dumps(PICTURES))
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    page = (
        "before\n<!-- data from photographs.json -->\nold\n<!-- end -->\nbetween\n"
        "<!-- training from nowhere-yet -->\nNot trained yet.\n<!-- end -->\nafter\n"
    )
    once = script.rendered(page)
    assert "old" not in once
    assert "| some-photos | 1.0 | 1 | 1 | 1 | CC0-1.0, GPL-2+ |" in once
    assert "Not trained yet." in once
    full = script.rendered(once, {"training": "run.json"})
    assert "1,234 images in 40 steps of 16, 1 of them skipped; 1.5 hours" in full
    assert "mat-export train --data pictures -o run" in full
    assert "| `learning_rate` | 0.002 | 0.001 |" in full
    assert "`eps`" not in full  # as published
    assert script.rendered(full) == full
    assert script.sources(full) == {"data": "photographs.json", "training": "run.json"}
    assert full.startswith("before\n")
    assert full.endswith("after\n")


def test_credits_name_every_picture_and_no_address(script: Any) -> None:
    text = script.credits_(PICTURES)
    assert "- **CC0-1.0** – A: hill, lake (held out)" in text
    assert r"- **GPL-2+** – B\_C: brick" in text
    assert "a@b.c" not in text


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("<!-- data from absent.json -->\n<!-- end -->", "'data' cannot be made from 'absent"),
        ("<!-- weather from a.json -->\n<!-- end -->", "no section 'weather'"),
        ("<!-- training from odd.json -->\n<!-- end -->", "'training' cannot be made from 'odd"),
    ],
)
def test_what_cannot_be_made_is_said(
    script: Any, tmp_path: Path, page: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "odd.json").write_text("[1]")
    with pytest.raises(UserError, match=says):
        script.rendered(page)


# -- the card that ships --------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["CARD", "CREDITS"])
def test_pages_say_what_their_files_say(script: Any, page: str) -> None:
    text = getattr(script, page).read_text(encoding="utf-8")
    assert script.rendered(text) == text


def test_every_section_of_the_card_has_its_file(script: Any) -> None:
    sources = script.sources(script.CARD.read_text(encoding="utf-8"))
    assert sources.keys() == {"evaluation", "training", "data"}
    for name, file in sources.items():
        assert (script.ROOT / file).is_file(), name


def test_the_card_judges_every_bar_by_its_figures(script: Any) -> None:
    text = script.CARD.read_text(encoding="utf-8")
    bars = re.findall(
        r"^\| (.+?) \| (-?[\d.]+) \| ([≤≥]) (-?[\d.]+) \| (\w+) \|$", text, re.MULTILINE
    )
    assert len(bars) == 4
    for what, found, sign, limit, verdict in bars:
        met = float(found) <= float(limit) if sign == "≤" else float(found) >= float(limit)
        assert verdict == ("passed" if met else "MISSED"), what
    # Nearer to photographs than what needs no training.
    assert all(float(found) < 1.0 for what, found, *_ in bars if "feature distance" in what)


def test_a_section_that_was_printed_is_taken_as_it_is(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "said.md").write_text("Measured.\n\n| a |\n")
    page = "<!-- evaluation from said.md -->\nold\n<!-- end -->\n"
    expected = "<!-- evaluation from said.md -->\nMeasured.\n\n| a |\n<!-- end -->\n"
    assert script.rendered(page) == expected


@pytest.mark.parametrize("page", ["CARD", "CREDITS"])
def test_what_a_page_links_to_is_there(script: Any, page: str) -> None:
    path = getattr(script, page)
    links = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    missing = [x for x in links if "://" not in x and not (path.parent / x).exists()]
    assert missing == []


def test_credits_are_of_the_pictures_that_are_gathered(script: Any) -> None:
    sources = script.sources(script.CREDITS.read_text(encoding="utf-8"))
    entries = json.loads((script.ROOT / sources["credits"]).read_text(encoding="utf-8"))
    credited = {(e["package"], e["original"], e["file"].partition("/")[0]) for e in entries}
    listed = {(p.name, p.path.format(name), side) for p in PACKAGES for name, side, _ in p.listed()}
    assert credited == listed
