r"""Keys of `rank_pattern` and `alpha_pattern`, matched as PEFT matches them but without compiling a stranger's regular
expression.

PEFT takes the first key with `re.match(rf"(.*\.)?({key})$", module)` (peft/utils/other.py, get_pattern_key). Of that
language this much is read, and matches the same modules:

    q_proj   layers.0   layers\.0         characters of names; a dot is any character, `\.` is a dot
    ^   $                                 the beginning and the end of the name, first and last in an alternative
    q_proj|v_proj   (q|v)_proj   (?:...)  alternatives, also within each other; `(...)?` with none besides
    [0-9]   [^.]   \d   \w                one character of several
    .*   [0-9]+   \d{1,2}   .*?           a character, a dot or a class repeated

Not read: a repeated group, on which `re` can take time without end, references, look-arounds, flags.

Matching takes time in proportion to the module's name, however many keys there are. What is a name, or several by
alternatives, is looked up by its text. All other keys together are one automaton that goes through the name once: bit
i of a whole number says that item i of some key may come next (G. Navarro, M. Raffinot, Flexible Pattern Matching in
Strings, 2002, section 4.2: the extended Shift-And).
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

Value = TypeVar("Value")

_MAX_KEYS = 20_000
_MAX_KEY = 1000  # characters of a key
_MAX_ALTERNATIVES = 1 << 12  # of a key
_MAX_WRITTEN_OUT = 1 << 20  # characters of all keys, with their alternatives written out
_MAX_ITEMS = 1 << 14  # characters of those keys that are no names, written out likewise
_MAX_DEPTH = 8  # of groups within each other
_MAX_PLACES = 16  # ways in which names of one length may have dots that are not escaped

_OTHER = 128  # stands for any character beyond ASCII, of which no module's name has any
_EVERY = frozenset(range(_OTHER + 1))
_DIGITS = frozenset(map(ord, string.digits))
_WORD = _DIGITS | frozenset(map(ord, string.ascii_letters + "_"))
_NAME = _WORD | {ord("-")}
_ANY = "\0"  # in a name, where any character may be
_REPEATED = re.compile(r"(?:[*+?]|\{([0-9]{1,3})(?:(,)([0-9]{0,3}))?\})\??")


class PatternError(ValueError):
    """Raised with what cannot be read of a key, for the caller to add the field.

    Args:
        reason: why.
        key: of which, None if it is of all together.
    """

    def __init__(self, reason: str, key: str | None = None) -> None:
        super().__init__(reason)
        self.key = key


@dataclass(frozen=True, eq=False)
class _Item:
    """One character of a key: out of which, whether it may be left out, and whether it may come again."""

    characters: frozenset[int]
    may_lack: bool = False
    may_recur: bool = False


_Sequence = list[_Item]

_BEGINNING, _END = _Item(frozenset({-1})), _Item(frozenset({-2}))  # `^` and `$`: no characters
_DOT = _Item(_EVERY - {ord("\n")})
_LITERALS = {chr(code): _Item(frozenset({code})) for code in range(_OTHER)}
_CLASSES = {"d": _Item(_DIGITS), "w": _Item(_WORD)}
_ANYTHING = _Item(_DOT.characters, may_lack=True, may_recur=True)  # `.*`
_BELOW = [_ANYTHING, _LITERALS["."]]


class ModulePatterns(Generic[Value]):
    """Values by patterns of modules, as a config has them.

    Args:
        values: by key; of several keys that match a module the first counts.
    Raises:
        PatternError: if a key is no pattern that is read, or there are too many.
    """

    def __init__(self, values: Mapping[str, Value]) -> None:
        if len(values) > _MAX_KEYS:
            raise PatternError(f"has {len(values)} keys; at most {_MAX_KEYS} are read")
        self.values = dict(values)
        self._by_place = list(values.values())
        self._whole, self._ends = _Names(), _Names()  # for the whole name of a module, and for an end of it
        others: list[tuple[int, _Sequence]] = []
        written_out = 0
        for place, key in enumerate(values):
            for sequence in _Parser(key).sequences():
                written_out += len(sequence) + 1
                if written_out > _MAX_WRITTEN_OUT:
                    raise PatternError(f"has alternatives of together more than {_MAX_WRITTEN_OUT} characters")
                if not self._take_name(place, sequence):
                    others.append((place, sequence))
        self._automaton = _Automaton(others)
        self._looked_up: dict[str, int | None] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModulePatterns) and list(self.values.items()) == list(other.values.items())

    __hash__ = None  # type: ignore[assignment]

    def get(self, module: str, default: Value) -> Value:
        """The value of the first key that matches the module's name, as PEFT looks it up; the default if none does."""
        if not self.values:
            return default
        if module not in self._looked_up:
            self._looked_up[module] = self._first(module)
        place = self._looked_up[module]
        return default if place is None else self._by_place[place]

    def _first(self, module: str) -> int | None:
        """The place of the first key that matches."""
        found = [self._whole.first(module), self._automaton.first(module)]
        dot = module.rfind(".")
        while dot >= 0 and len(module) - dot - 1 <= self._ends.longest:
            found.append(self._ends.first(module[dot + 1 :]))
            dot = module.rfind(".", 0, dot)
        return min((place for place in found if place is not None), default=None)

    def _take_name(self, place: int, sequence: _Sequence) -> bool:
        """Whether the sequence is a name, and now one of those that are looked up."""
        anchored = sequence[:1] == [_BEGINNING]
        rest = sequence[anchored : len(sequence) - (sequence[-1:] == [_END])]
        below = rest[:2] == _BELOW
        name = _as_name(rest[2 * below :])
        if name is None:
            return False
        taken = below or self._whole.add(name, place)
        return taken and (anchored and not below or self._ends.add(name, place))


