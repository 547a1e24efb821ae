"""What the documentation says about the code is true: the command reference, links, exit codes, version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import loracli
from loracli import errors
from scripts.write_cli_reference import PAGE, reference

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def test_command_reference_is_what_the_commands_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run scripts/write_cli_reference.py"


def test_command_reference_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    before = reference()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert reference() == before


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for target in LINK.findall(CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_exit_codes_page_names_every_error_with_its_code() -> None:
    documented = {}
    for row in (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if cells[0].isdigit():
            documented.update(dict.fromkeys(re.findall(r"`(\w+)`", cells[2]), int(cells[0])))
    assert documented == {kind.__name__: kind.exit_code for kind in family(errors.LoracatError)}


def family(kind: type[errors.LoracatError]) -> list[type[errors.LoracatError]]:
    """A class of the tree and everything below it."""
    return [kind, *(one for child in kind.__subclasses__() for one in family(child))]


def test_changelog_has_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[?{re.escape(loracli.__version__)}\]? - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE)
