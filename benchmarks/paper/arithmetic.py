"""Judges programs of arithmetic without running them: an evaluator of a small part of Python, by its syntax tree.

    def solution():
        apples = 48213
        result = apples * 3 + 2
        return result

Numbers, names that were assigned before, + - * / // % **, a few functions of numbers, and nothing else: no attribute,
no loop, no other call. Text, tree, exponents and values have ceilings, so whatever a model wrote ends at once. What is
not such a program has no value, and is wrong.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHARACTERS, NODES, LARGEST, LARGEST_POWER, DIGITS = 4000, 600, 1e30, 64, 30
_TOLERANCE = 1e-6
_FENCE = re.compile(r"```(?:python|py)?\s*\n(.*?)(?:```|$)", re.DOTALL)
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_CALLS: dict[str, Callable[..., Any]] = {"abs": abs, "int": int, "float": float, "max": max, "min": min, "round": round}
Number = int | float


class NoValue(Exception):
    """It is not a program of arithmetic, or has no finite value below the ceiling."""


def value_of(text: str) -> float:
    """What `solution()` of a program returns; of one without it the value of its last line.

    Raises:
        NoValue: if there is none.
    """
    fenced = _FENCE.search(text)
    code = fenced[1] if fenced else text
    if len(code) > CHARACTERS:
        raise NoValue("too long")
    try:
        tree = ast.parse(code.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NoValue("not Python") from None
    if sum(1 for _ in ast.walk(tree)) > NODES:
        raise NoValue("too large")
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "solution"]
    body = functions[0].body if functions else tree.body
    try:
        return float(_run(body))
    except (ArithmeticError, TypeError, ValueError, RecursionError):
        raise NoValue("not arithmetic") from None


def _run(body: list[ast.stmt]) -> Number:
    """The value that statements return, or the last one's."""
    names: dict[str, Number] = {}
    last: Number | None = None
    for statement in body:
        match statement:
            case ast.Expr(ast.Constant(str())):  # a docstring
                continue
            case ast.Return(ast.expr() as value):
                return _value(value, names)
            case ast.Assign([ast.Name(name)], value):
                last = names[name] = _value(value, names)
            case ast.AugAssign(ast.Name(name), operation, value):
                last = names[name] = _value(ast.BinOp(ast.Name(name), operation, value), names)
            case ast.Expr(value):
                last = _value(value, names)
            case _:
                raise NoValue(f"a {type(statement).__name__}")
    if last is None:
        raise NoValue("nothing")
    return last


def _value(node: ast.expr, names: dict[str, Number]) -> Number:
    match node:
        case ast.Constant(value) if type(value) in (int, float):
            found = value
        case ast.Name(name) if name in names:
            found = names[name]
        case ast.UnaryOp(operation, operand) if type(operation) in _UNARY:
            found = _UNARY[type(operation)](_value(operand, names))
        case ast.BinOp(left, ast.Pow(), right):
            base, power = _value(left, names), _value(right, names)
            if abs(power) > LARGEST_POWER or (base != 0 and abs(power * math.log10(abs(base))) > DIGITS):
                raise NoValue("a large power")
            found = base**power
        case ast.BinOp(left, operation, right) if type(operation) in _BINARY:
            found = _BINARY[type(operation)](_value(left, names), _value(right, names))
        case ast.Call(ast.Name(name), arguments, []) if name in _CALLS:
            values = [_value(argument, names) for argument in arguments]
            if name == "round" and any(abs(digits) > DIGITS for digits in values[1:]):
                raise NoValue("many digits")  # Python would form 10 ** digits
            found = _CALLS[name](*values)
        case _:
            raise NoValue(f"a {type(node).__name__}")
    if isinstance(found, complex) or not math.isfinite(found) or abs(found) > LARGEST:
        raise NoValue("no finite number below the ceiling")
    return found


def is_right(output: str, reference: str) -> bool:
    """Whether both programs have a value, and the same."""
    try:
        return math.isclose(value_of(output), value_of(reference), rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    except NoValue:
        return False


def judge() -> None:
    """A metric command: answers as JSON on standard input, a line each, and 0 or 1 for each on standard output."""
    for line in sys.stdin:
        answer = json.loads(line)
        print(int(is_right(answer["output"], answer["reference"])))


def judge_command() -> str:
    """What runs `judge` from any folder."""
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {root!r}); from benchmarks.paper.arithmetic import judge; judge()"
    return shlex.join([sys.executable, "-c", code])
