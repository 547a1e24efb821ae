"""Names of strangers on a terminal and in a pipe: whatever is in them, they are shown, and do nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest

from tests.faults.commands import FIT
from tests.faults.fork_server import Ended, ForkServer
from tests.faults.trials import CODES, Tally, trials
from tests.tiny import random_records, write_jsonl

HOSTILE = (
    "\x1b[31mred",
    "\x1b]8;;http:x\x07link",
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "\x9b31mred",
    "\r\nerror: fake",
    "\x07\x08\x7f\x0c",
    "\u202egnp.exe",
    "zero\u200bwidth\u2066",
    "[bold red]x[",
    "[nope]:smile:",
    "[link=http:x]y",
)
NAMES = ("".join(HOSTILE), *HOSTILE)
# What our own bars and colours write: colours, the cursor hidden and shown, a line erased, a line up, to its beginning.
_OURS = re.compile(r"\x1b\[(?:[0-9;]*m|\?25[lh]|2K|\d*A)")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")

COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "{name}", "second"),
    "fit --dry-run": ("fit", "-a", "{name}", "second", "-d", "{name}.jsonl", *FIT[6:], "--dry-run"),
    "fit": ("fit", "-a", "{name}", "second", "-d", "{name}.jsonl", *FIT[6:], "--mixing", "adapter", "--force"),
    "show": ("show", "{name}.json"),
    "export": ("export", "{name}.json", "-o", "{name}.out", "--force"),
    "verify": ("verify", "{name}.out"),
    "lint": ("lint", "{name}"),
    "report": ("report", "{name}.json", "-o", "{name}.html", "--force"),
    "compare": ("compare", "{name}.json", "-d", "{name}.jsonl", "--base", "../project/base", "--methods", "sum"),
    "convert": ("convert", "{name}", "-o", "{name}.plain", "--base", "../project/base"),
    "fuse": ("fuse", "{name}.json", "-o", "{name}.model", "--base", "../project/base", "--force"),
    "fetch": ("fetch", "{name}/x"),
    "an unknown command": ("{name}",),
    "an unknown option": ("fit", "--{name}"),
    "a file that is not there": ("show", "{name}.nothing"),
}


@pytest.fixture(scope="module")
def hostile_yard(server: ForkServer, yard: Path) -> Path:
    """Where each hostile string is the name of an adapter, a data file with a task of that name, and a recipe."""
    folder = yard / "hostile"
    shutil.copytree(yard / "project/second", folder / "second")
    for name in NAMES:
        shutil.copytree(yard / "project/first", folder / name)
        task = "".join(c if c.isprintable() else "?" for c in name)[:99]
        write_jsonl(folder / f"{name}.jsonl", [{**record, "task": task} for record in random_records(44)])
    return folder


@trials(1, 13)
def test_hostile_names_are_shown_and_do_nothing(
    server: ForkServer, hostile_yard: Path, tally: Tally, count: int
) -> None:
    """All twelve in one name; then each by itself."""
    for name in NAMES[:count]:
        for command, words in COMMANDS.items():
            ended = server.run(*(word.format(name=name) for word in words), cwd=hostile_yard)
            check(ended, command)
            tally.add("hostile names in a pipe", ended.code)
        for command in ("inspect", "fit --dry-run", "show", "lint", "an unknown command", "a file that is not there"):
            typed = [word.format(name=name) for word in COMMANDS[command]]
            ended, screen = on_a_terminal(server, hostile_yard, *typed)
            for ours in set(_OURS.findall(screen)):
                screen = screen.replace(ours, "")
            check(Ended(ended.code, screen, screen), command)
            tally.add("hostile names on a terminal", ended.code)


def check(ended: Ended, command: str) -> None:
    said = ended.stdout + ended.stderr
    found = _UNPRINTABLE.search(said)
    assert found is None, (command, said[max(0, found.start() - 80) : found.end() + 20])
    assert "\nerror: fake" not in said and "MarkupError" not in said, (command, said)
    assert ended.code in CODES and "Traceback" not in said, (command, ended)


def on_a_terminal(server: ForkServer, cwd: Path, *words: str) -> tuple[Ended, str]:
    """How the command ended, and what it wrote to the terminal that both its streams are."""
    ours, its = os.openpty()
    written: list[bytes] = []

    def listen() -> None:
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # the last one has closed it
                return
            written.append(data)

    listener = threading.Thread(target=listen)
    listener.start()
    started = server.start(*words, cwd=cwd, terminal=Path(os.ttyname(its)))
    ended = started.wait()
    os.close(its)
    listener.join()
    os.close(ours)
    return ended, b"".join(written).decode(errors="replace")


def test_the_check_sees_an_escape() -> None:
    """Or the tests above could not fail."""
    for text in HOSTILE[:9]:
        if text != "\r\nerror: fake":
            with pytest.raises(AssertionError):
                check(Ended(0, text, ""), "")
    with pytest.raises(AssertionError):
        check(Ended(0, "\r\nerror: fake", ""), "")


@trials(1, 13)
def test_hostile_text_in_files_is_shown_and_does_nothing(
    server: ForkServer, yard: Path, tally: Tally, count: int
) -> None:
    """Fields of a config and their names, lines of data, a recipe."""
    folder = yard / "texts"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(yard / "project/first", folder / "adapter")
    path = folder / "adapter/adapter_config.json"
    config = json.loads(path.read_text())
    for text in NAMES[:count]:
        (folder / "recipe.json").write_text(json.dumps({text: text, "loracat_recipe": 2, "base": text}))
        (folder / "val.jsonl").write_text(json.dumps({text: text}) + "\n")
        said = [server.run("show", cwd=folder), server.run(*FIT, "-d", "val.jsonl", "-o", "x.json", cwd=folder)]
        for field in ("peft_type", "base_model_name_or_path", "bias", "init_lora_weights", text):
            path.write_text(json.dumps({**config, field: text}))
            said.append(server.run("inspect", "adapter", cwd=folder))
        for ended in said:
            assert ended.code in (0, 3)  # 0: text of printable characters can be the name of a base
            check(ended, "a file")
            tally.add("hostile text in files", ended.code)
