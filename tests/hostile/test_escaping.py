"""Text of strangers in cards, reports and on the terminal: it is shown, is one line of text, and is told apart."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import regex
import yaml

from loracli.adapters.claims import read_front_matter
from loracli.errors import InputError, RecipeError
from loracli.export.export import export_adapter
from loracli.export.request import ExportRequest
from loracli.model.reference import locate_base
from loracli.recipe.recipe import load_recipe
from loracli.report.report import write_report
from loracli.system.escaping import html_text, markdown_code, markdown_link, shell_word, visible, yaml_text
from tests.cli.project import run
from tests.export.test_export import Made
from tests.test_recipe import saved

EVIL = '`<img src=x onerror=alert(1)>`|[a](javascript:x)\n\n# Heading\n```\n{{x}}"\\ \ufe0f\u3164\U000e0041\u202e'
LOOK_ALIKE = ("\ufe0f", "\u3164", "\u115f", "\uffa0", "\U000e0041", "\u00ad", "\u200b", "\u034f", "\u2800", "\u202e")


def test_every_character_that_is_not_seen_is_shown_by_its_code() -> None:
    """Held against the property as another library has it."""
    unseen = regex.compile(r"\p{Default_Ignorable_Code_Point}|\p{Bidi_Control}|\p{Cc}|\p{Cf}|\p{Cs}|\p{Zl}|\p{Zp}")
    for character in map(chr, range(0x110000)):
        if unseen.fullmatch(character):
            assert visible(character).isascii() and visible(character).startswith("\\")
    for character in "\u2800\U0001d159\U00016fe4\u2d7f\u1039\u17d2\u1a60\U00010a3f\U0001107f":  # drawn as nothing too
        assert visible(f"a{character}") == "a" + character.encode("unicode_escape").decode()
    assert visible("plain é 猫 🐈 модель") == "plain é 猫 🐈 модель"


@pytest.mark.parametrize("character", LOOK_ALIKE)
def test_two_names_that_look_alike_are_told_apart_everywhere(here: Path, character: str) -> None:
    """The name of a directory, on the terminal, in the report and in the card."""
    Path("form").rename(f"form{character}")
    document = json.loads(Path("recipe.json").read_text())
    text = json.dumps(document).replace('"form"', json.dumps(f"form{character}"))
    Path("recipe.json").write_text(text)
    assert run("export", "-o", "out").exit_code == 0
    assert run("report", "-o", "report.html").exit_code == 0
    shown = [Path("out/README.md").read_text(), Path("report.html").read_text()]
    for words in (("show",), ("inspect", "know", f"form{character}"), ("lint", f"form{character}")):
        done = run(*words)
        shown.append(done.stdout + done.stderr)
    code = character.encode("unicode_escape").decode()
    for said in shown:
        assert character not in said and f"form{code}" in said


@pytest.mark.parametrize("text", [EVIL, "plain", "a``b", "|", "\\", "a\u2028b\x85c\x00"])
def test_each_door_lets_text_through_as_text(text: str) -> None:
    assert unescape(html_text(text)) == visible(text)
    assert yaml.load(yaml_text(text), Loader=yaml.BaseLoader) == text
    code = markdown_code(text)
    assert code[0] == code[-1] == "`" and "`" not in code[1:-1] and "|" not in code and "\n" not in code
    assert "\n" not in shell_word(text)
    link = markdown_link(text, "org/name", "tree", text)
    assert re.fullmatch(r"\[`[^`\n]*`\]\(https://huggingface\.co/[\w./%@~-]+\)", link)


class Elements(HTMLParser):
    """The elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)