def _as_name(sequence: _Sequence) -> str | None:
    """The characters of a sequence that has one for each item, or any."""
    if any(item.may_lack or item.may_recur or not (item is _DOT or len(item.characters) == 1) for item in sequence):
        return None
    return "".join(_ANY if item is _DOT else chr(*item.characters) for item in sequence)


class _Names:
    """Names, some of whose characters may be any, by their length and by where those are."""

    def __init__(self) -> None:
        self.longest = -1
        self._found: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}

    def add(self, name: str, value: int) -> bool:
        """Adds one, and keeps what it has; False if names of the length have any character in too many places."""
        places = tuple(place for place, character in enumerate(name) if character == _ANY)
        by_places = self._found.setdefault(len(name), {})
        if places not in by_places and len(by_places) >= _MAX_PLACES:
            return False
        by_places.setdefault(places, {}).setdefault(name, value)
        self.longest = max(self.longest, len(name))
        return True

    def first(self, name: str) -> int | None:
        """The least value of the names that this one matches."""
        found = None
        for places, values in self._found.get(len(name), {}).items():
            characters = list(name)
            for place in places:
                characters[place] = _ANY
            value = values.get("".join(characters))
            if value is not None and (found is None or value < found):
                found = value
        return found


class _Automaton:
    """Sequences, all of them at once: a bit for each item, set when that item may come next, and one for the end."""

    def __init__(self, sequences: Iterable[tuple[int, _Sequence]]) -> None:
        self._items: list[_Item] = []
        self._ends: dict[int, int] = {}  # the values by their sequences' last bits
        starts: tuple[list[int], list[int]] = ([], [])  # anywhere, and at the beginning of a name alone
        for value, sequence in sequences:
            anchored = sequence[:1] == [_BEGINNING]
            starts[anchored].append(len(self._items))
            self._items += [item for item in sequence if item not in (_BEGINNING, _END)]
            self._ends[len(self._items)] = value
            self._items.append(_Item(frozenset()))
            if len(self._items) > _MAX_ITEMS:
                raise PatternError(f"has regular expressions of together more than {_MAX_ITEMS} characters")
        size = len(self._items)
        self._anywhere, self._beginning = (_bits(size, places) for places in starts)
        self._accepted = _bits(size, self._ends)
        self._may_lack = _bits(size, (i for i, item in enumerate(self._items) if item.may_lack))
        self._may_recur = _bits(size, (i for i, item in enumerate(self._items) if item.may_recur))
        self._taking: dict[int, int] = {}

    def first(self, name: str) -> int | None:
        """The value of the first sequence that matches the name."""
        if not self._items:
            return None
        state = self._beginning
        starts = True
        for character in name:
            state = self._with_next(state | self._anywhere if starts else state) & self._taken_by(character)
            state = (state & ~self._may_recur) << 1 | (state & self._may_recur)
            starts = character == "."
        accepted = self._with_next(state | self._anywhere if starts else state) & self._accepted
        return self._ends[(accepted & -accepted).bit_length() - 1] if accepted else None

    def _with_next(self, state: int) -> int:
        """The state, and what comes after items that may lack: in each run of those, from the first bit that is set to
        the one after the run, by the carry of a sum."""
        may_lack = self._may_lack
        return state | (((state & may_lack) + may_lack) ^ may_lack)

    def _taken_by(self, character: str) -> int:
        code = min(ord(character), _OTHER)
        if code not in self._taking:
            self._taking[code] = _bits(
                len(self._items), (i for i, item in enumerate(self._items) if code in item.characters)
            )
        return self._taking[code]


def _bits(size: int, places: Iterable[int]) -> int:
    """The whole number of `size` bits of which those are set."""
    digits = bytearray(b"0") * (size + 1)
    for place in places:
        digits[size - place] = ord("1")
    return int(digits, 2)


