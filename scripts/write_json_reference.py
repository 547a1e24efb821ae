"""Writes docs/json.md from the schema of the documents that `--json` prints, so that the page cannot say anything else.

python scripts/write_json_reference.py            writes docs/json.md
python scripts/write_json_reference.py --check    exits 1 if docs/json.md is not what would be written
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "json.md"
SCHEMA = ROOT / "loracli" / "cli" / "documents.schema.json"
COMMAND = "python scripts/write_json_reference.py"
INTRODUCTION = f"""\
# What --json prints

<!-- Written by `{COMMAND}`: change the schema's descriptions, not this page. -->

Every command takes `--json`. It then prints one JSON document on stdout and nothing else, on success and on failure;
notes and warnings stay on stderr. Only after a traceback, which is a bug, there is none.

```bash
loracat show --json | jq -r '.recipe.held_out.verdict'
loracat fit -a ./math ./code -d val.jsonl --json > fit.json || jq -r .error.hint fit.json
```

`"loracat": 1` is the version of these documents. Within a version keys are only added: a reader should ignore those it
does not know. The version of `recipe`, as `loracat show` prints it, is its own. The same as a
[JSON Schema](../loracli/cli/documents.schema.json) comes with the package:

```python
from importlib.resources import files

schema = files("loracli.cli").joinpath("documents.schema.json").read_text()
```
"""


def reference() -> str:
    """The whole page."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    sections = [INTRODUCTION]
    for branch in schema["anyOf"]:
        definition = _resolved(schema, branch)
        name = branch["$ref"].rpartition("/")[2]
        rows = "".join(f"| {key} | {kind} | {text} |\n" for key, kind, text in _rows(schema, definition, ""))
        sections.append(f"## {name}\n\n{definition['description']}\n\n| key | type | meaning |\n|---|---|---|\n{rows}")
    return "\n".join(sections)


def _resolved(schema: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in value:
        return value
    found: dict[str, Any] = schema["$defs"][value["$ref"].rpartition("/")[2]]
    return found


def _rows(schema: dict[str, Any], value: dict[str, Any], path: str) -> Iterator[tuple[str, str, str]]:
    """Key, type and meaning of everything below an object."""
    required = value.get("required", ())
    for key, child in value.get("properties", {}).items():
        child = _resolved(schema, child)
        text = child.get("description", "")
        if path + key == "loracat":
            continue
        shown, inner, suffix = _type(child), child, ""
        if "anyOf" in child:
            inner = _resolved(schema, child["anyOf"][0])
            shown = f"{_type(inner)} or null"
        elif child.get("type") == "array":
            inner = _resolved(schema, child["items"])
            shown, suffix = f"list of {_type(inner)}", "[]"
        elif isinstance(child.get("additionalProperties"), dict):
            inner, suffix = _resolved(schema, child["additionalProperties"]), ".NAME"
        if key not in required:
            text += "; not always there"
        yield f"`{path}{key}`", shown, text.replace("|", "\\|")
        yield from _rows(schema, inner, f"{path}{key}{suffix}.")


def _type(value: dict[str, Any]) -> str:
    if "enum" in value:
        return ", ".join(f"`{word}`" for word in value["enum"])
    kinds = value.get("type", "any")
    return " or ".join(kinds) if isinstance(kinds, list) else str(kinds)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/json.md from the schema of the documents.")
    parser.add_argument("--check", action="store_true", help="only say whether docs/json.md is up to date")
    if not parser.parse_args().check:
        PAGE.write_text(reference(), encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == reference():
        return 0
    print(f"docs/json.md is not what the schema says; write it again with: {COMMAND}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
