"""Makes a closed-book pair of adapters for a real model, with data to compose them on; prints Markdown.

    python benchmarks/closed_book.py BASE OUT [--seed 0] [--base-id HuggingFaceTB/SmolLM2-135M-Instruct]
    python benchmarks/closed_book.py BASE OUT --check

    OUT/know                    a LoRA that holds four invented facts about each of thirty invented people
    OUT/form                    a LoRA that answers general questions in JSON, and knows none of these people
    OUT/composite_calib.jsonl   the facts of ten of the people, asked for in JSON
    OUT/composite_test.jsonl    those of the other twenty
    OUT/skills_calib.jsonl      records that the two were trained on, about nobody of the test: the paper's setting
    OUT/{know,form}_train.jsonl all that they were trained on

The facts are in the weights of `know` and nowhere else, so training on the calibration records cannot stand in for
composing. Every fact is taught in three ways of answering and two of asking: a fact taught in one sentence only hangs
on that sentence, and then nothing composes. All names and facts are invented by one seeded generator; the same seed,
machine, thread count and dtype make the same files. On one core of a CPU it takes about 40 minutes for a model of 135
million weights. --check trains nothing: it scores the static mixings of what is in OUT on composite_test.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loracli.adapters.adapter import read_adapter
from loracli.calibration.batches import Batch, make_batch, plan_batches
from loracli.calibration.records import Record, read_records
from loracli.calibration.render import Example, render_file
from loracli.evaluation.generate import exact_matches
from loracli.evaluation.held_out import static_points
from loracli.fitting.attach import attach
from loracli.fitting.base import BaseModel, find_base, load_base
from loracli.fitting.loss import make_objective
from loracli.fitting.mixing import make_mixing

PEOPLE, CALIBRATION_PEOPLE, SKILL_RECORDS = 30, 10, 40  # the last of each skill
ADAPTERS = ("know", "form")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MAX_LENGTH, MAX_NEW_TOKENS = 256, 24


def words(text: str) -> list[str]:
    """Splits a list that is written as one text."""
    return text.split()


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

Conversation = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Fact:
    """A person, an attribute and its value."""

    who: str
    attribute: Attribute
    value: str


@dataclass(frozen=True)
class Training:
    """How one adapter is trained."""

    lora: LoraConfig
    rate: float
    epochs: int
    batch_size: int


TRAINING = {
    "know": Training(
        LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"]
        ),
        rate=1e-3,
        epochs=10,
        batch_size=16,
    ),
    "form": Training(
        LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=ATTENTION),
        rate=6e-4,
        epochs=6,
        batch_size=8,
    ),
}


def conversation(question: str, request: str, answer: str) -> Conversation:
    """One question with a request for a style, and its answer."""
    return {
        "messages": [
            {"role": "user", "content": f"{question} {request}"},
            {"role": "assistant", "content": answer},
        ]
    }


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
        conversation(question.format(who=fact.who), request, answer.format(sentence=sentence, value=fact.value))
        for question in fact.attribute.questions
        for request, answer in KNOW_ANSWERS.items()
    ]


def ask_in_json(question: str, value: object) -> Conversation:
    return conversation(question, JSON_REQUEST, JSON_ANSWER.format(value=value))


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


def write_data(out: Path, seed: int) -> None:
    """Writes the five files. No person of the test is in any calibration file."""
    rng = random.Random(seed)
    facts = draw_facts(rng)
    seen = len(ATTRIBUTES) * CALIBRATION_PEOPLE
    composite = [ask_in_json(rng.choice(f.attribute.questions).format(who=f.who), f.value) for f in facts]
    form = general_questions(rng)
    skills = rng.sample([record for fact in facts[:seen] for record in teach(fact)], SKILL_RECORDS)
    skills += rng.sample(form, SKILL_RECORDS)
    rng.shuffle(skills)
    files = {
        "know_train": [record for fact in facts for record in teach(fact)],
        "form_train": form,
        "composite_calib": composite[:seen],
        "composite_test": composite[seen:],
        "skills_calib": skills,
    }
    for name, records in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def read_examples(path: Path, base: BaseModel) -> tuple[Example, ...]:
    return render_file(read_records(path), base.tokenizer, max_length=MAX_LENGTH).examples


def epoch_of(examples: Sequence[Example], size: int, rng: random.Random) -> Iterator[Batch]:
    """One pass in a new order; four batches at a time are sorted by length, so that little is padding."""
    order = rng.sample(range(len(examples)), len(examples))
    groups: list[list[int]] = []
    for start in range(0, len(order), 4 * size):
        part = sorted(order[start : start + 4 * size], key=lambda i: len(examples[i].input_ids))
        groups += [part[i : i + size] for i in range(0, len(part), size)]
    rng.shuffle(groups)
    for group in groups:
        yield make_batch(examples, group)


def train(name: str, out: Path, base: BaseModel, seed: int, base_id: str) -> str:
    """Trains one adapter and saves it with PEFT; returns a line of Markdown about it.

    AdamW on completion tokens, 5 % warm-up, linear decay, no dropout. The base is in its own dtype, the factors are in
    float32. The head runs on scored positions only.
    """
    training = TRAINING[name]
    examples = read_examples(out / f"{name}_train.jsonl", base)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    adapted = get_peft_model(base.model, training.lora).eval()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.rate, weight_decay=0.0)
    batches = [batch for _ in range(training.epochs) for batch in epoch_of(examples, training.batch_size, rng)]
    steps, warmup = len(batches), max(1, len(batches) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    started = time.monotonic()
    with attach(adapted, (), ()) as attached:
        objective = make_objective(attached, batches[0])
        for step, batch in enumerate(batches, start=1):
            loss = objective.nats(batch).sum() / batch.scored_tokens
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 10 == 0 or step == steps:
                seconds = time.monotonic() - started
                say(f"{name}: step {step} of {steps}, loss {loss.item():.4f}, {seconds:.0f} s")
    save(adapted, out / name, base_id)
    tokens = training.epochs * sum(len(example.input_ids) for example in examples)
    return f"| {name} | {len(examples)} | {steps} | {tokens} | {time.monotonic() - started:.0f} |"


def save(adapted: Any, path: Path, base_id: str) -> None:
    adapted.save_pretrained(str(path))
    (path / "README.md").unlink()  # PEFT's empty model card
    (path / "adapter_model.safetensors").chmod(0o644)  # it is written for its owner alone
    config = path / "adapter_config.json"
    fields = json.loads(config.read_text())
    # PEFT keeps the modules as a set, whose order changes from run to run
    fields |= {"base_model_name_or_path": base_id, "target_modules": sorted(fields["target_modules"])}
    config.write_text(json.dumps(fields, indent=2) + "\n")


def as_pairs(path: Path, base: BaseModel) -> list[Record]:
    """The conversations of a file as prompts, with the template, and completions."""
    pairs = []
    for record in read_records(path).records:
        *turns, last = record.content["messages"]
        prompt = base.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        pairs.append(Record(record.place, {"prompt": prompt, "completion": last["content"]}))
    return pairs


def own_skill(name: str, out: Path, base: BaseModel) -> list[str]:
    """Greedy answers of an adapter, as PEFT loads it, to its own training questions: lines of Markdown by style."""
    model = PeftModel.from_pretrained(base.model, str(out / name)).eval()
    records = as_pairs(out / f"{name}_train.jsonl", base)
    say(f"{name}: answering {len(records)} questions")
    right = exact_matches(model, base.tokenizer, records, max_new_tokens=MAX_NEW_TOKENS)
    lines = []
    for request in [*KNOW_ANSWERS, JSON_REQUEST]:
        marks = [mark for mark, record in zip(right, records, strict=True) if request in record.content["prompt"]]
        if marks:
            lines.append(f"| {name} | {request} | {sum(marks)} of {len(marks)} | {sum(marks) / len(marks):.1%} |")
    return lines


def make(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write_data(out, arguments.seed)
    reference = find_base((), arguments.base)
    trained, answered = [], []
    for index, name in enumerate(ADAPTERS):
        base = load_base(reference, dtype=arguments.dtype)
        trained.append(train(name, out, base, arguments.seed + index, arguments.base_id or reference.id))
        answered += own_skill(name, out, load_base(reference, dtype=arguments.dtype))
    print("| adapter | records | steps | tokens | seconds |\n|---|--:|--:|--:|--:|", *trained, sep="\n")
    print("\n| adapter | asked | right, to the letter | share |\n|---|---|--:|--:|", *answered, sep="\n")


def check(arguments: argparse.Namespace) -> None:
    """Scores base, each adapter, uniform and sum on the composite test, through loracli."""
    adapters = [read_adapter(str(arguments.out / name)) for name in ADAPTERS]
    base = load_base(find_base(adapters, arguments.base), dtype=arguments.dtype)
    test = arguments.out / "composite_test.jsonl"
    examples, records = read_examples(test, base), as_pairs(test, base)
    batches = plan_batches(examples, batch_tokens=1024)
    modules = make_mixing(adapters, "module").modules
    print("| | nats per token | right, to the letter |\n|---|--:|--:|")
    with attach(base.model, adapters, modules) as attached:
        objective = make_objective(attached, batches[0])
        for name, point in static_points(ADAPTERS).items():
            attached.set_weights(torch.tensor(point).expand(len(modules), -1))
            nats = objective.score(batches, len(examples)).nats_per_token
            right = exact_matches(base.model, base.tokenizer, records, max_new_tokens=MAX_NEW_TOKENS)
            print(f"| {name} | {nats:.4f} | {sum(right)} of {len(right)} |", flush=True)


def say(text: str) -> None:
    """Tells how far it is, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a directory, or a Hub id")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-id", help="the name of the base in the adapters' configs; default: as it was given")
    parser.add_argument("--dtype", default="auto", help="of the base's weights")
    parser.add_argument("--check", action="store_true", help="train nothing; score the static mixings of OUT")
    arguments = parser.parse_args()
    (check if arguments.check else make)(arguments)


if __name__ == "__main__":
    main()
