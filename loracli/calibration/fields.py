"""The fields of a record: what a value must be, what the keys are called, and what must not be passed over in silence.

Beside what a shape reads stand marks of a bad answer, answers to choose between, pictures and sound, and text that the
model should see. Other names of what is read are given by `--fields prompt=question,completion=answer`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import NoneType
from typing import Any

from loracli.calibration.file_forms import FileForm
from loracli.errors import UsageError
from loracli.system.near import did_you_mean, hints

WayOut = Callable[[FileForm], str]  # the hint that mends a whole file of such lines


class LineError(Exception):
    """`path: reason` of one bad line; the caller adds the place.

    Args:
        reason: with the path.
        way_out: what else than mending the line by hand helps, where something does.
    """

    def __init__(self, reason: str, *, way_out: WayOut | None = None) -> None:
        super().__init__(reason)
        self.way_out = way_out


def check_text(value: Any, path: str, *, may_be_empty: bool) -> str:
    """The value, if it is a string, and not only white space unless it may be empty."""
    if not isinstance(value, str):
        raise LineError(f"{path}: expected a string, got {kind_of(value)}")
    if not may_be_empty and not value.strip():
        raise LineError(f"{path}: empty")
    return value


def kind_of(value: Any) -> str:
    """`a string`, `a number`, `null`, ..., as JSON calls it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "an empty list" if value == [] else kinds[type(value)]


def shown(value: Any) -> str:
    """The value for a message: a string as JSON has it, cut to a length; of anything that holds others, its kind."""
    if isinstance(value, (list, dict)):
        return kind_of(value)
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


_EMPTY = ("", "[]", "{}", "null")  # as a table of texts keeps them


