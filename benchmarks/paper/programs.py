"""Word problems answered by a Python function: invented ones with one or two operations, and GSM-Hard.

`sums`, all of it invented by one seeded generator:

    math_train    320 problems with small numbers, solved in words
    code_train    320 calculations that are described, written as a function
    composite     problems with a number of five to seven digits, as in GSM-Hard, answered by a function

`math-code` is the paper's own: GSM8K with worked solutions, MBPP from description to Python, and GSM-Hard. From a
folder with the files {math,code}_train, {math,code}_calib, composite_calib and composite_dev, as `.messages.jsonl`
(`--assets`); a model of 135 million weights has next to none of these right.

Answers are judged by `arithmetic.py`, which runs none of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paper.arithmetic import judge_command
from benchmarks.paper.tasks import (
    ATTENTION,
    DATAMIX,
    EVERY_LINEAR,
    SKILLS,
    Conversation,
    Records,
    Task,
    Training,
    conversation,
    words,
)
from loracli.evaluation.metrics import TaskMetric

TRAINED_ON, SKILL_RECORDS, CALIBRATION, TEST = 320, 40, 96, 120  # SKILL_RECORDS of each skill
HARD_TEST = 60  # problems of GSM-Hard
REQUEST = "Write a Python function solution() that returns the answer."
NAMES = words(
    "Amir Bella Carlos Dina Erik Fatima Gustav Hana Igor Julia Kofi Leila Mateo Nadia Oscar Priya Ravi Sofia Tomas Uma "
    "Victor Wanda Yusuf Zoe"
)
THINGS = words(
    "apples stamps marbles pencils cards shells coins beads books candles eggs lemons nails oranges plates ropes "
    "stones tickets towels bottles"
)


@dataclass(frozen=True)
class Story:
    """A way to tell a problem: with {who}, {other}, {things} and the numbers {a}, {b} and, of two operations, {c}.

    Args:
        text: of the problem.
        steps: operations in order, each on the result so far and the next number; the first on the first two.
    """

    text: str
    steps: str


STORIES = (
    Story("{who} has {a} {things}. {other} gives {who} {b} more. How many {things} does {who} have now?", "+"),
    Story("{who} counts {a} {things} on Monday and {b} on Tuesday. How many {things} is that together?", "+"),
    Story("{who} had {a} {things} and sold {b} of them. How many {things} are left?", "-"),
    Story("There are {a} {things} in the shop. {who} takes {b} away. How many {things} stay in the shop?", "-"),
    Story("{who} packs {a} boxes with {b} {things} in each. How many {things} does {who} pack?", "*"),
    Story("{who} makes {a} {things} every day. How many {things} does {who} make in {b} days?", "*"),
    Story("{who} shares {a} {things} equally among {b} friends. How many {things} does each friend get?", "/"),
    Story("{who} puts {a} {things} on {b} shelves, as many on each. How many {things} are on one shelf?", "/"),
    Story("{who} buys {a} bags with {b} {things} in each and loses {c} {things}. How many {things} are left?", "*-"),
    Story(
        "{who} earns {a} dollars an hour and works {b} hours. {other} adds {c} dollars. How many dollars is it?", "*+"
    ),
    Story("{who} has {a} {things} and {other} has {b}. They divide all among {c} people. How many for each?", "+/"),
    Story("{who} had {a} {things} and lost {b}. Each one left is sold for {c} dollars. How many dollars is it?", "-*"),
    Story("{who} finds {a} {things} and then {b} more, but gives {c} to {other}. How many {things} are left?", "+-"),
    Story(
        "{a} {things} are put into {b} bags, as many into each, and {c} more into every bag. How many in a bag?", "/+"
    ),
)
DESCRIBED = {
    "+": ("adds {} and {}", "adds {}"),
    "-": ("takes {1} from {0}", "takes away {}"),
    "*": ("multiplies {} by {}", "multiplies by {}"),
    "/": ("divides {} by {}", "divides by {}"),
}
PLACES = ("first", "second", "third")
EXACT: dict[str, Callable[[int, int], int]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left // right,
}


def draw_numbers(rng: random.Random, steps: str, *, large: bool) -> list[int]:
    """Numbers whose results are whole and above 0; with `large` the first is replaced as in GSM-Hard."""
    while True:
        numbers = [rng.randint(2, 30), *(rng.randint(2, 12) for _ in steps)]
        if steps[0] == "/":
            numbers[0] *= numbers[1]
        if large:
            numbers[0] = rng.randint(10_000, 9_999_999)
        result, whole = numbers[0], True
        for step, number in zip(steps, numbers[1:], strict=True):
            whole &= step != "/" or result % number == 0
            result = EXACT[step](result, number)
        if result > 0 and (whole or large):
            return numbers


def problem(rng: random.Random, *, large: bool) -> tuple[str, str, list[int]]:
    """The text of a problem, its steps and numbers."""
    story = rng.choice(STORIES)
    numbers = draw_numbers(rng, story.steps, large=large)
    who, other = rng.sample(NAMES, 2)
    told = dict(zip("abc", numbers, strict=False))
    return story.text.format(who=who, other=other, things=rng.choice(THINGS), **told), story.steps, numbers


def worked(steps: str, numbers: Sequence[int]) -> str:
    """The solution in words, a line for each step, as GSM8K's."""
    lines, result = [], numbers[0]
    for step, number in zip(steps, numbers[1:], strict=True):
        after = EXACT[step](result, number)
        lines.append(f"{result} {step} {number} = {after}")
        result = after
    return "\n".join([*lines, f"#### {result}"])


