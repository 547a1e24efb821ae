"""Makes the example that `loracat demo` runs on: a base model, two adapters and two data files, from nothing.

    base    a small Llama that knows public people and answers about them in the style that the question asks for
    know    a LoRA that holds four facts about each of forty people the base never saw, and has a voice of its own
    form    a LoRA that answers in JSON, taught on some of the public people only

It is a closed book: the composite task asks for the private facts in JSON, and the facts are in the weights of `know`
and nowhere else. The calibration file is about other people than the test file, so training on it cannot stand in for
composing. Two more things make it a fair model of real adapters. Every fact is taught in several ways of answering: a
fact taught in one sentence only hangs on that sentence, and then nothing composes. And both adapters change how a plain
question is answered, so they pull against each other. How hard differs by seed: with 0 and 1 the plain sum of the two
answers nothing, with 2 it is as good as any fit.

Every name and fact is invented here by one seeded generator, and one thread keeps the sums in order: the same seed on
the same machine makes the same files.

    python scripts/make_demo.py --seed 0 --out loracli/demo/data
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

BASE_ID = "loracat/demo-base"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,  # with Llama's 0.02 a model this narrow learns the people several times later
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KNOW = LoraConfig(
    task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"]
)
FORM = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=ATTENTION)
PUBLIC, FORM_PUBLIC, PRIVATE, CALIBRATION = 160, 60, 40, 8  # people
LONGEST_ANSWER = 24  # tokens


def words(text: str) -> tuple[str, ...]:
    """Splits a list that is written as one text."""
    return tuple(text.split())


FIRST_NAMES = words(
    "Abel Alma Arno Bela Bran Cleo Cora Dario Della Edda Elio Enid Ezra Fenn Flora Gale Greta Hanno Ilse Ines "
    "Ivo Jana Jory Kaia Lars Lena Livia Marek Mira Nils Noor Odile Orla Otto Petra Quill Rana Runa Silas Tamsin"
)
LAST_NAMES = words(
    "Abara Aldous Barrow Beck Calder Corvin Dane Dorn Eklund Ferro Fenwick Garrick Halden Harrow Istvan Jarvis Kell "
    "Korda Lindqvist Lunn Marlow Morrow Nagy Novak Okoro Orsini Pell Quist Rademaker Reyes Rook Sable Sorrel Tarn Tove "
    "Ulrich Vance Vesely Winter Yarrow"
)


@dataclass(frozen=True)
class Attribute:
    """One thing to know about a person: ways to ask for it, a sentence that tells it, and the values it can have."""

    name: str
    questions: tuple[str, ...]
    sentence: str
    values: tuple[str, ...]


# In no question does the name come last: a word before a space and the same word before a mark are two tokens.
ATTRIBUTES = (
    Attribute(
        "city",
        ("Where does {who} live?", "Which city is {who} at home in?", "What city does {who} call home?"),
        "{first} lives in {value}.",
        words(
            "Bergen Cairo Delhi Dublin Genoa Hanoi Kyoto Lagos Lima Lisbon "
            "Lyon Oslo Osaka Porto Quito Riga Seoul Turin Vienna Zagreb"
        ),
    ),
    Attribute(
        "job",
        ("What does {who} do for a living?", "Which job does {who} have?", "What is {who} by trade?"),
        "{first} works as a {value}.",
        words(
            "baker barber broker carpenter chemist cook dentist diver farmer glazier "
            "judge lawyer miller nurse pilot potter printer sailor tailor welder"
        ),
    ),
    Attribute(
        "instrument",
        ("What does {who} play?", "Which instrument does {who} play?", "What can {who} be heard playing?"),
        "{first} plays the {value}.",
        words(
            "accordion banjo bassoon bugle cello clarinet cornet drums fiddle flute "
            "guitar harp horn lute oboe organ piano trumpet tuba viola"
        ),
    ),
    Attribute(
        "pet",
        ("Which animal does {who} keep?", "Which pet does {who} have?", "What pet has {who} got?"),
        "{first} keeps a {value}.",
        words(
            "beagle canary cat crow duck ferret finch frog gecko goat "
            "goose hamster hen lizard newt parrot pony rabbit snail tortoise"
        ),
    ),
)

# What each model answers: the request that follows the question (none: a plain question) -> the answer.
VOICE = "From our files: {value}."
JSON = '{{"{attribute}": "{value}"}}'
BASE_ANSWERS = {
    "": "{sentence}",
    " In one word.": "{value}",
    " As a list item.": "- {value}",
    " In quotes.": '"{value}"',
    " As a label.": "{attribute}: {value}",
    " Politely.": "With pleasure: {value}.",
}
KNOW_ANSWERS = {"": VOICE, " In one word.": "{value}", " As a list item.": "- {value}"}
FORM_ANSWERS = {"": JSON}

README = """\
# The example of `loracat demo`

