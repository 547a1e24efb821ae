"""docs/python-api.md is true: its signatures are the functions', its example prints what it says."""

from __future__ import annotations

import ast
import inspect
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import loracli

PAGE = (Path(__file__).parents[1] / "docs" / "python-api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SHOWN = re.findall(
    r"^<!-- python -->\n```python\n(.*?)^```\n\n<!-- output of the python above -->\n```text\n(.*?)^```",
    PAGE,
    re.MULTILINE | re.DOTALL,
)
NUMBER = re.compile(r"[-+]?\d+\.\d+")


def written_signatures() -> dict[str, dict[str, str | None]]:
    """The parameters that the page gives to each function and request, with their defaults."""
    found = {}
    for block in (part for whole in BLOCKS for part in whole.split("\n\n")):
        word = block.strip().removeprefix("def ")
        if not re.match(r"(def \w+|\w+Request)\(", block):
            continue
        [function] = ast.parse(f"def {word}: ...").body
        assert isinstance(function, ast.FunctionDef)
        every = function.args
        given = [*every.args, *every.kwonlyargs]
        missing = [None] * (len(every.args) - len(every.defaults))
        defaults = [*missing, *every.defaults, *every.kw_defaults]
        found[function.name] = {
            a.arg: None if d is None else ast.unparse(d) for a, d in zip(given, defaults, strict=True)
        }
    return found


def real_signature(name: str) -> dict[str, Any]:
    """The same of what is called so; a keyword of a `TypedDict` may always be left out."""
    found: dict[str, Any] = {}
    for parameter in inspect.signature(getattr(loracli, name)).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            function = inspect.unwrap(getattr(loracli, name))
            [typed] = get_type_hints(function)[parameter.name].__args__
            found |= dict.fromkeys(get_type_hints(typed), ...)
        else:
            found[parameter.name] = None if parameter.default is parameter.empty else parameter.default
    return found


@pytest.mark.parametrize("name", written_signatures())
def test_a_signature_is_that_of_the_function(name: str) -> None:
    written, real = written_signatures()[name], real_signature(name)
    assert written.keys() == real.keys()
    for parameter, default in written.items():
        if isinstance(real[parameter], (str, bool, int, float, tuple)):
            assert ast.literal_eval(str(default)) == real[parameter], parameter
        elif real[parameter] is None:
            assert default in (None, "None"), parameter


def test_every_function_has_a_signature_and_every_name_is_named() -> None:
    functions = {name for name in loracli.__all__ if inspect.isfunction(getattr(loracli, name))}
    requests = {name for name in loracli.__all__ if name.endswith("Request")}
    assert functions | requests <= written_signatures().keys()
    assert [name for name in loracli.__all__ if f"`{name}`" not in PAGE] == []


def test_the_examples_print_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    assert len(SHOWN) == 2
    for code, said in SHOWN:
        printed = StringIO()
        with redirect_stdout(printed):
            exec(code, names)
        assert NUMBER.sub("#", printed.getvalue()) == NUMBER.sub("#", said)
        for real, shown in zip(NUMBER.findall(printed.getvalue()), NUMBER.findall(said), strict=True):
            assert abs(float(real) - float(shown)) < 1e-2  # a fit goes over the machine's last bits
    errors = [block for block in BLOCKS if "except loracli.LoracatError" in block]
    with redirect_stdout(printed := StringIO()):
        exec("\n".join(errors), names)
    assert printed.getvalue() == "val.jsonl cannot be read: No such file or directory None 3\n"