class _Parser:
    """Reads a key; what is wrong with it raises PatternError."""

    def __init__(self, key: str) -> None:
        self._key, self._at, self._written_out = key, 0, 0
        if len(key) > _MAX_KEY:
            raise PatternError(f"which is longer than {_MAX_KEY} characters", key[:40] + "...")

    def sequences(self) -> list[_Sequence]:
        """The key's alternatives, written out."""
        found = self._alternatives(_MAX_DEPTH)
        if self._at < len(self._key):
            self._fail()
        for sequence in found:
            if _BEGINNING in sequence[1:] or _END in sequence[:-1]:
                self._fail()
        return found

    def _fail(self) -> NoReturn:
        raise PatternError("a regular expression that is not read", self._key)

    def _next(self) -> str:
        """The next character, and past it."""
        if self._at == len(self._key):
            self._fail()
        self._at += 1
        return self._key[self._at - 1]

    def _take(self, text: str) -> bool:
        """Whether that comes next, and past it if so."""
        taken = self._key.startswith(text, self._at)
        self._at += len(text) * taken
        return taken

    def _alternatives(self, depth: int) -> list[_Sequence]:
        found = self._sequence(depth)
        while self._take("|"):
            found += self._sequence(depth)
        return found

    def _sequence(self, depth: int) -> list[_Sequence]:
        built: list[_Sequence] = [[]]
        while self._at < len(self._key) and self._key[self._at] not in "|)":
            following = self._group(depth) if self._take("(") else [self._character()]
            self._written_out += sum(map(len, following)) * len(built)
            if len(following) > 1:
                self._written_out += sum(map(len, built)) * len(following)
            if self._written_out > _MAX_WRITTEN_OUT or len(built) * len(following) > _MAX_ALTERNATIVES:
                raise PatternError("a regular expression with too many alternatives", self._key)
            if len(following) > 1:
                built = [sequence + more for sequence in built for more in following]
            else:
                for sequence in built:
                    sequence += following[0]
        return built

    def _group(self, depth: int) -> list[_Sequence]:
        if depth == 0 or (self._take("?") and not self._take(":")):
            self._fail()
        found = self._alternatives(depth - 1)
        if not self._take(")"):
            self._fail()
        repeated = _REPEATED.match(self._key, self._at)
        if repeated is None:
            return found
        if repeated[0] not in ("?", "??"):
            self._fail()
        self._at = repeated.end()
        return [*found, []]

    def _character(self) -> _Sequence:
        """One item, or as many as its repetition has."""
        item = self._item()
        repeated = _REPEATED.match(self._key, self._at)
        if repeated is None:
            if item not in (_BEGINNING, _END) and self._key[self._at : self._at + 1] in ("*", "+", "?", "{"):
                self._fail()
            return [item]
        self._at = repeated.end()
        if item in (_BEGINNING, _END) or self._key[self._at : self._at + 1] in ("*", "+", "?", "{"):
            self._fail()
        least, most = _times(repeated)
        if most is None:
            again = _ANYTHING if item is _DOT else _Item(item.characters, may_lack=True, may_recur=True)
            return [item] * least + [again]
        if most < least:
            self._fail()
        return [item] * least + [_Item(item.characters, may_lack=True)] * (most - least)

    def _item(self) -> _Item:
        character = self._next()
        if character == "[":
            return _Item(self._class())
        if character == "\\":
            return self._escaped()
        if character in "^$.":
            return {"^": _BEGINNING, "$": _END, ".": _DOT}[character]
        if ord(character) in _NAME:
            return _LITERALS[character]
        self._fail()

    def _escaped(self) -> _Item:
        character = self._next()
        if character in _CLASSES:
            return _CLASSES[character]
        if character not in string.punctuation:
            self._fail()
        return _LITERALS[character]

    def _class(self) -> frozenset[int]:
        negated = self._take("^")
        found: set[int] = set()
        while not self._take("]"):
            low = self._member()
            if not self._key.startswith("-]", self._at) and self._take("-"):
                high = self._member()
                if len(low) > 1 or len(high) > 1 or min(low) > min(high):
                    self._fail()
                low = frozenset(range(min(low), min(high) + 1))
            found |= low
        if not found:
            self._fail()
        return _EVERY - found if negated else frozenset(found)

    def _member(self) -> frozenset[int]:
        character = self._next()
        if character == "\\":
            return self._escaped().characters
        if ord(character) in _NAME or character == ".":
            return _LITERALS[character].characters
        self._fail()


def _times(repeated: re.Match[str]) -> tuple[int, int | None]:
    """The least number of times, and the most, None for any."""
    sign = repeated[0][0]
    if sign != "{":
        return (1 if sign == "+" else 0), (1 if sign == "?" else None)
    least = int(repeated[1])
    return least, least if repeated[2] is None else int(repeated[3]) if repeated[3] else None