def is_nothing(value: Any) -> bool:
    """Whether a field says nothing: null, false, an empty text, one of an empty list or object, or such in a list."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, (list, dict)):
            left += item.values() if isinstance(item, dict) else item
        elif item is not None and item is not False and not (isinstance(item, str) and item.strip() in _EMPTY):
            return False
    return True


_Fields = Mapping[str, Any]

SYSTEM_KEYS = ("system", "system_prompt", "system_message")

# What says no of the answer. `label` is that of KTO, and a class where a record is one text.
_GOOD = frozenset(
    "label kto_tag human_label feedback_label desirable is_desirable correct is_correct answer_correct correctness "
    "accepted is_accepted acceptable good is_good is_good_answer chosen is_chosen preferred is_preferred winner "
    "is_winner thumbs_up liked passed valid is_valid verified success status keep include".split()
)
# Of these a number is a scale, a count or the place of a choice as well.
_NOT_BY_NUMBER = frozenset(
    "correct correctness accepted acceptable good chosen preferred winner thumbs_up status".split()
)
_BAD = frozenset(
    "rejected is_rejected bad is_bad wrong is_wrong incorrect is_incorrect undesirable thumbs_down disliked skip "
    "exclude excluded discard".split()
)
_LEARNT = frozenset(("loss", "train", "trainable", "loss_scale"))
_WEIGHTS = frozenset("weight weights loss_weight loss_scale sample_weight example_weight record_weight".split())
_GRADES = frozenset(
    "score scores rating ratings reward rewards grade grades quality feedback preference votes upvotes downvotes "
    "ranking stars thumbs".split()
)
_NO = (
    "false", "0", "0.0", "-1", "-1.0", "no", "n", "bad", "rejected", "undesirable", "incorrect", "wrong", "negative",
    "unsafe", "dislike", "disliked", "thumbs_down", "failed", "invalid",
)  # fmt: skip
_YES = ("true", "1", "1.0", "yes", "y")
_CLASSES = 10  # a label is a class if at least one labelled record of so many has a number beyond 0 and 1
_PREFERENCE = re.compile(r"chosen|reject|dispreferred|^(preferred|winner|loser)$")
_MEDIA = re.compile(
    r"((input|source|target|user)_)?"
    r"(image|img|picture|pic|photo|pixel_value|screenshot|frame|audio|speech|sound|wav|video|clip|media|visual|"
    r"multimodal|attachment|pdf)s?(_?\d+)?"
    r"(_(url|uri|path|file|filepath|filename|name|id|base64|bytes|data|input|array|list|token|grid|thw|mask)s?)*"
    r"(_?\d+)?|files"
)
_SYSTEM_NAMES = (*SYSTEM_KEYS, "sys", "preprompt", "persona")
_HISTORY_NAMES = ("history", "chat_history", "dialogue_history", "conversation_history")
_PASSAGE_NAMES = (
    "context", "contexts", "passage", "passages", "document", "documents", "background", "knowledge", "evidence",
    "article", "story", "paragraph", "title",
)  # fmt: skip
# Text, tools and documents that belong before an answer.
_CONTEXT = frozenset((
    *_SYSTEM_NAMES, *_HISTORY_NAMES, *_PASSAGE_NAMES, "instruction", "instructions", "input", "inputs", "question",
    "query", "prompt", "tools", "functions",
))  # fmt: skip
_WORD = re.compile(r"[^\W\u2e80-\uffff]+|\S")  # of scripts that divide no words, each character
_MAX_SEARCHES = 200  # in all that is read of a record; a text that is a whole turn needs none
_LONGEST_KEY = 60  # of what is looked at


class DoubtfulMark(LineError):
    """A `label` of 0: a bad answer, or the first of several classes; the other records tell."""


def check_marks(fields: _Fields, *, has_answer: bool, chosen: bool) -> None:
    """Refuses a record whose answer is marked as bad, or stands beside one to choose from.

    Args:
        fields: of the record, by our names.
        has_answer: whether it has one apart from the rest; a text has none.
        chosen: whether the user has said that the chosen answer is to be read.
    Raises:
        LineError: with the command that keeps the others.
    """
    for key, value in fields.items():
        low = _spelled(key)
        if low in _LEARNT and _says(value, _NO):
            raise LineError(f"{key}: {shown(value)} marks the record as one not to learn", way_out=_keeping(key, _NO))
        if low in _WEIGHTS and value is not None and value != 1:
            raise LineError(
                f"{key}: {shown(value)}, and no record's own weight is read; a file has one, FILE:WEIGHT",
                way_out=_keeping(key, _NO) if _says(value, _NO) else _without(key),
            )
        if low in _GOOD and (has_answer or low != "label") and _says(value, _NO):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or low not in _NOT_BY_NUMBER:
                error = DoubtfulMark if low == "label" and number and value == 0 else LineError
                raise error(f"{key}: {shown(value)} marks the answer as bad", way_out=_keeping(key, _NO))
        if low in _BAD and _says(value, _YES):
            raise LineError(f"{key}: {shown(value)} marks the answer as bad", way_out=_keeping(key, _YES))
        if not chosen and _PREFERENCE.search(low) and isinstance(value, (str, list, dict)) and not is_nothing(value):
            raise LineError(
                f"{key}: preference data beside an answer, so it is not said which is to be learnt",
                way_out=_without(key),
            )


@dataclass
class FileMarks:
    """What the keys beside the answers say in a whole file."""

    labelled: int = 0  # records whose `label` is a number
    beyond: int = 0  # those of them where it is a class beyond 0 and 1
    yes: set[str] = field(default_factory=set)  # keys that say of some answer that it is good
    nulls: dict[str, list[int]] = field(default_factory=dict)  # lines where such a key is null
    booleans: dict[str, set[bool]] = field(default_factory=dict)
    noes: set[str] = field(default_factory=set)  # keys that say no by a text or number that may mean something else

    def count_label(self, fields: _Fields) -> None:
        """Of every record, also one that is refused."""
        label = fields.get("label")
        if isinstance(label, (int, float)) and not isinstance(label, bool):
            self.labelled += 1
            self.beyond += label > 1

    def add(self, number: int, fields: _Fields, unread: Iterable[str], *, has_answer: bool) -> None:
        """Of a record on line `number` that is taken so far."""
        for key in unread:
            value, low = fields[key], _spelled(key)
            if low in _GOOD and (has_answer or low != "label"):
                if value is None:
                    self.nulls.setdefault(key, []).append(number)
                elif value is True or _says(value, _YES):
                    self.yes.add(key)
            if low in _GRADES:
                continue
            if low in _NOT_BY_NUMBER and _says(value, _NO):
                self.noes.add(key)
            elif isinstance(value, bool):
                self.booleans.setdefault(key, set()).add(value)
            elif isinstance(value, str) and value.strip()[:1].isalpha() and _says(value, _NO):
                self.noes.add(key)

    @property
    def classes(self) -> bool:
        """Whether `label` is a class, so that 0 is no mark."""
        return 0 < self.labelled <= self.beyond * _CLASSES

    def refused(self) -> Iterator[tuple[int, LineError]]:
        """Lines where a key is null that says of other answers that they are good."""
        for key in sorted((self.yes & self.nulls.keys()) - ({"label"} if self.classes else set())):
            for number in self.nulls[key]:
                reason = f"{key}: null, where other answers are marked as good"
                yield number, LineError(reason, way_out=_keeping(key, ("none",)))

    def doubtful(self) -> set[str]:
        """Keys that may say which answers are bad, and do not by any name that is known."""
        return {key for key, values in self.booleans.items() if len(values) > 1} | self.noes


def grades(fields: _Fields) -> set[str]:
    """Keys that grade an answer on a scale that nobody knows."""
    return {key for key in fields if _spelled(key) in _GRADES and not is_nothing(fields[key])}


def check_media(fields: _Fields, read: set[str]) -> None:
    """Refuses pictures, audio and video that belong to a record."""
    for key, value in fields.items():
        if key not in read and _MEDIA.fullmatch(_spelled(key)) and not is_nothing(value):
            raise LineError(f"{key}: {kind_of(value)} of something that is not text; only text is read")


def check_context(fields: _Fields, read: set[str], content: _Fields) -> None:
    """Refuses text that belongs before the answer and does not stand there, whole, in what is read of the record.

    Args:
        fields: of the record.
        read: the keys that its shape reads.
        content: what was read.
    """
    beside = [key for key in fields if key not in read and _spelled(key) in _CONTEXT and not is_nothing(fields[key])]
    if "text" in content:  # whose title is no part of it
        beside = [key for key in beside if _spelled(key) != "title"]
    if not beside:
        return
    there = " and ".join(sorted(read & fields.keys()))
    seen = {answers: list(map(_words, _before_answer(content, answers=answers))) for answers in (False, True)}
    joined = {answers: "\n".join(texts) for answers, texts in seen.items()}
    searches = 0
    for key in beside:
        name = _spelled(key)
        answers = name in _HISTORY_NAMES
        own = {words for text in _texts(fields[key]) if (words := _words(text)).strip()}
        parts = own.difference(seen[answers])
        searches += len(parts)
        if not own or searches > _MAX_SEARCHES or any(words not in joined[answers] for words in parts):
            way_out = _without(key, "if it is nothing that the model should see, leave it out: ")
            if name in _SYSTEM_NAMES and "system" in read and "system" not in fields:
                way_out = _read_as_system(key)
            raise LineError(
                f"{key}: the model would not see it, as it is not read beside {there}; write it there", way_out=way_out
            )


def _before_answer(content: _Fields, *, answers: bool) -> list[str]:
    """The texts that the model sees before its last answer, those that it learns as answers only if asked for.

    Of a record that is one text, all of it.
    """
    if "messages" not in content:
        return [content["text"] if "text" in content else content["prompt"]]
    messages = content["messages"]
    own = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    learnt = () if answers else frozenset(content.get("scored", own))
    return [message["content"] for index, message in enumerate(messages[:-1]) if index not in learnt]


def preference_beside_none(fields: _Fields) -> bool:
    """Whether a record of no shape is one of preferences."""
    return any(_PREFERENCE.search(_spelled(key)) for key in fields)


@lru_cache(maxsize=4096)  # the keys of one record are those of the next
def _spelled(key: str) -> str:
    """A key as snake case writes it: `system_prompt` for `systemPrompt`; empty if it is too long to be known."""
    if len(key) > _LONGEST_KEY:
        return ""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_").replace(" ", "_")


def _says(value: Any, words: tuple[str, ...]) -> bool:
    return isinstance(value, (bool, int, float, str)) and str(value).strip().lower().replace(" ", "_") in words


def _keeping(key: str, words: tuple[str, ...]) -> WayOut:
    condition = f'str(r.get({_literal(key)})).strip().lower().replace(" ", "_") not in {json.dumps(words)}'
    return lambda form: f"keep the others: {form.rewritten(where=condition)}"


def _without(key: str, why: str = "if what is read is the good answer, leave the key out: ") -> WayOut:
    row = f"{{k: v for k, v in r.items() if k != {_literal(key)}}}"
    return lambda form: f"{why}{form.rewritten(row)}"


def _read_as_system(key: str) -> WayOut:
    option = shlex.quote(f"system={key}")
    return lambda form: f"read it as the first turn: --fields {option}"


def _literal(key: str) -> str:
    """In Python's words, with the quotes that a shell needs not escape."""
    return json.dumps(key) if key.isascii() else ascii(key)