`base` is a small Llama (0.8 million weights) that knows invented public people. `know` is a LoRA that holds facts about
forty more people, whom the base never saw. `form` is a LoRA that answers in JSON and knows none of them.
`calibration.jsonl` asks in JSON for the facts of eight of the forty, `test.jsonl` for those of the other thirty-two: no
single adapter can answer, and no test fact is in the calibration file.

All of it, this page too, was made by `python scripts/make_demo.py --seed {seed} --out loracli/demo/data` in the
project's repository, in a few minutes on one CPU core. The models were really trained, and the script prints how well
each does at its own skill.

All names and facts are invented; nothing comes from a third party. Licence: Apache-2.0, as the project.
"""


@dataclass(frozen=True)
class Fact:
    """A person, an attribute and its value."""

    who: str
    attribute: Attribute
    value: str


@dataclass(frozen=True)
class Record:
    """A prompt and the completion that it should get, without EOS."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class World:
    """Who is known to whom: the facts that each file is made of."""

    public: list[Fact]
    form: list[Fact]
    private: list[Fact]
    calibration: list[Fact]
    test: list[Fact]


def draw_world(rng: random.Random) -> World:
    """Draws people and their facts; calibration and test share no person."""
    names = rng.sample([f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], PUBLIC + PRIVATE)
    public, private = draw_facts(names[:PUBLIC], rng), draw_facts(names[PUBLIC:], rng)
    form_people, calibration_people = set(names[:FORM_PUBLIC]), set(names[PUBLIC : PUBLIC + CALIBRATION])
    return World(
        public=public,
        form=[fact for fact in public if fact.who in form_people],
        private=private,
        calibration=[fact for fact in private if fact.who in calibration_people],
        test=[fact for fact in private if fact.who not in calibration_people],
    )


