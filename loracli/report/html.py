"""HTML and SVG as text: every string from outside goes through `text` or an attribute, both of which escape it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def text(content: str) -> str:
    """A string as harmless text: markup is escaped, and what cannot be printed is shown by its code."""
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in content))


def tag(name: str, *content: str, **attributes: str | float | None) -> str:
    """An element around safe content. `class_` stands for class, `fill_opacity` for fill-opacity; None is left out."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{words}>{''.join(content)}</{name}>"


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, strong: int | None = None) -> str:
    """A table of plain strings that scrolls by itself where the screen is narrow; the first column is text."""
    head = tag("tr", *(tag("th", text(column), scope="col") for column in columns))
    body = [
        tag(
            "tr",
            tag("th", text(row[0]), scope="row"),
            *(tag("td", text(cell)) for cell in row[1:]),
            class_="strong" if index == strong else None,
        )
        for index, row in enumerate(rows)
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def section(title: str, *content: str) -> str:
    """A part of the page with a heading."""
    return tag("section", tag("h2", text(title)), *content)


def folded(title: str, *content: str) -> str:
    """What is shown once its title is touched."""
    return tag("details", tag("summary", text(title)), *content)


def svg(width: float, height: float, label: str, *content: str) -> str:
    """A drawing of a size in its own units, which fills the width it is given; `label` is what it is read out as."""
    return tag(
        "svg",
        *content,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
    )