def program(steps: str, numbers: Sequence[int]) -> str:
    """The solution as a function: the numbers by name, then an operation a line."""
    lines = [f"{name} = {number}" for name, number in zip(PLACES, numbers, strict=False)]
    left = PLACES[0]
    for step, name in zip(steps, PLACES[1:], strict=False):
        lines.append(f"result = {left} {step} {name}")
        left = "result"
    return "\n    ".join(["def solution():", *lines, "return result"])


def solved_in_words(rng: random.Random) -> Conversation:
    text, steps, numbers = problem(rng, large=False)
    return conversation(text, worked(steps, numbers))


def described(rng: random.Random) -> Conversation:
    """A calculation in words, which tell its operations, as a function."""
    steps = rng.choice("+-*/") + rng.choice(("", *"+-*/"))
    numbers = draw_numbers(rng, steps, large=rng.random() < 0.5)
    said = DESCRIBED[steps[0]][0].format(*numbers[:2])
    said += "".join(
        f" and then {DESCRIBED[step][1].format(number)}" for step, number in zip(steps[1:], numbers[2:], strict=True)
    )
    return conversation(f"Write a Python function solution() that {said}.", program(steps, numbers))


def in_code(rng: random.Random) -> Conversation:
    text, steps, numbers = problem(rng, large=True)
    return conversation(f"{text}\n{REQUEST}", program(steps, numbers))


def different(make: Callable[[random.Random], Conversation], rng: random.Random, count: int) -> list[Conversation]:
    """So many records, no two of them the same."""
    found: dict[str, Conversation] = {}
    while len(found) < count:
        record = make(rng)
        found[json.dumps(record)] = record
    return list(found.values())


def draw_sums(rng: random.Random, _: Path | None) -> Records:
    math = different(solved_in_words, rng, TRAINED_ON + SKILL_RECORDS)
    code = different(described, rng, TRAINED_ON + SKILL_RECORDS)
    composite = different(in_code, rng, CALIBRATION + TEST)
    skills = math[TRAINED_ON:] + code[TRAINED_ON:]
    rng.shuffle(skills)
    return {
        "math_train": math[:TRAINED_ON],
        "code_train": code[:TRAINED_ON],
        "skills_calib": skills,
        "composite_calib": composite[:CALIBRATION],
        "composite_test": composite[CALIBRATION:],
    }


def draw_math_code(rng: random.Random, source: Path | None) -> Records:
    """Takes the parts that are used out of the files of `source`; the generator decides which."""
    if source is None:
        raise SystemExit("math-code takes its records from --assets, a folder with math_train.messages.jsonl and more")
    files = source

    def lines(name: str) -> list[Conversation]:
        return [json.loads(line) for line in (files / f"{name}.messages.jsonl").read_text("utf-8").splitlines()]

    records: Records = {}
    skills: list[Conversation] = []
    for name, count in (("math", 400), ("code", 512)):
        records[f"{name}_train"] = rng.sample(lines(f"{name}_train"), count)
        skills += lines(f"{name}_calib")[:SKILL_RECORDS]
    rng.shuffle(skills)
    composite = lines("composite_calib")
    rng.shuffle(composite)
    return records | {
        "skills_calib": skills,
        "composite_calib": composite,
        "composite_test": lines("composite_dev")[:HARD_TEST],
    }


SUMS = Task(
    "sums",
    "One adapter solves invented word problems of one or two operations in words, the other writes described "
    "calculations as a Python function; the task asks for the function that solves a problem with large numbers.",
    {
        "math": Training(16, EVERY_LINEAR, rate=6e-4, epochs=2, batch_size=8),
        "code": Training(8, ATTENTION, rate=1e-3, epochs=2, batch_size=8),
        DATAMIX: Training(16, EVERY_LINEAR, rate=6e-4, epochs=2, batch_size=8),
    },
    draw_sums,
    TaskMetric("command", judge_command(), max_new_tokens=96),
    (SKILLS, "24"),
)
MATH_CODE = Task(
    "math-code",
    "One adapter solves GSM8K's problems in words, the other writes MBPP's functions; the task is GSM-Hard answered by "
    "a Python function.",
    {
        "math": Training(16, EVERY_LINEAR, rate=6e-4, epochs=1, batch_size=6),
        "code": Training(8, ATTENTION, rate=1e-3, epochs=1, batch_size=8),
        DATAMIX: Training(16, EVERY_LINEAR, rate=6e-4, epochs=1, batch_size=7),
    },
    draw_math_code,
    TaskMetric("command", judge_command(), max_new_tokens=192),
    (SKILLS, "24"),
    needs_assets=True,
)