def outside_code(card: str) -> str:
    """The card without inline code and without fenced blocks."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", card, flags=re.MULTILINE | re.DOTALL))


def test_no_text_of_a_recipe_is_markup_in_the_card_or_the_report(tmp_path: Path) -> None:
    """A recipe made in memory, so that nothing but the doors stands between."""
    made = Made(tmp_path, "some layers only")
    adapters = tuple(replace(a, base_model=EVIL) for a in made.recipe.adapters)
    tables = replace(made.recipe.held_out, name=EVIL)
    recipe = replace(
        made.recipe,
        base=replace(made.recipe.base, id=EVIL),
        versions={"loracat": EVIL, EVIL: EVIL},
        adapters=adapters,
        held_out=tables,
        data=tuple(replace(d, name=EVIL) for d in made.recipe.data),
        fit=replace(made.recipe.fit, stopped=EVIL),
    )
    export_adapter(ExportRequest(recipe), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert read_front_matter(tmp_path / "out" / "README.md")["base_model"] == EVIL
    assert "img" not in outside_code(body) and "javascript" not in outside_code(body)
    assert not re.search(r"^# Heading", body, re.MULTILINE) and head.count("\n") < 20
    write_report(recipe, tmp_path / "report.html")
    page, elements = (tmp_path / "report.html").read_text(), Elements()
    elements.feed(page)
    assert "img" not in elements.found and "\ufe0f" not in page and "\u202e" not in page


def test_why_a_layout_is_not_portable_is_no_markup(tmp_path: Path) -> None:
    made = Made(tmp_path, "some layers only")
    module = next(module for module in made.recipe.modules if module.name.endswith("q_proj"))
    other = replace(module, name="`<img src=x onerror=alert(1)>`.q_proj", in_features=module.in_features + 1)
    recipe = replace(made.recipe, modules=(*made.recipe.modules, other))
    exported = export_adapter(ExportRequest(recipe), tmp_path / "out")
    assert exported.layout.reason and "<img" in exported.layout.reason
    assert "img" not in outside_code((tmp_path / "out" / "README.md").read_text())


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("base__commit", "main", "base.commit: expected a commit"),
        ("base__config_sha256", "E" * 64, "base.config_sha256: expected a sha256"),
        ("base__id", "a" * 300, "base.id: expected a name of 1 to 255 characters"),
        ("base__id", "<img src=x>", "base.id: '<img src=x>' has a commit and is not a repository on the Hub"),
        ("base__id", "a\nb", "base.id: 'a\\nb' has"),
        ("adapters__1__repo_id", "org/na me", "adapters[1].repo_id: expected a repository on the Hub"),
        ("adapters__1__repo_id", "evil/math", "adapters[1].reference: 'org/math@v1' does not name the repository"),
        ("adapters__1__commit", "a" * 39 + "g", "adapters[1].commit: expected a commit"),
        ("adapters__1__commit", None, "adapters[1].commit: one that has a repo_id has a commit"),
        ("adapters__1__subfolder", "../x", "adapters[1].subfolder: '../x' is not a folder"),
        ("adapters__0__reference", "a\0b", "adapters[0].reference: expected a name"),
        ("adapters__0__reference", "a/" * 3000, "adapters[0].reference: expected a name"),
        ("adapters__0__dtype", "<b>", "adapters[0].dtype: expected a name of letters"),
        ("data__0__sha256", "", "data[0].sha256: expected a sha256"),
        ("versions__loracat", "1.0](http://x)", "versions['loracat']: expected a version"),
        ("versions", {"<b>": "1"}, "a key of versions: expected a name of letters"),
        ("held_out__rows__0__name", "org/other", "held_out.rows[0].name: 'org/other' is none of the adapters"),
        ("held_out__rows__1__name", "base", "held_out.rows[1].name: 'base' is a second row of that name"),
    ],
)
def test_what_names_something_is_checked_when_a_recipe_is_read(
    tmp_path: Path, field: str, value: Any, said: str
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(saved(tmp_path, **{field: value})))
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.json")
    assert any(problem.startswith(said) for problem in caught.value.problems), caught.value.problems


def test_a_base_whose_directory_has_no_name_for_a_recipe_is_refused_before_a_fit(tmp_path: Path) -> None:
    folder = tmp_path / "a\nb"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="control characters"):
        locate_base(str(folder))
