"""Measures the house: how large its files and functions are, how its imports run, how far a fit and an export walk.

python scripts/house.py                        the checkout that this script stands in
python scripts/house.py --root DIR             another checkout, say one of an earlier commit
python scripts/house.py --walk FILE:FUNCTION   one walk, file by file

Everything is read from the source; nothing is imported. A walk follows the arguments of a function: whatever is made of
them, and every call that it is handed to, in the order of the code and each function once, and back. It follows names,
so it stops where the callee is chosen while the program runs. A climb is a move to a file of a higher floor; a file's
floor is one above the highest that it imports.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "loracli"
SMALL = 60  # lines
WALKS = {"fit": "fit_mixing", "export": "export_adapter"}  # by the public name where each starts

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Module:
    """One file: its tree, the modules that it imports, and where each imported name comes from."""

    name: str
    lines: int
    tree: ast.Module
    imports: set[str] = field(default_factory=set)
    names: dict[str, tuple[str, str]] = field(default_factory=dict)

    def definitions(self) -> dict[str, ast.stmt]:
        return {node.name: node for node in self.tree.body if isinstance(node, (*Function.__args__, ast.ClassDef))}

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Those of the module and of its classes, the latter as `Class.method`."""
        for name, node in self.definitions().items():
            if isinstance(node, ast.ClassDef):
                yield from ((f"{name}.{f.name}", f) for f in node.body if isinstance(f, Function.__args__))
            else:
                yield name, node


def read_package(root: Path) -> dict[str, Module]:
    modules = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = Module(name, len(text.splitlines()), ast.parse(text))
    for module in modules.values():
        for node in _imports(module.tree):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                home, name = (whole, "") if whole in modules else (node.module or "", alias.name)
                if home in modules and home != module.name:
                    module.imports.add(home)
                    module.names[alias.asname or alias.name] = (home, name)
    return modules


def _imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Those that happen: not the ones for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from _imports(node)