def _texts(value: Any) -> list[str]:
    """All texts in a value, but for the names of roles and kinds."""
    found, left = [], [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, Mapping):
            left += [inner for key, inner in item.items() if key not in ("role", "from", "type")]
        elif isinstance(item, (list, tuple)):
            left += item
    return found


def _words(text: str) -> str:
    """The words and signs, each between two spaces, so that one text is looked for in another word by word."""
    return f" {' '.join(_WORD.findall(text))} "


_READABLE = (
    "text", "prompt", "completion", "messages", "conversations", "instruction", "input", "output", "system", "history",
    "tools", "task", "choices",
)  # fmt: skip

# What people call the two texts, most telling first.
_QUESTIONS = ("question", "query", "problem", "instruction", "prompt", "input", "inputs", "user", "human", "source")
_ANSWERS = (
    "answer", "response", "completion", "output", "solution", "target", "targets", "outputs", "reply", "generation",
    "assistant", "gpt",
)  # fmt: skip


def parse_fields(text: str | None) -> dict[str, str]:
    """The key of the file for each of ours: {"prompt": "question"}.

    Raises:
        UsageError: if it is not NAME=KEY between commas, or a name or a key is twice there, or a name read by no shape.
    """
    found: dict[str, str] = {}
    for pair in (text or "").split(",") if text is not None else ():
        name, sign, key = (word.strip() for word in pair.partition("="))
        if not sign or not key:
            raise UsageError(f"--fields {text}: {pair or 'nothing'} is not NAME=KEY", hint=_EXAMPLE)
        if name not in _READABLE:
            hint = hints(did_you_mean(name, _READABLE), _EXAMPLE)
            raise UsageError(f"--fields {text}: {name} is not one of {', '.join(_READABLE)}", hint=hint)
        if name in found:
            raise UsageError(f"--fields {text}: {name} is there twice", hint=_EXAMPLE)
        if key in found.values():
            raise UsageError(f"--fields {text}: {key} is read twice", hint=_EXAMPLE)
        found[name] = key
    return found


