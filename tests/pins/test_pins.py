"""What the product writes and says is what is pinned, byte for byte: exports, recipes, help texts and documents.

`python scripts/write_pins.py` renews the pins on purpose; the difference of texts/ then says what became of each.

The last bits of products and singular values differ between processors and builds of torch. Where pins.json has another
fingerprint of the arithmetic than this machine, all that is not arithmetic is compared instead: the same texts with a
word for every number with a fraction and every digest, and in full the tensors that are products rounded once.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.pins.made import ENVIRONMENT, EXACT

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PINNED: dict[str, Any] = json.loads((HERE / "pins.json").read_text(encoding="utf-8"))
REPORT = re.compile(r'("report": "[^"]*",\s*"size_bytes": )\d+')  # a page is as long as its numbers
NUMBER = re.compile(r"(?<![\w.])[+-]?(\d+(\.\d+)?e[+-]?\d+|\d+(\.\d+)+([+.]?[a-z]+\d*)*)(?![\w.]*\w)( ?%)?")
DIGEST = re.compile(r"\b[0-9a-f]{12,}\b")


class Made:
    """What is made here and now."""

    def __init__(self, folder: Path) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORACAT_", "HF_"))}
        variables = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "cache")}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.pins.made", str(folder)],
            env=kept | variables, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-5000:]
        self.folder = folder
        self.document: dict[str, Any] = json.loads((folder / "pins.json").read_text(encoding="utf-8"))
        self.same_arithmetic = self.document["fingerprint"] == PINNED["fingerprint"]


def text_of(folder: Path, thing: str) -> str:
    return (folder / "texts" / f"{thing.replace(' ', '-')}.txt").read_text(encoding="utf-8")


def masked(text: str) -> str:
    """Without what arithmetic decides; columns are as wide as their numbers, and so blanks count once."""
    text = REPORT.sub(r"\1<size>", NUMBER.sub("<number>", DIGEST.sub("<digest>", text)))
    return re.sub(r"[ -]{2,}|─+", " ", text)


def difference(before: str, after: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "pinned", "made", lineterm="", n=2)
    return "\n".join([*lines][:200])


def exact(thing: str, digests: dict[str, str]) -> dict[str, str]:
    """Digests that are the same on every processor."""
    if thing.removeprefix("export ") not in EXACT:
        return {}
    return {name: digest for name, digest in digests.items() if name.endswith((".safetensors", "_config.json"))}


def changes(made: Made, thing: str) -> str:
    """What became of a thing; nothing if it is what it was."""
    pinned, found = PINNED["things"].get(thing), made.document["things"].get(thing)
    if pinned is None or found is None:
        return f"`{thing}` is new" if pinned is None else f"`{thing}` is not made any more"
    before, after = text_of(HERE, thing), text_of(made.folder, thing)
    if not made.same_arithmetic:
        before, after = masked(before), masked(after)
        pinned, found = exact(thing, pinned), exact(thing, found)
    if before != after:
        return f"`{thing}` reads otherwise:\n{difference(before, after)}"
    others = [name for name in {**pinned, **found} if pinned.get(name) != found.get(name)]
    return f"`{thing}` reads the same, but not every byte is: {others}" if others else ""


def test_everything_is_what_it_was(tmp_path: Path) -> None:
    """In one test, as making it takes half a minute."""
    made = Made(tmp_path)
    assert made.document["fingerprint"].keys() == PINNED["fingerprint"].keys()
    found = [changes(made, thing) for thing in {**PINNED["things"], **made.document["things"]}]
    shown = "\n\n".join(text for text in found if text)
    assert not shown, f"compared {'in full' if made.same_arithmetic else 'without arithmetic'}:\n\n{shown}"


def test_masks_hide_numbers_and_digests_and_no_word() -> None:
    before = masked("rank 3, error 4.6e-01, kept 78.84 % of 1e-05; 12 of q_proj.0 is 80d9f6d80582")
    assert before == masked("rank 3, error 0.45, kept 9.1 % of 2e-05; 12 of q_proj.0 is 11d9f6d80582")
    for changed in ("rank 4", "rank 3, errors"):
        assert masked("rank 3, error 0.5") != masked(changed)
