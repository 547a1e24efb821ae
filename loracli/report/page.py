"""The page as text: HTML with every string escaped, and the frame that promises to load nothing.

No chart needs a pointer: what its tooltips say stands in a table below it, which is open from the start.
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


def table(label: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, strong: int | None = None) -> str:
    """A table of plain strings that scrolls by itself where the screen is narrow; the first column is text, and
    `label` is what it is read out as."""
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
    inner = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=label)


def section(title: str, *content: str) -> str:
    """A part of the page with a heading."""
    return tag("section", tag("h2", text(title)), *content)


def paragraph(content: str, *, soft: bool = False) -> str:
    """A paragraph of plain text; `soft` of what explains something beside it."""
    return tag("p", text(content), class_="soft" if soft else None)


def opened(title: str, *content: str) -> str:
    """What is shown until its title is touched."""
    return tag("details", tag("summary", text(title)), *content, open="")


def folded(title: str, *content: str) -> str:
    """What is shown once its title is touched, and on paper."""
    return tag("details", tag("summary", text(title)), *content)


def command(line: str) -> str:
    """A line for a shell, which one touch selects as a whole."""
    return tag("pre", tag("code", text(line)))


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


def legend(*entries: tuple[str, str]) -> str:
    """A line that says what the marks of a chart mean: each as it is drawn, around (14, 7), and its meaning."""
    shown = [
        tag(
            "span",
            tag("svg", mark, xmlns="http://www.w3.org/2000/svg", viewBox="0 0 28 14", aria_hidden="true"),
            text(meaning),
        )
        for mark, meaning in entries
    ]
    return tag("p", " ".join(shown), class_="legend")


POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_PAGE_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --card: #f6f8fa;
  --above: #b35900; --below: #0b5cad; --good: #1a7f37; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --soft: #9aa4af; --line: #30363d;
  --card: #161b22; --above: #ff9d3d; --below: #58a6ff; --good: #3fb950; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.25rem; line-height: 1.4; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
"""
PARTS_STYLE = """\
h3 { font-size: 1rem; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; overflow-wrap: anywhere; }
.verdict { padding: .75rem 1rem; background: var(--card); border-left: 4px solid var(--soft); }
.verdict.better { border-color: var(--good); }
.verdict.worse { border-color: var(--bad); }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow: auto; max-height: 36rem; margin: .5rem 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.panel { min-width: 0; max-width: 34rem; }
.chart { max-width: 40rem; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--ink); }
.legend { color: var(--soft); font-size: .85rem; }
.legend span { display: inline-flex; align-items: baseline; margin-right: 1rem; }
.legend svg { flex: none; width: 28px; height: 14px; margin-right: .35rem; transform: translateY(2px); }
svg .soft { fill: var(--soft); font-size: 10px; }
svg .inside { font-size: 9px; text-anchor: middle; pointer-events: none; }
svg .above { fill: var(--above); } svg .below { fill: var(--below); }
svg .empty { fill: none; stroke: var(--soft); stroke-opacity: .6; stroke-dasharray: 2 2; }
svg .frame { fill: none; stroke: var(--line); }
svg .axis { stroke: var(--soft); stroke-width: 1; } svg .grid { stroke: var(--line); stroke-width: 1; }
svg .range { stroke: var(--ink); stroke-width: 2; } svg .curve { fill: none; stroke-width: 1.5; }
svg .probe { stroke: var(--soft); stroke-dasharray: 3 2; }
svg .descent { stroke: var(--below); } svg .refit { stroke: var(--above); }
svg .better { fill: var(--good); } svg .worse { fill: var(--bad); }
svg .better.range { stroke: var(--good); } svg .worse.range { stroke: var(--bad); }
svg .reference { fill: var(--page, none); stroke: var(--ink); stroke-width: 1.5; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 400; } tr.strong * { font-weight: 700; }
ul { margin: .5rem 0; padding-left: 1.2rem; }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--below); }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
pre { margin: .5rem 0; padding: .5rem .75rem; background: var(--card); white-space: pre-wrap; user-select: all; }
"""
_MEDIA_STYLE = """\
@media (max-width: 480px) {
  main { padding: .75rem; }
  th, td { padding: .2rem .35rem; }
  th:first-child { position: sticky; left: 0; background: var(--page); white-space: normal; overflow-wrap: anywhere;
    min-width: 6.5rem; max-width: 9rem; }
}
@media print {
  .scroll { max-height: none; overflow: visible; }
  details::details-content { content-visibility: visible; block-size: auto; }
  svg, tr, pre { break-inside: avoid; } h2, summary { break-after: avoid; }
}
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
        tag("style", _PAGE_STYLE + PARTS_STYLE + _MEDIA_STYLE),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *content)), lang='en')}\n"