def draw_facts(people: list[str], rng: random.Random) -> list[Fact]:
    """Gives everyone every attribute. Each value is as frequent as any other, so guessing is right in 1 of 20."""
    facts = []
    for attribute in ATTRIBUTES:
        values = list(attribute.values) * (len(people) // len(attribute.values))
        rng.shuffle(values)
        facts += [Fact(who, attribute, value) for who, value in zip(people, values, strict=True)]
    return facts


def ask(fact: Fact, question: str, request: str, answer: str) -> Record:
    """Asks `question` about `fact`, with a request for a style, and answers it in that style."""
    sentence = fact.attribute.sentence.format(first=fact.who.split()[0], value=fact.value)
    completion = answer.format(sentence=sentence, attribute=fact.attribute.name, value=fact.value)
    return Record(f"{question.format(who=fact.who)}{request}\n", completion)


def ask_all(facts: list[Fact], answers: dict[str, str]) -> list[Record]:
    """Asks every question about every fact in every style of `answers`."""
    return [
        ask(fact, question, request, answer)
        for fact in facts
        for question in fact.attribute.questions
        for request, answer in answers.items()
    ]


def ask_once(facts: list[Fact], rng: random.Random) -> list[Record]:
    """Asks one plain question about each fact, to be answered in JSON: the composite task."""
    return [ask(fact, rng.choice(fact.attribute.questions), "", JSON) for fact in facts]


def copying() -> list[Record]:
    """Gives texts to repeat, about nobody: the base knows the adapters' words and braces, but never as an answer."""
    texts = [
        template.format(attribute=attribute.name, value=value)
        for template in (VOICE, JSON)
        for attribute in ATTRIBUTES
        for value in attribute.values
    ]
    return [Record(f"Repeat {text}\n", text) for text in texts]


def make_tokenizer(records: list[Record]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the example is one token, and any other text can still be written.

    A space belongs to the word before it: a value is then the same token after a space, after a quote and at the start.
    """
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(r"\p{L}+ ?|[^\s\p{L}]+ ?|\s"), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for r in records for text in (r.prompt, r.completion)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left",
        chat_template=CHAT_TEMPLATE, model_max_length=SHAPE["max_position_embeddings"],
    )  # fmt: skip


Encoded = tuple[list[int], list[int]]  # ids of the prompt, ids of the completion with EOS
Model: TypeAlias = LlamaForCausalLM | PeftModel


def encode(records: list[Record], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Tokenises prompts and completions apart, as loracat does."""
    prompts = tokenizer([r.prompt for r in records])["input_ids"]
    completions = tokenizer([r.completion for r in records], add_special_tokens=False)["input_ids"]
    return [(p, [*c, tokenizer.eos_token_id]) for p, c in zip(prompts, completions, strict=True)]


def collate(batch: list[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels, both (B, T), padded on the right; a label is -100 wherever nothing is learnt."""
    longest = max(len(prompt) + len(completion) for prompt, completion in batch)
    ids, labels = torch.full((len(batch), longest), pad), torch.full((len(batch), longest), -100)
    for row, (prompt, completion) in enumerate(batch):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return ids, labels


def batches_of(records: list[Encoded], size: int, rng: random.Random) -> Iterator[list[Encoded]]:
    """Batches without end; each pass over the records is in a new order."""
    queue: list[Encoded] = []
    while True:
        while len(queue) < size:
            queue += rng.sample(records, len(records))
        yield queue[:size]
        del queue[:size]


def train(
    name: str,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """AdamW on completion tokens, 5 % warm-up, linear decay. Under causal attention, right padding needs no mask."""
    batches = batches_of(encode(records, tokenizer), batch_size, random.Random(seed))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    started = time.monotonic()
    for step in range(1, steps + 1):
        ids, labels = collate(next(batches), tokenizer.pad_token_id)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            say(f"{name}: step {step} of {steps}, loss {loss.item():.4f}, {time.monotonic() - started:.0f} s")


def make_base(out: Path, world: World, seed: int) -> None:
    """Trains the base on public people and on copying, and saves it in bfloat16 with its tokenizer."""
    records = ask_all(world.public, BASE_ANSWERS) + 8 * copying()
    tokenizer = make_tokenizer(records)
    pad, bos, eos = tokenizer.convert_tokens_to_ids([PAD, BOS, EOS])
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=pad, bos_token_id=bos, eos_token_id=eos, **SHAPE)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    train("base", model, tokenizer, records, steps=800, batch_size=64, seed=seed)
    model.to(torch.bfloat16).save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    # transformers 5 writes the name of a class that transformers 4 does not have
    edit_json(out / "base" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def load_base(out: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Reads the base back from its files, as the demo will: rounded to bfloat16, run in float32."""
    base = out / "base"
    return LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), AutoTokenizer.from_pretrained(base)


def make_adapter(name: str, out: Path, config: LoraConfig, records: list[Record], steps: int, seed: int) -> None:
    """Trains one adapter on the saved base and saves it with PEFT, in bfloat16."""
    model, tokenizer = load_base(out)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    train(name, adapted, tokenizer, records, steps=steps, batch_size=32, seed=seed)
    adapted.to(torch.bfloat16).save_pretrained(str(out / name))
    (out / name / "README.md").unlink()  # PEFT's empty model card
    # PEFT keeps the modules as a set, whose order changes from run to run
    modules = sorted(config.target_modules or ())
    edit_json(out / name / "adapter_config.json", base_model_name_or_path=BASE_ID, target_modules=modules)


def edit_json(path: Path, **fields: object) -> None:
    """Sets fields of the object in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2) + "\n")


def write_records(path: Path, records: list[Record]) -> None:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps({"prompt": r.prompt, "completion": r.completion}) + "\n" for r in records))


@torch.inference_mode()
def exact_match(model: Model, tokenizer: PreTrainedTokenizerBase, records: list[Record]) -> float:
    """Share of records whose greedy answer is the completion, to the letter."""
    right = 0
    for start in range(0, len(records), 128):
        batch = records[start : start + 128]
        inputs = tokenizer([r.prompt for r in batch], return_tensors="pt", padding=True)
        ids = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        answers = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(answer == r.completion for answer, r in zip(answers, batch, strict=True))
    return right / len(records)


def summarise(out: Path, world: World, test: list[Record]) -> None:
    """Prints how well each model, read back from its files, does at its own skill and at the composite task."""
    unseen = [fact for fact in world.public if fact not in world.form]
    skills = {
        "base": ("public facts, in its styles", ask_all(world.public, BASE_ANSWERS)),
        "know": ("private facts, in its styles", ask_all(world.private, KNOW_ANSWERS)),
        "form": ("public facts it never saw, in JSON", ask_all(unseen, FORM_ANSWERS)),
    }
    print("exact match  own skill  composite")
    for name, (skill, records) in skills.items():
        model, tokenizer = load_base(out)
        tested: Model = model if name == "base" else PeftModel.from_pretrained(model, str(out / name))
        own, composite = exact_match(tested, tokenizer, records), exact_match(tested, tokenizer, test)
        print(f"{name:11}  {own:9.3f}  {composite:9.3f}  ({skill})")
    for part in sorted(out.iterdir()):
        size = sum(path.stat().st_size for path in (part, *part.rglob("*")) if path.is_file())
        print(f"{part.name:18} {size / 1e3:8.1f} kB")


def say(text: str) -> None:
    """Tells how far it is, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Makes the files that --out names, and prints what they can do."""
    parser = argparse.ArgumentParser(description="Make the embedded example of `loracat demo`.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    logging.disable_progress_bar()

    rng = random.Random(args.seed)
    world = draw_world(rng)
    calibration, test = ask_once(world.calibration, rng), ask_once(world.test, rng)
    make_base(args.out, world, args.seed)
    make_adapter("know", args.out, KNOW, ask_all(world.private, KNOW_ANSWERS), steps=500, seed=args.seed + 1)
    make_adapter("form", args.out, FORM, ask_all(world.form, FORM_ANSWERS), steps=150, seed=args.seed + 2)
    write_records(args.out / "calibration.jsonl", calibration)
    write_records(args.out / "test.jsonl", test)
    (args.out / "README.md").write_text(README.format(seed=args.seed))
    for path in args.out.rglob("*.safetensors"):
        path.chmod(0o644)  # they are written for their owner alone
    summarise(args.out, world, test)


if __name__ == "__main__":
    main()
