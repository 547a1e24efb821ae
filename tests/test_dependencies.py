"""What is imported is declared, what is declared is imported, and docs/dependencies.md says why."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from scripts import check_distribution

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(t) for t in texts] for name, texts in PROJECT["optional-dependencies"].items()}
PAGE = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")


BY_TRANSFORMERS = {"jinja2"}  # which renders chat templates with it, and does not bring it along


def imported() -> set[str]:
    """Top-level names that the package imports, but for its own and the standard library's."""
    found = set()
    for path in (ROOT / "loracli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"loracli"}


def test_the_package_imports_what_it_declares_and_nothing_else() -> None:
    optional = {requirement.name for name in ("gguf", "lorahub") for requirement in EXTRAS[name]}
    homes = packages_distributions()
    found = {homes[name][0].lower().replace("_", "-") for name in imported()}
    assert found == {requirement.name for requirement in REQUIRED} - BY_TRANSFORMERS | optional


def test_the_page_has_every_dependency_with_its_bound() -> None:
    said = dict(re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \|", PAGE, re.MULTILINE))
    extras = [requirement for name in ("bitsandbytes", "gguf", "lorahub") for requirement in EXTRAS[name]]
    assert said == {r.name: str(r.specifier).removeprefix(">=") for r in [*REQUIRED, *extras]}
    for requirement in EXTRAS["dev"]:
        assert f"`{requirement.name}`" in PAGE


def test_only_lower_bounds_are_declared_and_the_pinned_versions_meet_them() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    for requirement in [*REQUIRED, *(r for rows in EXTRAS.values() for r in rows if r.name != "loracat")]:
        assert {specifier.operator for specifier in requirement.specifier} <= {">="}
        assert Version(pins[requirement.name]) in requirement.specifier, requirement.name


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the files of a checkout are what is compared with")
def test_wheel_and_sdist_are_reproducible_and_hold_what_they_should(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_distribution.main() == 0, capsys.readouterr().err
