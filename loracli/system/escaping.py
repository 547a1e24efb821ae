"""The door that text of strangers goes through on its way out: one function for each place that it is written to.

    visible          a terminal, a log, and what the others begin with
    html_text        HTML and SVG
    markdown_code    Markdown, as code: no character of it is markup
    markdown_link    Markdown, as a link on the Hub
    yaml_text        the metadata of a model card
    shell_word       a command that a card gives to be typed

What is not printable is shown by its code, and so is what is printable and not seen, so that two names that look alike
are alike.
"""

from __future__ import annotations

import re
import shlex
from html import escape
from urllib.parse import quote

# Default_Ignorable_Code_Point of Unicode 16 (DerivedCoreProperties.txt): variation selectors, fillers, tags, soft
# hyphens, joiners. Then those that are drawn as nothing and are not among them: the blank Braille pattern, the null
# notehead, fillers, and the marks that only join or stack the letters around them.
_UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    "\u2800\U0001d159\U00016fe4\u2d7f\u1039\u17d2\u1a60\U00010a3f\U0001107f]"
)


def visible(text: str) -> str:
    """The text on one line, with the code of every character that is a control, turns the direction of writing, or is
    not seen."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() and not _UNSEEN.match(c) else _code(c) for c in text)


def html_text(text: str) -> str:
    """The text for an element or an attribute."""
    return escape(visible(text))


def markdown_code(text: str) -> str:
    """The text as inline code, also in a cell of a table; a backtick and a bar are shown by their codes."""
    return f"`{visible(text).replace('`', _code('`')).replace('|', _code('|'))}`" if text else "-"


def markdown_link(text: str, *path: str) -> str:
    """The text as inline code that leads to a page of the Hub, whose path has these parts."""
    address = "/".join(quote(part, safe="/@") for part in path)
    return f"[{markdown_code(text)}](https://huggingface.co/{address})"


def yaml_text(text: str) -> str:
    """A double-quoted scalar of YAML that is read as this text."""
    return '"' + visible(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def shell_word(text: str) -> str:
    """One word of a command line, on one line."""
    return shlex.quote(visible(text))


def _code(character: str) -> str:
    """`\\n`, `\\x60`, `\\u200b`, `\\U000e0001`, as Python writes it."""
    escaped = character.encode("unicode_escape").decode("ascii")
    return escaped if escaped != character else f"\\x{ord(character):02x}"
