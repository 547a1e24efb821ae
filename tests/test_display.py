"""What a public value says of itself in a line of Python, and that no value can say more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loracli.evaluation.comparison import BestOf, Comparison, ComparisonRow
from loracli.fusing.fuse import Fused
from loracli.hub.fetch import Fetched
from loracli.hub.references import Reference
from loracli.hub.source import FetchedFile
from loracli.pushing.push import Pushed, PushedFile
from loracli.recipe.record import HeldOut, HeldOutRow, RecipeMixing
from loracli.report.report import Written
from loracli.serving.lint import Lint, ServerReport
from loracli.system.display import MOST, names_text
from loracli.verifying.findings import Unchecked, Verification

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOSTILE = ["\x1b[2J", "a\nb", "right\u202eleft", "x" * 100_000, "\U000e0001" * 500]


def fetched(name: str) -> Fetched:
    files = (FetchedFile("adapter_config.json", 700, cached=True), FetchedFile("adapter_model.safetensors", 5300, True))
    return Fetched(Reference(name, repo_id=name), Path(name), COMMIT, files)


def taken_by(path: str, **verdicts: Any) -> Lint:
    reports = [ServerReport(name, name, "1", "1", verdict, (), (), ()) for name, verdict in verdicts.items()]
    return Lint(Path(path), "peft", 16, 28, tuple(reports))


def verified(path: str) -> Verification:
    return Verification(Path(path), "adapter", 56, ("the config", "the card"), (Unchecked("a tensor", "no base"),))


def pushed(name: str) -> Pushed:
    state = Verification(Path(name), "adapter", 0, (), ())
    file = PushedFile("README.md", 10, "0" * 64, "new")
    return Pushed(name, "main", COMMIT, "url", None, True, True, False, (file,), (), (), True, False, state)


def fused(name: str) -> Fused:
    return Fused(Path("out") / name, name, 28, 2, 0, 3_000_000_000, ("bfloat16",), False, None, ())


def compared(name: str) -> Comparison:
    def row(way: str, kind: Any, nats: float) -> ComparisonRow:
        return ComparisonRow(
            way, kind, nats, 3.0, 0.0, (0.0, 0.0), None, 0.5, 8, None, "", None, metric=None, guard=None
        )

    rows = (row("base", "base", 2.0), row(name, "ingredient", 1.25), row("uniform", "method", 1.5))
    best = BestOf(name, {"uniform": 0.2}, clear=False)
    return Comparison("test.jsonl", "base", (name,), 128, 900, name, rows, (), (), best, 0.1, None, None, 0.02, 0)


def mixed(name: str) -> RecipeMixing:
    return RecipeMixing("layer", {f"{name}{index}": (0.5, None) for index in range(400)}, 800)


def held_out(name: str) -> HeldOut:
    rows = tuple(HeldOutRow(row, nats, 0.0, (0.0, 0.0), 0.5) for row, nats in ((name, 1.5), ("fit", 0.0941)))
    return HeldOut(name, 128, 900, name, rows, (), "better")


SAID = [
    (mixed("model.layers."), "<RecipeMixing layer, 800 numbers in 400 groups>"),
    (held_out("test.jsonl"), "<HeldOut better, 0.0941 nats, 128 records of test.jsonl>"),
    (fetched("org/math"), "<Fetched org/math, commit 0123456789ab, 2 files, 6.0 kB>"),
    (
        replace(fetched("org/math"), reference=Reference("~/runs/math", path=Path("/home/me/runs/math")), commit=None),
        "<Fetched math, 2 files, 6.0 kB>",
    ),
    (
        taken_by("/tmp/out/merged", vllm="takes", sglang="differs", peft="takes"),
        "<Lint merged, rank 16, 28 modules, 2 of 3 servers take it, sglang differs>",
    ),
    (verified("runs/merged"), "<Verification merged, adapter, 2 things checked, 1 not, 56 tensors the same>"),
    (pushed("org/both"), "<Pushed org/both, main, 1 file, commit 0123456789ab>"),
    (
        replace(pushed("org/both"), committed=False),
        "<Pushed org/both, main, 1 file, there already, commit 0123456789ab>",
    ),
    (replace(pushed("org/both"), committed=False, commit=None), "<Pushed org/both, main, 1 file, a dry run>"),
    (fused("org/base"), "<Fused base, base org/base, 28 modules changed, 2 files, 3.0 GB>"),
    (fused("/models/base"), "<Fused base, base base, 28 modules changed, 2 files, 3.0 GB>"),
    (Written(Path("out/r.html"), 36_800, ("a", "b")), "<Written r.html, 36.8 kB, 2 parts>"),
    (
        compared("/home/me/runs/math"),
        "<Comparison 2 ways on 128 records, math is lowest with 1.25 nats, not clearly the best>",
    ),
]


@pytest.mark.parametrize(("value", "said"), SAID, ids=lambda value: value if isinstance(value, str) else "")
def test_a_value_says_what_a_person_wants_to_know_of_it_in_a_line(value: object, said: str) -> None:
    assert repr(value) == said


@pytest.mark.parametrize("name", HOSTILE, ids=["escape", "newline", "direction", "long", "unseen"])
@pytest.mark.parametrize("make", [fetched, taken_by, verified, pushed, fused, compared, mixed, held_out])
def test_a_line_is_short_and_printable_whatever_the_value_holds(make: Any, name: str) -> None:
    said = repr(make(name))
    assert len(said) <= MOST
    assert said.isprintable() and not set(said) & set("\u202e\U000e0001")
    assert said.startswith(f"<{type(make(name)).__name__} ") and said.endswith(">")


def test_many_names_are_counted_and_a_long_one_ends_as_it_does() -> None:
    assert names_text(["a", "b", "c"]) == "a + b + c"
    assert names_text(list("abcde")) == "a + b + 3 more"
    assert names_text([f"org/{'x' * 60}/math"]).endswith("xxx/math")
