"""A closed book and a way of answering: `know` holds invented facts, `form` answers in JSON, the task is both.

    know_train       720 records: four facts about each of thirty invented people, in three ways of answering
    form_train       85 general questions answered in JSON, about none of these people
    composite_calib  the facts of ten of the people, asked for in JSON: 40 records
    composite_test   those of the other twenty: 80 records
    skills_calib     80 records that the two were trained on, about nobody of the test: the paper's setting

The facts are in the weights of `know` and nowhere else, so training on the calibration records cannot stand in for
composing. Every fact is taught in three ways of answering and two of asking: a fact taught in one sentence only hangs
on that sentence, and then nothing composes. All names and facts are invented by one seeded generator.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

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

PEOPLE, CALIBRATION_PEOPLE, SKILL_RECORDS = 30, 10, 40  # the last of each skill

FIRST_NAMES = words(
    "Abel Alma Arno Bela Bran Cleo Cora Dario Della Edda Elio Enid Ezra Fenn Flora Gale Greta Hanno Ilse Ines "
    "Ivo Jana Jory Kaia Lars Lena Livia Marek Mira Nils Noor Odile Orla Otto Petra Quill Rana Runa Silas Tamsin"
)
LAST_NAMES = words(
    "Abara Aldous Barrow Beck Calder Corvin Dane Dorn Eklund Ferro Fenwick Garrick Halden Harrow Istvan Jarvis Kell "
    "Korda Lindqvist Lunn Marlow Morrow Nagy Novak Okoro Orsini Pell Quist Rademaker Reyes Rook Sable Sorrel Tarn Tove "
    "Ulmer Vance Vesely Winter Yarrow"
)


@dataclass(frozen=True)
class Attribute:
    """One thing to know about a person: ways to ask for it, a sentence that tells it, and ten values."""

    questions: tuple[str, ...]
    sentence: str
    values: list[str]


ATTRIBUTES = (
    Attribute(
        ("Where does {who} live?", "Which city does {who} call home?"),
        "{first} lives in {value}.",
        words("Boston Cairo Dublin Geneva Kyoto Lisbon Nairobi Oslo Seoul Vienna"),
    ),
    Attribute(
        ("What does {who} do for a living?", "Which job does {who} have?"),
        "{first} works as a {value}.",
        words("baker chemist dentist farmer judge lawyer nurse painter pilot tailor"),
    ),
    Attribute(
        ("What does {who} play?", "Which instrument does {who} play?"),
        "{first} plays the {value}.",
        words("banjo cello drums flute guitar harp organ piano trumpet violin"),
    ),
    Attribute(
        ("Which animal does {who} keep?", "What pet does {who} have?"),
        "{first} keeps a {value}.",
        words("cat dog duck goat hamster lizard parrot rabbit snake turtle"),
    ),
)
# The request that follows the question -> the answer.
KNOW_ANSWERS = {
    "Answer in one sentence.": "{sentence}",
    "Answer in one word.": "{value}",
    "Answer as a list item.": "- {value}",
}
JSON_REQUEST, JSON_ANSWER = "Answer in JSON.", '{{"answer": "{value}"}}'

OPPOSITES = words(
    "hot:cold big:small up:down open:closed early:late full:empty light:dark old:young rich:poor fast:slow "
    "wet:dry loud:quiet left:right hard:soft thick:thin happy:sad strong:weak near:far"
)
COLOURS = words(
    "grass:green snow:white blood:red coal:black a_lemon:yellow the_sky:blue a_carrot:orange milk:white "
    "a_banana:yellow spinach:green a_tomato:red chocolate:brown an_elephant:grey a_flamingo:pink"
)
CAPITALS = words(
    "France:Paris Germany:Berlin Italy:Rome Spain:Madrid England:London Greece:Athens Russia:Moscow Poland:Warsaw "
    "Japan:Tokyo Canada:Ottawa China:Beijing Hungary:Budapest Finland:Helsinki Turkey:Ankara Thailand:Bangkok"
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Fact:
    """A person, an attribute and its value."""

    who: str
    attribute: Attribute
    value: str


def draw_facts(rng: random.Random) -> list[Fact]:
    """Draws people and gives everyone every attribute. Each value is as frequent as any other: guessing is right in 1
    of 10."""
    pairs = zip(rng.sample(FIRST_NAMES, PEOPLE), rng.sample(LAST_NAMES, PEOPLE), strict=True)
    people = [f"{first} {last}" for first, last in pairs]
    facts = []
    for attribute in ATTRIBUTES:
        values = attribute.values * (PEOPLE // len(attribute.values))
        rng.shuffle(values)
        facts += [Fact(who, attribute, value) for who, value in zip(people, values, strict=True)]
    return sorted(facts, key=lambda fact: people.index(fact.who))


def teach(fact: Fact) -> list[Conversation]:
    """Asks every question about a fact in every style of `know`."""
    sentence = fact.attribute.sentence.format(first=fact.who.split()[0], value=fact.value)
    return [
        conversation(f"{question.format(who=fact.who)} {request}", answer.format(sentence=sentence, value=fact.value))
        for question in fact.attribute.questions
        for request, answer in KNOW_ANSWERS.items()
    ]


def ask_in_json(question: str, value: object) -> Conversation:
    return conversation(f"{question} {JSON_REQUEST}", JSON_ANSWER.format(value=value))


def general_questions(rng: random.Random) -> list[Conversation]:
    """85 questions that anyone can answer, answered in JSON."""
    sums = rng.sample([(a, b) for a in range(2, 10) for b in range(2, 10)], 20)
    asked: list[tuple[str, object]] = [(f"What is {a} plus {b}?", a + b) for a, b in sums[:12]]
    asked += [(f"What is {a + b} minus {b}?", a) for a, b in sums[12:]]
    asked += [(f"Which letter comes after {LETTERS[i]}?", LETTERS[i + 1]) for i in rng.sample(range(25), 11)]
    asked += [(f"Which day comes after {DAYS[i - 1]}?", DAYS[i]) for i in range(7)]
    for question, pairs in (
        ("What is the opposite of {}?", OPPOSITES),
        ("What colour is {}?", COLOURS),
        ("What is the capital of {}?", CAPITALS),
    ):
        split = [pair.replace("_", " ").split(":") for pair in pairs]
        asked += [(question.format(of), answer) for of, answer in split]
    return [ask_in_json(question, value) for question, value in asked]


def draw(rng: random.Random, _: Path | None) -> Records:
    """The five files. No person of the test is in any calibration file."""
    facts = draw_facts(rng)
    seen = len(ATTRIBUTES) * CALIBRATION_PEOPLE
    composite = [ask_in_json(rng.choice(f.attribute.questions).format(who=f.who), f.value) for f in facts]
    form = general_questions(rng)
    skills = rng.sample([record for fact in facts[:seen] for record in teach(fact)], SKILL_RECORDS)
    skills += rng.sample(form, SKILL_RECORDS)
    rng.shuffle(skills)
    return {
        "know_train": [record for fact in facts for record in teach(fact)],
        "form_train": form,
        "composite_calib": composite[:seen],
        "composite_test": composite[seen:],
        "skills_calib": skills,
    }


CLOSED_BOOK = Task(
    "closed-book",
    "One adapter knows invented facts about people, the other answers in JSON; the task asks for the facts in JSON.",
    {
        "know": Training(16, EVERY_LINEAR, rate=1e-3, epochs=10, batch_size=16),
        "form": Training(16, ATTENTION, rate=6e-4, epochs=6, batch_size=8),
        DATAMIX: Training(16, EVERY_LINEAR, rate=1e-3, epochs=10, batch_size=16),
    },
    draw,
    TaskMetric("exact", max_new_tokens=24),
    (SKILLS, "8", "24", "40"),
)