_EXAMPLE = "write it as --fields prompt=question,completion=answer"


def suggestion(fields: Mapping[str, Any], renamed: Mapping[str, str]) -> str | None:
    """The option that reads a record of no shape, None where nothing suggests one.

    Args:
        fields: of the record, by our names.
        renamed: what the file calls those of them that have another name there.
    """
    names = _meant(fields)
    return None if names is None else _option({name: renamed.get(key, key) for name, key in names.items()})


def _meant(fields: Mapping[str, Any]) -> dict[str, str] | None:
    """Which key of a record of no shape each of our names stands for."""
    chosen = fields.get("chosen")
    if isinstance(chosen, list):
        first = chosen[0] if chosen and isinstance(chosen[0], dict) else {}
        answers = first.get("role", first.get("from")) in ("assistant", "gpt")
        return {"completion" if answers and "prompt" in fields else "messages": "chosen"}
    if "chosen" in fields:
        return _pair(fields, ("chosen",))
    return _pair(fields, _ANSWERS) or next(
        ({name: key} for key in fields if (name := key.lower()) != key and name in _WHOLE), None
    )


def _pair(fields: Mapping[str, Any], answers: tuple[str, ...]) -> dict[str, str] | None:
    """Prompt and completion; where a record has more that the model should see, an instruction that keeps it."""
    keys = {_spelled(key): key for key in reversed(list(fields))}
    texts = {name: key for name, key in keys.items() if isinstance(fields[key], str) and not is_nothing(fields[key])}
    answer = next((texts[name] for name in answers if name in texts), None)
    question = next((texts[name] for name in _QUESTIONS if name in texts and texts[name] != answer), None)
    if answer is None:
        return None
    if question is None:
        alone = all(is_nothing(fields[key]) for key in fields if key not in (answer, "id", "task", "skill"))
        return {"text": answer} if alone else None

    def beside(names: Iterable[str], kind: type) -> str | None:
        """Whose text may be empty here, as other records of the file have one."""
        there = (keys[name] for name in names if name in keys and isinstance(fields[keys[name]], (kind, NoneType)))
        return next((key for key in there if key not in (question, answer)), None)

    more = {
        "system": beside(_SYSTEM_NAMES, str),
        "history": beside(_HISTORY_NAMES, list),
        "input": beside(("input", *_PASSAGE_NAMES), str),
    }
    if not any(more.values()):
        return {"prompt": question, "completion": answer}
    return {"instruction": question} | {name: key for name, key in more.items() if key} | {"output": answer}


def _option(names: Mapping[str, str]) -> str | None:
    """Without what is called so already; None where a key cannot be written."""
    if any(set(key) & set(",=") or key != key.strip() for key in names.values()):
        return None
    written = (f"{name}={key}" for name, key in names.items() if key != name and (name, key) not in _READ_AS_THEY_ARE)
    return "--fields " + shlex.quote(",".join(written))


_WHOLE = ("text", "messages", "conversations")  # of which one alone makes a record
_READ_AS_THEY_ARE = {("system", key) for key in SYSTEM_KEYS}
