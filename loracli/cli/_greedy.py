"""Options that take several words: `--adapters a b` beside `--adapters a --adapters b` and `--adapters=a`.

Click refuses such options by design (pallets/click#1351) and Typer inherits that, so the words are rewritten to the
repeated form before Typer parses them. Only documented methods of the command class are used.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class GreedyCommand(TyperCommand):
    """A command whose list options each take one or more words. It can have no positional argument beside them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = {word: p for p in self.get_params(ctx) if p.param_type_name == "option" for word in p.opts}
        rewritten: list[str] = []
        rest, still_open = list(args), None
        while rest:
            word = rest.pop(0)
            option, still_open = options.get(word), None  # the exact word only: --option=value stays one value
            if word == "--":
                rewritten += [word, *rest]
                break
            if option is None or getattr(option, "is_flag", False) or getattr(option, "count", False):
                rewritten.append(word)
            elif not getattr(option, "multiple", False):  # another option's value passes untouched: --seed -3
                rewritten += [word, *rest[: option.nargs]]
                del rest[: option.nargs]
            else:
                # A lone dash is a value: standard input.
                count = next((i for i, value in enumerate(rest) if value[:1] == "-" != value), len(rest))
                if not count and not ctx.resilient_parsing:
                    ctx.fail(f"Option '{word}' needs at least one value.")
                rewritten += [part for value in rest[:count] for part in (word, value)]
                del rest[:count]
                still_open = None if rest else option
        ctx.meta["greedy"] = still_open  # the list option that the cursor is still inside, for completion
        return super().parse_args(ctx, rewritten)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        option = None if incomplete[:1] == "-" else ctx.meta.get("greedy")
        return option.shell_complete(ctx, incomplete) if option else super().shell_complete(ctx, incomplete)
