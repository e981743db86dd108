"""Write into the model card what was measured, so that no number in it is typed by hand.

    python benchmarks/model_card.py [--quality FILE] [--run FILE] [--photographs FILE]

The card (`docs/model-card.md`) and the credits that ship beside the weights have sections between
``<!-- NAME from FILE -->`` and ``<!-- end -->``, made from JSON files of the repository: what
``quality.py`` (or printed: a Markdown file is taken as it is) and ``training_curves.py --json``
wrote, and the list that ``mat_torch.photographs`` wrote. All sections are written again; a FILE
that is given, within the repository, takes the place of the one that a section named before. A test
holds card and files together.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quality import markdown

from mat_export.console import note
from mat_export.contract import UserError
from mat_export.files import atomic_write
from mat_export.shipped import SHIPPED
from mat_torch.scores import EvaluationError
from mat_torch.training_options import TRAINING_PRESETS

ROOT = Path(__file__).parent.parent
CARD = ROOT / "docs" / "model-card.md"
CREDITS = SHIPPED.with_suffix(".credits.md")

_SECTION = re.compile(r"<!-- (\w+) from (\S+) -->\n.*?<!-- end -->", re.DOTALL)
_NOWHERE = "nowhere-yet"


def evaluation(report: Mapping[str, Any]) -> str:
    """The figures on held-out photographs."""
    where = report["machine"].get("gpu") or report["machine"]["cpu"]
    head = f"Measured {report['date'][:10]} on {where}, weights {report['model']['digest'][:12]}."
    return f"{head}\n\n{markdown(report)}"


def training(run: Mapping[str, Any]) -> str:
    """How the run was made: its commands, its length, and what differs from the published one."""
    options, counters = run["options"], run["counters"]
    published = TRAINING_PRESETS["published"].to_dict()
    rows = [
        f"| `{name}` | {value} | {published[name]} |"
        for name, value in options.items()
        if name != "config" and name in published and value != published[name]
    ]
    commands = "\n".join(run["commands"])
    length = (
        f"{counters['images']:,} images in {counters['steps']:,} steps of {options['batch']}, "
        f"{counters['skipped']:,} of them skipped; {run['hours']:.1f} hours at "
        f"{run['images_per_second']:.0f} images/s, {run['waiting_share']:.1%} of the time waiting "
        "for data (medians of the log)."
    )
    table = "\n".join(["| setting | here | published |", "|---|---|---|", *rows])
    heading = "Settings that differ from the published recipe:"
    return "\n\n".join((length, f"```console\n{commands}\n```", heading, table))


def data(pictures: Sequence[Mapping[str, Any]]) -> str:
    """Packages, how many of their pictures were taken, and the licences."""
    lines = [
        "| package | version | photographs | textures | held out | licences |",
        "|---|---|--:|--:|--:|---|",
    ]
    packages: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for picture in pictures:
        packages[picture["package"], picture["version"]].append(picture)
    for (package, version), taken in sorted(packages.items()):
        kinds = Counter(_kind(picture) for picture in taken)
        licences = ", ".join(sorted({picture["licence"] for picture in taken}))
        counts = " | ".join(str(kinds[kind]) for kind in _KINDS)
        lines.append(f"| {package} | {version} | {counts} | {licences} |")
    total = Counter(map(_kind, pictures))
    lines.append(f"| all | | {' | '.join(str(total[kind]) for kind in _KINDS)} | |")
    return "\n".join(lines)


_KINDS = ("photograph", "texture", "held out")


def _kind(picture: Mapping[str, Any]) -> str:
    if picture["file"].startswith("heldout/"):
        return "held out"
    return "texture" if picture["texture"] else "photograph"


def credits_(pictures: Sequence[Mapping[str, Any]]) -> str:
    """Every picture by package, licence and author; those held out are marked."""
    parts: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for picture in sorted(pictures, key=lambda each: each["file"].partition("/")[2]):
        name = Path(picture["file"]).stem.partition("--")[2]
        mark = " (held out)" if _kind(picture) == "held out" else ""
        group = picture["licence"], picture["author"]
        parts[f"{picture['package']} {picture['version']}"][group].append(name + mark)
    lines = []
    for package, groups in parts.items():
        lines += [f"## {package}", ""]
        lines += [
            f"- **{licence}** – {_plain(author)}: {', '.join(names)}"
            for (licence, author), names in sorted(groups.items())
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


def _plain(text: str) -> str:
    """An author's line as Markdown shows it: no tags, no addresses."""
    return re.sub(r"\s*<[^>]*>", "", text).replace("_", r"\_").strip()


SECTIONS: dict[str, Callable[[Any], str]] = {
    "evaluation": evaluation,
    "training": training,
    "data": data,
    "credits": credits_,
}


def rendered(
    text: str,
    files: Mapping[str, str] | None = None,
    sections: Mapping[str, Callable[[Any], str]] = SECTIONS,
) -> str:
    """A page with its sections written anew.

    Args:
        text: The page.
        files: Section → file that it is made from now, relative to the repository.
        sections: What makes each section of its file.

    Raises:
        UserError: If a section is unknown, or its file cannot be read or is something else.
    """

    def section(match: re.Match[str]) -> str:
        name, file = match[1], (files or {}).get(match[1], match[2])
        if name not in sections:
            raise UserError(f"there is no section '{name}': there are {', '.join(sections)}")
        if file == _NOWHERE:
            return match[0]
        try:
            source = (ROOT / file).read_text(encoding="utf-8")
            printed = file.endswith(".md")
            content = source.strip() if printed else sections[name](json.loads(source))
        except (OSError, ValueError, KeyError, TypeError, EvaluationError) as error:
            raise UserError(
                f"the section '{name}' cannot be made from '{file}': {error}"
            ) from error
        return f"<!-- {name} from {file} -->\n{content}\n<!-- end -->"

    return _SECTION.sub(section, text)


def sources(text: str) -> dict[str, str]:
    """Section → the file that a page says it is made from."""
    return {match[1]: match[2] for match in _SECTION.finditer(text)}


def main(words: Sequence[str] | None = None) -> int:
    """Write card and credits anew; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quality", type=Path, help="of quality.py")
    parser.add_argument("--run", type=Path, help="of training_curves.py --json")
    parser.add_argument("--photographs", type=Path, help="of python -m mat_torch.photographs")
    arguments = parser.parse_args(words)
    given = {
        "evaluation": arguments.quality,
        "training": arguments.run,
        "data": arguments.photographs,
        "credits": arguments.photographs,
    }
    try:
        files = {name: inside(path) for name, path in given.items() if path is not None}
        pages = {
            page: rendered(page.read_text(encoding="utf-8"), files) for page in (CARD, CREDITS)
        }
        for page, text in pages.items():
            atomic_write(page, text)
            note(f"wrote {page.relative_to(ROOT)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def inside(path: Path) -> str:
    """A path relative to the repository."""
    if not path.resolve().is_relative_to(ROOT):
        raise UserError(f"'{path}' is outside the repository: copy it to benchmarks/results first")
    return path.resolve().relative_to(ROOT).as_posix()


if __name__ == "__main__":
    sys.exit(main())