def circles(modules: dict[str, Module]) -> list[list[str]]:
    """Files that import each other in a loop, imports inside functions included (Tarjan's components)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for other in sorted(modules[name].imports):
            if other not in number:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == number[name]:
            place = stack.index(name)
            found.append(stack[place:])
            del stack[place:]

    for name in modules:
        if name not in number:
            visit(name)
    return [component for component in found if len(component) > 1]


def floors(modules: dict[str, Module]) -> dict[str, int]:
    """The floor of every file; files of a circle stand on one."""
    together = {name: frozenset(circle) for circle in circles(modules) for name in circle}
    known: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in known:
            group = together.get(name, frozenset({name}))
            below = {other for one in group for other in modules[one].imports} - group
            height = 1 + max((floor(other) for other in below), default=0)
            known.update(dict.fromkeys(group, height))
        return known[name]

    return {name: floor(name) for name in modules}


class Walk:
    """The files that the arguments of a function come by, in order; `stays` lists them with the functions there."""

    def __init__(self, modules: dict[str, Module], start: str, function: str) -> None:
        self._modules = modules
        self._functions = {name: dict(module.functions()) for name, module in modules.items()}
        self._methods: dict[str, list[tuple[str, str]]] = defaultdict(list)  # by the method's own name
        for name, functions in self._functions.items():
            for path in functions:
                if "." in path:
                    self._methods[path.partition(".")[2]].append((name, path))
        self._done: set[tuple[str, str]] = set()
        self.stays: list[tuple[str, str]] = []
        self._enter(start, function, None)

    def moves(self) -> list[tuple[str, str]]:
        files = [name for name, _ in self.stays]
        return [(a, b) for a, b in zip(files, files[1:], strict=False) if a != b]

    def _enter(self, module: str, function: str, handed: set[str] | None) -> None:
        """`handed` are the parameters that are followed, None for all of them."""
        if (module, function) in self._done:
            return
        self._done.add((module, function))
        node = self._functions[module][function]
        parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        followed = set(parameters) if handed is None else handed
        self.stays.append((module, function))
        for call in _in_order(node, followed):
            target = self._target(module, function, call, followed)
            if target is None:
                continue
            self._enter(*target, self._handed(target, call, followed))
            if self.stays[-1][0] != module:
                self.stays.append((module, function))

    def _target(self, module: str, function: str, call: ast.Call, followed: set[str]) -> tuple[str, str] | None:
        called = call.func
        if isinstance(called, ast.Name):
            home, name = self._modules[module].names.get(called.id, (module, called.id))
            for path in (name, f"{name}.__init__"):
                if path in self._functions.get(home, {}):
                    return home, path
        elif isinstance(called, ast.Attribute):
            own = f"{function.partition('.')[0]}.{called.attr}"
            if isinstance(called.value, ast.Name) and called.value.id == "self" and own in self._functions[module]:
                return module, own
            places = self._methods[called.attr]
            if len(places) == 1 and _mentions(called.value, followed):
                return places[0]
        return None

    def _handed(self, target: tuple[str, str], call: ast.Call, followed: set[str]) -> set[str]:
        node = self._functions[target[0]][target[1]]
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        bound = names[1:] if "." in target[1] else names
        given = [*zip(bound, call.args, strict=False), *((k.arg, k.value) for k in call.keywords if k.arg)]
        handed = {name for name, value in given if _mentions(value, followed)}
        return handed | ({"self"} if "." in target[1] else set())


def _in_order(function: Function, followed: set[str]) -> Iterator[ast.Call]:
    """The calls that something followed is handed to, in the order of the code; what is made of it is followed too."""
    for statement in ast.walk(function):
        targets: Sequence[ast.expr] = ()
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, (ast.AnnAssign, ast.NamedExpr)):
            targets = [statement.target]
        value = getattr(statement, "value", None)
        if targets and isinstance(value, ast.expr) and _mentions(value, followed):
            followed |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda c: (c.end_lineno or 0, c.end_col_offset or 0)):
        if any(_mentions(part, followed) for part in (*call.args, *(k.value for k in call.keywords), call.func)):
            yield call


def _mentions(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def _spread(numbers: Sequence[int]) -> str:
    ordered = sorted(numbers)
    return f"{statistics.median(ordered):.0f} / {ordered[int(0.9 * (len(ordered) - 1))]} / {ordered[-1]}"


def _parameters(function: Function) -> int:
    a = function.args
    return len([p for p in (*a.posonlyargs, *a.args, *a.kwonlyargs) if p.arg not in ("self", "cls")])


def customers(modules: dict[str, Module]) -> dict[tuple[str, str], int]:
    """How many other files import each public name."""
    counts = {(module.name, name): 0 for module in modules.values() for name in module.definitions() if name[0] != "_"}
    for module in modules.values():
        for place in set(module.names.values()):
            if place in counts and module.name != PACKAGE:
                counts[place] += 1
    return counts


def measure(root: Path) -> list[tuple[str, str]]:
    modules = read_package(root)
    functions = [f for module in modules.values() for _, f in module.functions()]
    library = [f for m in modules.values() if not m.name.startswith(f"{PACKAGE}.cli") for _, f in m.functions()]
    used = customers(modules)
    classes = [n for m in modules.values() for n in m.definitions().values() if isinstance(n, ast.ClassDef)]
    carriers = [c for c in classes if any("dataclass" in ast.unparse(d) for d in c.decorator_list)]
    sizes = [module.lines for module in modules.values()]
    storeys = floors(modules)
    rows = [
        ("files / lines", f"{len(modules)} / {sum(sizes):,}"),
        ("file: median / p90 / most lines", _spread(sizes)),
        (f"files under {SMALL} lines", f"{sum(size < SMALL for size in sizes) / len(sizes):.0%}"),
        ("function: median / p90 / most lines", _spread([(f.end_lineno or 0) - f.lineno + 1 for f in functions])),
        ("parameters: median / p90 / most", _spread([_parameters(f) for f in functions])),
        ("parameters of a library function, most", str(max(_parameters(f) for f in library))),
        ("public names", str(len(used))),
        ("... with one other file as customer / with none", f"{_count(used, 1)} / {_count(used, 0)}"),
        ("dataclasses", str(len(carriers))),
        ("floors", str(max(storeys.values()))),
        ("circles of files", str(len(circles(modules)))),
    ]
    for name, public in WALKS.items():
        walk = find_walk(modules, public)
        up = sum(storeys[b] > storeys[a] for a, b in walk.moves())
        rows.append((f"walk of {name}: files / climbs", f"{len({file for file, _ in walk.stays})} / {up}"))
    return rows


def _count(used: dict[tuple[str, str], int], customers: int) -> int:
    return sum(count == customers for count in used.values())


def find_walk(modules: dict[str, Module], function: str, file: str | None = None) -> Walk:
    """The walk of a function, which one file defines."""
    homes = [n for n, m in modules.items() if function in dict(m.functions()) and file in (None, n)]
    if len(homes) != 1:
        raise SystemExit(f"{function} is defined in {', '.join(homes) or 'no file'}: name one as FILE:FUNCTION")
    return Walk(modules, homes[0], function)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--walk", metavar="FILE:FUNCTION")
    chosen = parser.parse_args()
    if chosen.walk:
        modules = read_package(chosen.root)
        file, _, function = chosen.walk.rpartition(":")
        module = ".".join(Path(file).with_suffix("").parts) if file else None
        storeys = floors(modules)
        for name, place in find_walk(modules, function, module).stays:
            print(f"floor {storeys[name]:2}  {name}  {place}")
        return 0
    for name, value in measure(chosen.root):
        print(f"| {name} | {value} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
