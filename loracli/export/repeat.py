"""The commands that make an export again: what its card says to type, with every ingredient pinned."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from loracli.hub.references import URI_PREFIX
from loracli.recipe.recipe import Recipe, RecipeAdapter

_TAKE_RECIPE = """python -c "import json; print(json.dumps(json.load(open('loracat.json'))['recipe']))" > recipe.json"""


@dataclass(frozen=True)
class Repeat:
    """How something is made again.

    Args:
        command: that makes it, as far as it is not about compression, dtype and layout.
        given: the rest of the command: what it is made of.
        before: the command to type before, None without one.
        needs: what else there has to be, in sentences.
    """

    command: str
    given: str
    before: str | None = None
    needs: tuple[str, ...] = ()

    def section(self, options: str) -> list[str]:
        """Of a card; `options` are those about compression, dtype and layout."""
        return [
            "## Make it again",
            "",
            "```bash",
            *([] if self.before is None else [self.before]),
            f"{self.command}{options} {self.given}",
            "```",
            "",
            *self.needs,
            "The hashes of ingredients and weights are in `loracat.json`.",
            "",
        ]


def repeat_recipe(recipe: Recipe) -> Repeat:
    """Of a recipe as it may be published."""
    digest = recipe.mixing.tensors_sha256
    tensors = f"It takes a file of tensors beside it, which is not here: sha256 `{digest}`."
    local = any(adapter.repo_id is None for adapter in recipe.adapters)
    return Repeat(
        "loracat export",
        f"recipe.json --adapters {adapter_words(recipe.adapters)}" if local else "recipe.json",
        before=_TAKE_RECIPE,
        needs=(
            "The recipe is the object `recipe` in `loracat.json`.",
            *([] if digest is None else [tensors]),
        ),
    )


def repeat_method(options: Sequence[str], base_id: str, adapters: Sequence[RecipeAdapter], *, searched: bool) -> Repeat:
    """Of a method with its options; `searched` if calibration records found its weights."""
    words = [f"--adapters {adapter_words(adapters)}", *base_words(base_id, adapters)]
    if not searched:
        return Repeat(f"loracat export {' '.join(options)}", " ".join(words))
    needs = ("`FILE` is the calibration file that the weights were found with.",)
    return Repeat(f"loracat export {' '.join(options)}", f"{' '.join(words)} --fit-data FILE", needs=needs)


def adapter_words(adapters: Sequence[RecipeAdapter]) -> str:
    """Adapters as a command names them: pinned to their commits, local ones by a path to fill in."""
    return " ".join(shlex.quote(printable(_word(adapter))) for adapter in adapters)


def base_words(base_id: str, adapters: Sequence[RecipeAdapter]) -> list[str]:
    """The option that names the base model, where the adapters themselves do not."""
    agreed = all(adapter.base_model == base_id for adapter in adapters)
    return [] if agreed else [f"--base {shlex.quote(printable(base_id))}"]


def printable(text: str) -> str:
    """The text with a question mark for every character that is none to print, a line break among them."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _word(adapter: RecipeAdapter) -> str:
    if adapter.repo_id is None:
        return f"path/to/{adapter.reference}"
    pinned = f"{adapter.repo_id}@{adapter.commit}"
    return f"{URI_PREFIX}{pinned}/{adapter.subfolder}" if adapter.subfolder else pinned
