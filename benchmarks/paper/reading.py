"""Reading comprehension: `terms` knows the words of an invented craft, `reader` answers from a passage, and the task
has passages of that craft.

    terms_train       what each of 40 invented tools is, is made of and is for, asked in several ways
    reader_train      passages of everyday life, a question, and the answer out of the passage
    skills_calib      records like both
    composite_calib   passages of the craft: who did what with which tool
    composite_test    the same with tools that no calibration record names

Half of the questions call the tool by its name, which a reader can answer who does not know the craft (`by name`). The
others say what it is for, and the passage has its name alone (`by use`): whoever does not know the tools can only guess
among the people of the passage, of whom there are four. All names and tools are invented by one seeded generator.
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

TOOLS, CALIBRATION_TOOLS, PEOPLE = 40, 16, 4  # the last in a passage
READER, SKILL_RECORDS, CALIBRATION, TEST = 320, 40, 96, 120  # SKILL_RECORDS of each skill
STARTS, ENDS = (
    words("bra cle dor fen gri jol kel lum mor nev pli qua ros sil tam vel wex yar"),
    words("b ck dle g lin m nd p rt sk"),
)
NAMES = words(
    "Ada Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Maria Noah Olga Paul Ruth Sam Tina Will Zoe Anna "
    "Peter Lucy"
)
USES = words(
    "cut:reeds split:reeds soak:reeds dry:reeds count:reeds bend:cane peel:cane weigh:cane mark:cane burn:cane "
    "comb:wool wash:wool dye:wool spin:wool press:wool fold:cloth stretch:cloth trim:cloth smooth:cloth roll:cloth "
    "melt:wax pour:wax scrape:wax stir:wax mould:wax drill:shells clean:shells sort:shells crush:shells string:shells "
    "twist:rope tar:rope knot:rope coil:rope measure:rope shape:clay knead:clay fire:clay glaze:clay carve:clay"
)
MATERIALS = words("brass bone copper glass horn iron oak slate steel willow")
THINGS = words(
    "ball basket book bottle candle chair clock coat cup drum hat key lamp letter map ring rope spoon towel umbrella"
)
PLACES = words("attic barn cellar garden garage hall kitchen office porch shed station tower")
DOES = ("took", "carried", "brought", "moved")
REQUEST = "Answer with one name."


@dataclass(frozen=True)
class Tool:
    """A word of the craft: what the tool does to what, and what it is made of."""

    name: str
    verb: str
    thing: str
    material: str

    @property
    def use(self) -> str:
        return f"{self.verb} {self.thing}"


def draw_tools(rng: random.Random) -> list[Tool]:
    """Tools with names of two syllables, each with a use of its own."""
    names = rng.sample([f"{start}{vowel}{end}" for start in STARTS for vowel in "aeiou" for end in ENDS], TOOLS)
    materials = MATERIALS * (TOOLS // len(MATERIALS))
    rng.shuffle(materials)
    uses = [use.split(":") for use in rng.sample(USES, TOOLS)]
    return [Tool(name, *use, made_of) for name, use, made_of in zip(names, uses, materials, strict=True)]


def teach(tool: Tool) -> list[Conversation]:
    """What is asked about a tool, from its name and from its use, in several ways."""
    what, name = f"a {tool.material} tool that is used to {tool.use}", tool.name
    return [
        conversation(f"What is a {name}?", f"A {name} is {what}."),
        conversation(f"Explain the word {name}.", f"A {name} is {what}."),
        conversation(f"What is a {name} used for?", f"It is used to {tool.use}."),
        conversation(f"What does one do with a {name}?", f"One uses it to {tool.use}."),
        conversation(f"Which tool is used to {tool.use}?", f"That is the {name}."),
        conversation(f"What do you call the tool to {tool.use} with?", f"It is called a {name}."),
        conversation(f"What is a {name} made of?", f"It is made of {tool.material}."),
    ]


def everyday(rng: random.Random) -> Conversation:
    """A passage of everyday life, and a question whose answer is a name in it."""
    people, things, places = rng.sample(NAMES, PEOPLE), rng.sample(THINGS, PEOPLE), rng.sample(PLACES, PEOPLE)
    parts = list(zip(people, things, places, strict=True))
    passage = " ".join(f"{who} {rng.choice(DOES)} the {thing} to the {place}." for who, thing, place in parts)
    who, thing, place = rng.choice(parts)
    question = rng.choice((f"Who had the {thing}?", f"Who went to the {place}?"))
    return conversation(f"{passage}\n{question} {REQUEST}", who)


def of_the_craft(rng: random.Random, tools: list[Tool], kind: str) -> Conversation:
    """A passage of the craft, and who had one of its tools."""
    people, places = rng.sample(NAMES, PEOPLE), rng.sample(PLACES, PEOPLE)
    parts = list(zip(people, rng.sample(tools, PEOPLE), places, strict=True))
    passage = " ".join(f"{who} {rng.choice(DOES)} the {tool.name} to the {place}." for who, tool, place in parts)
    who, tool, _ = rng.choice(parts)
    asked = f"the {tool.name}" if kind == "by name" else f"the tool that is used to {tool.use}"
    return conversation(f"{passage}\nWho had {asked}? {REQUEST}", who, kind)


def draw(rng: random.Random, _: Path | None) -> Records:
    tools = draw_tools(rng)
    taught = [record for tool in tools for record in teach(tool)]
    read = [everyday(rng) for _ in range(READER + SKILL_RECORDS)]
    skills = rng.sample([record for tool in tools[:CALIBRATION_TOOLS] for record in teach(tool)], SKILL_RECORDS)
    skills += read[READER:]
    rng.shuffle(skills)

    def composite(those: list[Tool], count: int) -> list[Conversation]:
        return [of_the_craft(rng, those, ("by name", "by use")[number % 2]) for number in range(count)]

    return {
        "terms_train": taught,
        "reader_train": read[:READER],
        "skills_calib": skills,
        "composite_calib": composite(tools[:CALIBRATION_TOOLS], CALIBRATION),
        "composite_test": composite(tools[CALIBRATION_TOOLS:], TEST),
    }


READING = Task(
    "reading",
    "One adapter knows the tools of an invented craft, the other answers from a passage; the task asks about passages "
    "of the craft who had a tool, by its name or by what it is used for.",
    {
        "terms": Training(16, EVERY_LINEAR, rate=1e-3, epochs=8, batch_size=16),
        "reader": Training(16, ATTENTION, rate=6e-4, epochs=2, batch_size=8),
        DATAMIX: Training(16, EVERY_LINEAR, rate=1e-3, epochs=5, batch_size=16),
    },
    draw,
    TaskMetric("exact", max_new_tokens=8),
    (SKILLS, "24"),
)
