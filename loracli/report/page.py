"""The page as text: HTML and SVG with every string escaped, and its frame.

HTML and SVG as text: every string from outside goes through `html_text` or an attribute, both of which escape it.

The frame of the page: its head, its colours in light and dark, and the promise that it loads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loracli.system.escaping import html_text

text = html_text


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


POLICY = "default-src 'none'; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --card: #f6f8fa;
  --above: #b35900; --below: #0b5cad; --good: #1a7f37; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --soft: #9aa4af; --line: #30363d;
  --card: #161b22; --above: #ff9d3d; --below: #58a6ff; --good: #3fb950; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; overflow-wrap: anywhere; }
.verdict { font-size: 1.1rem; padding: .75rem 1rem; background: var(--card); border-left: 4px solid var(--soft); }
.verdict.better { border-color: var(--good); }
.verdict.worse { border-color: var(--bad); }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.panel { min-width: 0; max-width: 30rem; }
.chart { max-width: 34rem; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--ink); }
svg .soft { fill: var(--soft); font-size: 10px; }
svg .above { fill: var(--above); } svg .below { fill: var(--below); }
svg .empty { fill: none; stroke: var(--line); stroke-dasharray: 2 2; }
svg .frame { fill: none; stroke: var(--line); }
svg .axis { stroke: var(--soft); stroke-width: 1; } svg .grid { stroke: var(--line); stroke-width: 1; }
svg .range { stroke: var(--ink); stroke-width: 2; } svg .curve { fill: none; stroke: var(--below); stroke-width: 1.5; }
svg .curve.other { stroke: var(--above); } svg .better { fill: var(--good); } svg .worse { fill: var(--bad); }
svg .better.range { stroke: var(--good); } svg .worse.range { stroke: var(--bad); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; } thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 400; } tr.strong * { font-weight: 700; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--below); }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
"""


def page(title: str, *content: str) -> str:
    """The whole document around safe content."""
    head = tag(
        "head",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        tag("title", text(title)),
        tag("style", STYLE),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *content)), lang='en')}\n"
