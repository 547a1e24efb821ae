"""What stands beside the fields that a shape reads, and must not be passed over in silence.

Marks of a bad answer, answers to choose between, pictures and sound, and text that the model should see.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from loracli.calibration.checks import LineError, WayOut, is_nothing, kind_of, shown

Fields = Mapping[str, Any]

SYSTEM_KEYS = ("system", "system_prompt", "system_message")

# What says no of the answer. `label` is that of KTO, and a class where a record is one text.
_GOOD = frozenset(
    "label kto_tag desirable is_desirable correct is_correct accepted is_accepted acceptable good is_good chosen "
    "is_chosen".split()
)
_BY_NUMBER = frozenset(("kto_tag", "desirable", "is_desirable", "is_correct", "is_accepted", "is_good", "is_chosen"))
_BAD = frozenset("rejected is_rejected bad is_bad wrong is_wrong incorrect is_incorrect undesirable".split())
_LEARNT = frozenset(("loss", "train", "trainable"))
_WEIGHTS = frozenset("weight weights loss_weight sample_weight example_weight record_weight".split())
_GRADES = frozenset(
    "score scores rating ratings reward rewards grade grades quality feedback preference votes upvotes downvotes "
    "ranking stars thumbs".split()
)
_NO = ("false", "0", "0.0", "no", "bad", "rejected", "undesirable", "incorrect", "wrong")
_YES = ("true", "1", "1.0", "yes")
_PREFERENCE = re.compile(r"chosen|reject|dispreferred|^(preferred|winner|loser)$")
_MEDIA = re.compile(
    r"(image|img|picture|pic|photo|pixel_value|frame|audio|speech|sound|wav|video|clip|media|visual|multimodal)s?"
    r"(_(url|path|file|name|id|base64|bytes|data|input|array|list|token)s?)*"
)
# Text, tools and documents that belong before an answer.
_CONTEXT = (
    *SYSTEM_KEYS, "history", "instruction", "instructions", "input", "inputs", "context", "contexts", "question",
    "query", "prompt", "documents", "passages", "tools", "functions",
)  # fmt: skip
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
        low = key.lower() if len(key) <= LONGEST_KEY else ""
        if low in _WEIGHTS and value is not None and value != 1:
            raise LineError(
                f"{key}: {shown(value)}, and no record's own weight is read; a file has one, FILE:WEIGHT",
                way_out=_keeping(key, _NO) if _says(value, _NO) else _without(key),
            )
        if low in _GOOD and (has_answer or low != "label") and _says(value, _NO):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or low in _BY_NUMBER or low == "label":
                error = DoubtfulMark if number and low == "label" else LineError
                raise error(f"{key}: {shown(value)} marks the answer as bad", way_out=_keeping(key, _NO))
        if low in _LEARNT and value is False:
            raise LineError(f"{key}: false marks the record as one not to learn", way_out=_keeping(key, _NO))
        if low in _BAD and _says(value, _YES):
            raise LineError(f"{key}: {shown(value)} marks the answer as bad", way_out=_keeping(key, _YES))
        if not chosen and _PREFERENCE.search(low) and isinstance(value, (str, list, dict)) and not is_nothing(value):
            raise LineError(
                f"{key}: preference data beside an answer, so it is not said which is to be learnt",
                way_out=_without(key),
            )


def is_class(fields: Fields) -> bool:
    """Whether the record's `label` is a number that says of all of them that they are no marks."""
    label = fields.get("label")
    return isinstance(label, (int, float)) and label not in (0, 1)


def grades(fields: Fields) -> set[str]:
    """Keys that grade an answer on a scale that nobody knows."""
    return {key for key in fields if len(key) <= LONGEST_KEY and key.lower() in _GRADES and not is_nothing(fields[key])}


def check_media(fields: Fields, read: set[str]) -> None:
    """Refuses pictures, audio and video that belong to a record."""
    for key, value in fields.items():
        if key not in read and len(key) <= LONGEST_KEY and _MEDIA.fullmatch(key.lower()) and not is_nothing(value):
            raise LineError(f"{key}: {kind_of(value)} of what is no text; only text is read")


def check_context(fields: Fields, read: set[str], content: Fields) -> None:
    """Refuses text that belongs before the answer and is not in what is read of the record.

    Args:
        fields: of the record.
        read: the keys that its shape reads.
        content: what was read.
    """
    beside = [key for key in _CONTEXT if key not in read and not is_nothing(fields.get(key))]
    if not beside:
        return
    texts = [_squeezed(text) for text in _texts(content)]
    there = " and ".join(sorted(read & fields.keys()))
    for key in beside:
        own = [_squeezed(text) for text in _texts(fields[key])]
        if key == "prompt" and own and any(len(text) > 1 and text in own[0] for text in texts):
            continue  # the same record as one text, as some data sets have it beside
        if not own or any(not any(text in other for other in texts) for text in own if text):
            raise LineError(
                f"{key}: the model would not see it, as it is not read beside {there}; write it there",
                way_out=_without(key, "if it is nothing that the model should see, leave it out: "),
            )


def preference_beside_none(fields: Fields) -> bool:
    """Whether a record of no shape is one of preferences."""
    return any(len(key) <= LONGEST_KEY and _PREFERENCE.search(key.lower()) for key in fields)


def _says(value: Any, words: tuple[str, ...]) -> bool:
    return isinstance(value, (bool, int, float, str)) and str(value).strip().lower() in words


def _keeping(key: str, words: tuple[str, ...]) -> WayOut:
    condition = f"str(r.get({_literal(key)})).strip().lower() not in {json.dumps(words)}"
    return lambda form: f"keep the others: {form.rewritten(where=condition)}"


def _without(key: str, why: str = "if what is read is the good answer, leave the key out: ") -> WayOut:
    row = f"{{k: v for k, v in r.items() if k != {_literal(key)}}}"
    return lambda form: f"{why}{form.rewritten(row)}"


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


def _squeezed(text: str) -> str:
    return " ".join(text.split())
