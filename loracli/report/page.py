"""The frame of the page: its head, its colours in light and dark, and the promise that it loads nothing."""

from __future__ import annotations

from loracli.report.html import tag, text

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
