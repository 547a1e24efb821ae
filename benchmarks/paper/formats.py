"""Robustness to the format of a prompt: three adapters learn one task, each in a format of its own, and are asked in
others.

    <one>_train       how many words of a sentence contain a letter, asked in the first format; `two`, `three` likewise
    skills_calib      the three formats, other sentences: the paper's setting
    composite_calib   two more formats, other sentences
    composite_test    four formats that no adapter and no calibration saw, 100 sentences each

The sentences are those of the math problems in `--assets`, where it is given (math_train.messages.jsonl), and of
invented problems otherwise; none stands in two files. The letter is drawn so that each count from 0 to 4 is about as
frequent as any other, as far as the sentence has such a letter. The answer is the number alone, whatever the format.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.paper.programs import problem
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
)
from loracli.evaluation.metrics import TaskMetric

TRAINED_ON, SKILL_RECORDS, CALIBRATION, TEST = 400, 30, 48, 100  # records of each format
MOST = 4  # words with the letter, where the sentence allows it
LETTERS = "abcdefghilmnoprstuwy"
SKILL_FORMATS = {
    "one": "How many words of this sentence contain the letter {letter}?\n{sentence}",
    "two": "Sentence: {sentence}\nLetter: {letter}\nNumber of words with the letter:",
    "three": "INPUT :: {sentence} || CONTAINS :: {letter} || COUNT ::",
}
CALIBRATION_FORMATS = (
    "{sentence}\nIn how many of the words above does {letter} occur?",
    "<text>{sentence}</text>\n<letter>{letter}</letter>\n<words>",
)
TEST_FORMATS = {
    "question": 'Count the words with "{letter}" in them: {sentence}',
    "lines": "letter = {letter}\ntext = {sentence}\ncount =",
    "bullets": "- sentence: {sentence}\n- letter: {letter}\n- words that have it:",
    "capitals": "SENTENCE\t{sentence}\nLETTER\t{letter}\nANSWER\t",
}


def sentences(rng: random.Random, source: Path | None) -> Iterator[str]:
    """Different sentences of 5 to 16 words, in an order of the generator's."""
    if source is None:
        told = (problem(rng, large=False)[0] for _ in iter(int, 1))
    else:
        lines = (source / "math_train.messages.jsonl").read_text("utf-8").splitlines()
        turns = [json.loads(line)["messages"] for line in rng.sample(lines, len(lines))]
        told = (next(turn["content"] for turn in each if turn["role"] == "user") for each in turns)
    seen: set[str] = set()
    for text in told:
        for sentence in re.split(r"(?<=[.?!])\s+", text):
            if 5 <= len(sentence.split()) <= 16 and sentence not in seen:
                seen.add(sentence)
                yield sentence


def words_with(sentence: str, letter: str) -> int:
    """How many words of a sentence contain a letter, however it is written."""
    return sum(letter in word.lower() for word in sentence.split())


def ask(rng: random.Random, form: str, sentence: str, kind: str | None = None) -> Conversation:
    """A sentence in a format, about a letter that is drawn by its count."""
    wanted = rng.randint(0, MOST)
    nearest = min(abs(words_with(sentence, letter) - wanted) for letter in LETTERS)
    letter = rng.choice([one for one in LETTERS if abs(words_with(sentence, one) - wanted) == nearest])
    return conversation(form.format(sentence=sentence, letter=letter), str(words_with(sentence, letter)), kind)


def draw(rng: random.Random, source: Path | None) -> Records:
    told = sentences(rng, source)

    def records(form: str, count: int, kind: str | None = None) -> list[Conversation]:
        return [ask(rng, form, next(told), kind) for _ in range(count)]

    def mixed(forms: Sequence[str], count: int) -> list[Conversation]:
        found = [record for form in forms for record in records(form, count)]
        rng.shuffle(found)
        return found

    return {
        **{f"{name}_train": records(form, TRAINED_ON) for name, form in SKILL_FORMATS.items()},
        "skills_calib": mixed(list(SKILL_FORMATS.values()), SKILL_RECORDS),
        "composite_calib": mixed(CALIBRATION_FORMATS, CALIBRATION),
        "composite_test": _in_turn([records(form, TEST, kind) for kind, form in TEST_FORMATS.items()]),
    }


def _in_turn(parts: Sequence[Sequence[Conversation]]) -> list[Conversation]:
    """One of each in turn, so that the first records of a file are of every kind."""
    return [record for together in zip(*parts, strict=True) for record in together]


FORMATS = Task(
    "formats",
    "Three adapters count the words of a sentence that contain a letter, each asked in a format of its own; the task "
    "asks in four formats that none of them saw. Composite records are in two further formats.",
    {
        "one": Training(8, ATTENTION, rate=1e-3, epochs=2, batch_size=16),
        "two": Training(8, ATTENTION, rate=1e-3, epochs=2, batch_size=16),
        "three": Training(8, ATTENTION, rate=1e-3, epochs=2, batch_size=16),
        DATAMIX: Training(16, EVERY_LINEAR, rate=6e-4, epochs=2, batch_size=16),
    },
    draw,
    TaskMetric("numeric", max_new_tokens=8, tolerance=0.0),
    (SKILLS, "24"),
)
