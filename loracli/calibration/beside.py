"""What stands beside the fields that a shape reads, and must not be passed over in silence.

Marks of a bad answer, answers to choose between, pictures and sound, and text that the model should see.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loracli.calibration.checks import LineError, WayOut, is_nothing, kind_of, shown

Fields = Mapping[str, Any]

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
SYSTEM_NAMES = (*SYSTEM_KEYS, "sys", "preprompt", "persona")
HISTORY_NAMES = ("history", "chat_history", "dialogue_history", "conversation_history")
PASSAGE_NAMES = (
    "context", "contexts", "passage", "passages", "document", "documents", "background", "knowledge", "evidence",
    "article", "story", "paragraph", "title",
)  # fmt: skip
# Text, tools and documents that belong before an answer.
_CONTEXT = frozenset((
    *SYSTEM_NAMES, *HISTORY_NAMES, *PASSAGE_NAMES, "instruction", "instructions", "input", "inputs", "question",
    "query", "prompt", "tools", "functions",
))  # fmt: skip
_WORD = re.compile(r"[^\W\u2e80-\uffff]+|\S")  # of scripts that divide no words, each character
_MAX_SEARCHES = 200  # in all that is read of a record; a text that is a whole turn needs none
LONGEST_KEY = 60  # of what is looked at


class DoubtfulMark(LineError):
    """A `label` of 0: a bad answer, or the first of several classes; the other records tell."""


def check_marks(fields: Fields, *, has_answer: bool, chosen: bool) -> None:
    """Refuses a record whose answer is marked as bad, or stands beside one to choose from.

    Args:
        fields: of the record, by our names.
        has_answer: whether it has one apart from the rest; a text has none.
        chosen: whether the user has said that the chosen answer is to be read.
    Raises:
        LineError: with the command that keeps the others.
    """
    for key, value in fields.items():
        low = spelled(key)
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

    def count_label(self, fields: Fields) -> None:
        """Of every record, also one that is refused."""
        label = fields.get("label")
        if isinstance(label, (int, float)) and not isinstance(label, bool):
            self.labelled += 1
            self.beyond += label > 1

    def add(self, number: int, fields: Fields, unread: Iterable[str], *, has_answer: bool) -> None:
        """Of a record on line `number` that is taken so far."""
        for key in unread:
            value, low = fields[key], spelled(key)
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


def grades(fields: Fields) -> set[str]:
    """Keys that grade an answer on a scale that nobody knows."""
    return {key for key in fields if spelled(key) in _GRADES and not is_nothing(fields[key])}


def check_media(fields: Fields, read: set[str]) -> None:
    """Refuses pictures, audio and video that belong to a record."""
    for key, value in fields.items():
        if key not in read and _MEDIA.fullmatch(spelled(key)) and not is_nothing(value):
            raise LineError(f"{key}: {kind_of(value)} of something that is not text; only text is read")


def check_context(fields: Fields, read: set[str], content: Fields) -> None:
    """Refuses text that belongs before the answer and does not stand there, whole, in what is read of the record.

    Args:
        fields: of the record.
        read: the keys that its shape reads.
        content: what was read.
    """
    beside = [key for key in fields if key not in read and spelled(key) in _CONTEXT and not is_nothing(fields[key])]
    if "text" in content:  # whose title is no part of it
        beside = [key for key in beside if spelled(key) != "title"]
    if not beside:
        return
    there = " and ".join(sorted(read & fields.keys()))
    seen = {answers: list(map(_words, _before_answer(content, answers=answers))) for answers in (False, True)}
    joined = {answers: "\n".join(texts) for answers, texts in seen.items()}
    searches = 0
    for key in beside:
        name = spelled(key)
        answers = name in HISTORY_NAMES
        own = {words for text in _texts(fields[key]) if (words := _words(text)).strip()}
        parts = own.difference(seen[answers])
        searches += len(parts)
        if not own or searches > _MAX_SEARCHES or any(words not in joined[answers] for words in parts):
            way_out = _without(key, "if it is nothing that the model should see, leave it out: ")
            if name in SYSTEM_NAMES and "system" in read and "system" not in fields:
                way_out = _read_as_system(key)
            raise LineError(
                f"{key}: the model would not see it, as it is not read beside {there}; write it there", way_out=way_out
            )


def _before_answer(content: Fields, *, answers: bool) -> list[str]:
    """The texts that the model sees before its last answer, those that it learns as answers only if asked for.

    Of a record that is one text, all of it.
    """
    if "messages" not in content:
        return [content["text"] if "text" in content else content["prompt"]]
    messages = content["messages"]
    own = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    scored = content.get("scored", own)
    learnt = () if answers else frozenset(scored)
    return [message["content"] for index, message in enumerate(messages[: scored[-1]]) if index not in learnt]


def preference_beside_none(fields: Fields) -> bool:
    """Whether a record of no shape is one of preferences."""
    return any(_PREFERENCE.search(spelled(key)) for key in fields)


def spelled(key: str) -> str:
    """A key as snake case writes it: `system_prompt` for `systemPrompt`; empty if it is too long to be known."""
    if len(key) > LONGEST_KEY:
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
