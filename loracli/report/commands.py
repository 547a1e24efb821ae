"""The commands that a report gives to be typed: those that made what it shows, as far as they are recorded, and those
that come next.

They are meant for the folder of the recipe, with the data beside it. Files are recorded by their last names, and a
directory outside of that folder is nobody's business: `path/to/NAME` stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path, PurePath

from loracli.algebra.methods import METHODS
from loracli.algebra.methods.method import MethodOptions
from loracli.comparison.settings import DATAMIX, WEIGHTS, CompareSettings
from loracli.evaluation.comparison import Comparison, ComparisonSettings, FitFile
from loracli.evaluation.metrics import TaskMetric
from loracli.fitting.settings import FitSettings
from loracli.hub.references import URI_PREFIX
from loracli.model.quantisation import UNQUANTISED
from loracli.recipe.recipe import Recipe
from loracli.recipe.record import ON_LOADING, RecipeAdapter
from loracli.system.display import typed_text
from loracli.system.escaping import shell_word

_RECIPE, _COMPARISON = "recipe.json", "comparison.json"  # where they are, unless they are named
_DATA = "DATA.jsonl"  # stands for records that nobody named yet


@dataclass(frozen=True)
class Step:
    """A command, and what it does in a sentence."""

    why: str
    line: str


@dataclass(frozen=True)
class Files:
    """The last names of what a report is made of; `comparison` is None without one."""

    recipe: str = _RECIPE
    comparison: str | None = None


def export_words(recipe: str | Path) -> list[str]:
    """What is typed after a fit that wrote this recipe."""
    return ["loracat", "export", *([] if str(recipe) == _RECIPE else [str(recipe)]), "--merge"]


def made_by(recipe: Recipe, files: Files, found: Comparison | None) -> list[Step]:
    """What was typed, from the adapters to the page: every setting that is recorded and is not the default."""
    steps = []
    if any(adapter.repo_id is not None for adapter in recipe.adapters):
        line = _line("loracat", "fetch", files.recipe, "--with-base")
        steps.append(Step("Downloads the adapters and the base model that the recipe names, at these commits.", line))
    steps.append(Step("Finds the mixing weights and writes the recipe.", _fit(recipe, files.recipe)))
    if found is not None and files.comparison is not None:
        steps.append(_compare(recipe, files, found))
    shown = [] if files.comparison is None else ["--comparison", files.comparison]
    steps.append(Step("Writes this page.", _line("loracat", "report", files.recipe, *shown)))
    return steps


def what_next(recipe: Recipe, files: Files, found: Comparison | None) -> list[Step]:
    """What there is to do with the fit, or with what did better in a comparison."""
    best = None if found is None else found.row(found.best.name)
    others = [] if found is None else [one.row for one in found.recipes if one.sha256 != recipe.sha256()]
    steps = []
    if best is not None and best.kind == "method" and best.name in METHODS and METHODS[best.name].search is None:
        why = (
            f"Writes one adapter by {best.name}, which has the lowest loss of the comparison; give it the same options."
        )
        own = ["--fit-data", _DATA] if METHODS[best.name].needs_records else []
        steps.append(Step(why, _line("loracat", "export", files.recipe, "--method", best.name, *own)))
    elif best is not None and best.name in others:
        why = f"Writes one adapter of {best.name}, which has the lowest loss of the comparison."
        steps.append(Step(why, _line(*export_words(best.name))))
    why = "Writes one adapter of this fit, of its largest ingredient's rank; without --merge it is exact, and larger."
    steps.append(Step(why, _line(*export_words(files.recipe))))
    asked = _line("loracat", "generate", files.recipe, *_named_base(recipe), "--prompt", "Your question")
    steps.append(Step("Answers a question with the base model, with each adapter and with the fit.", asked))
    if found is None:
        words = _line("loracat", "compare", files.recipe, "--data", _DATA, *_named_base(recipe), "--json")
        why = f"Compares the fit with every other way to compose, on records in {_DATA} that nothing was fitted on."
        steps.append(Step(why, f"{words} > {_COMPARISON}"))
    return steps


def _fit(recipe: Recipe, name: str) -> str:
    labels = recipe.labels()
    words = ["loracat", "fit", "--adapters", *(_ingredient(a, labels[a.reference]) for a in recipe.adapters)]
    words += ["--data", *(_file(one.source_name) for one in recipe.data)]
    if not recipe.splits_data:
        words += ["--eval-data", *map(_file, recipe.held_out.name.split(", "))]
    if recipe.base.commit is None:
        words += _named_base(recipe)
    else:
        words += ["--base", f"{URI_PREFIX}{recipe.base.id}", "--base-revision", recipe.base.commit]
    words += ["--dtype", recipe.dtype]
    if recipe.base.quantisation in ON_LOADING:  # of a base that is stored so it changes nothing
        words += ["--quantise", str(recipe.base.quantisation)]
    for field in fields(FitSettings):
        option, value = f"--{field.name.replace('_', '-')}", recipe.fit.settings.get(field.name, field.default)
        if value is None or value == field.default:
            continue
        if field.name == "metric_command":
            value = "COMMAND"  # its sha256 alone is recorded
        words += [option] if value is True else [option, typed_text(value)]
    return _line(*words, *([] if name == _RECIPE else ["-o", name]))


def _compare(recipe: Recipe, files: Files, found: Comparison) -> Step:
    """The comparison, with a word on what its document does not hold."""
    recipes = [files.recipe] if len(found.recipes) < 2 else [one.row for one in found.recipes]
    words = ["loracat", "compare", *recipes, "--data", *map(_file, found.data.split(", ")), *_named_base(recipe)]
    by_hand = next((row for row in found.rows if row.name == WEIGHTS), None)
    lacking = []
    if by_hand is not None and by_hand.weights is not None:
        words += ["--weights", *(f"{weight:.15g}" for weight in by_hand.weights)]
    elif by_hand is not None:
        lacking.append("the weights of --weights")
    if found.metric is not None:
        words += ["--metric-command", "COMMAND"] if found.metric == "command" else ["--generate", found.metric]
    if found.guard is not None:
        words += ["--guard", *map(_file, found.guard.split(", "))]
        words += [] if found.margin == CompareSettings.margin else ["--margin", typed_text(found.margin)]
    if found.settings is None:
        lacking.insert(0, "the settings, which this version of loracat records, and older ones did not")
    else:
        words += _set_for(found.settings, recipe)
    why = "Compares the ways to compose" + (f". Not recorded: {'; '.join(lacking)}." if lacking else ".")
    return Step(why, f"{_line(*words, '--json')} > {shell_word(files.comparison or _COMPARISON)}")


def _set_for(made: ComparisonSettings, recipe: Recipe) -> list[str]:
    """Every setting of a comparison that is not the default, and its dtype."""
    words = [] if made.methods == CompareSettings.methods else ["--methods", ",".join(made.methods)]
    for name in made.controls:
        words += ["--control"] if "--control" not in words else []
        words += [name, "path/to/datamix"] if name == DATAMIX else [name]
    if made.fit_data:
        words += ["--fit-data", *map(_fitted_on, made.fit_data)]
    words += ["--dtype", made.dtype]
    if made.quantisation != recipe.base.quantisation:
        words += ["--quantise", made.quantisation or UNQUANTISED]
    defaults = {one.name: one.default for kind in (FitSettings, MethodOptions, TaskMetric) for one in fields(kind)}
    for name, value in made.options.items():
        if value is not None and value != defaults.get(name):
            option = f"--{name.replace('_', '-')}"
            words += [option] if value is True else [option, typed_text(value)]
    return words


def _fitted_on(file: FitFile) -> str:
    """As it is typed: with its weight where that is not 1, and with the place of the adapter whose records it holds."""
    weight = "" if file.weight == 1 else f":{file.weight:.15g}"
    return f"{_file(file.name)}{weight}{'' if file.adapter is None else f'@#{file.adapter}'}"


def _ingredient(adapter: RecipeAdapter, label: str) -> str:
    """An adapter pinned to its commit, or a directory: from the recipe's folder if it lies in there."""
    if adapter.pinned is not None:
        return adapter.pinned
    place = PurePath(adapter.reference)
    return f"path/to/{label}" if place.is_absolute() or ".." in place.parts else f"./{place}"


def _named_base(recipe: Recipe) -> list[str]:
    """The option that a base model in a directory is named by, which no recipe knows."""
    return ["--base", "path/to/base"] if recipe.base.claim is None else []


def _file(name: str) -> str:
    """A data file as a word that is no option; standard input by its sign."""
    return "-" if name == "<stdin>" else f"./{name}" if name.startswith("-") else name


def _line(*words: str) -> str:
    return " ".join(map(shell_word, words))
