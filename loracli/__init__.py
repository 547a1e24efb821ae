"""loracat: several LoRA adapters in, one out, with mixing weights learnt on a small calibration file.

    adapters = [loracli.fetch_adapter(ref) for ref in ("org/math-lora", "org/code-lora")]
    recipe = loracli.fit_mixing(adapters, "val.jsonl")
    recipe.save("recipe.json")
    loracli.export_adapter(loracli.ExportRequest("recipe.json", merge=True), "adapter-merged")

Names are resolved when they are first used: importing `loracli` loads neither torch nor anything else that is slow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loracli import progress as _progress
from loracli._version import __version__ as __version__
from loracli.system import display as _display

if TYPE_CHECKING:
    from loracli.adapters.adapter import LoraAdapter, read_adapter
    from loracli.adapters.compatible import Inspection, inspect_adapters
    from loracli.algebra.methods.method import MethodOptions
    from loracli.comparison.compare import compare_adapters
    from loracli.comparison.settings import CompareSettings, Controls
    from loracli.conversion.convert import Converted, ConvertRequest, convert_adapter
    from loracli.conversion.from_pickle import Unpickled, convert_pickle
    from loracli.errors import LoracatError
    from loracli.evaluation.comparison import Comparison
    from loracli.evaluation.metrics import TaskMetric
    from loracli.export.export import Composed, Exported, compose, export_adapter
    from loracli.export.request import ExportRequest
    from loracli.fitting.run import fit_mixing
    from loracli.fitting.settings import FitSettings
    from loracli.fusing.composition import FuseRequest
    from loracli.fusing.fuse import Fused, fuse_model
    from loracli.generating.generate import Generated, GenerateRequest, generate_answers
    from loracli.hub.fetch import Fetched, fetch_adapter
    from loracli.model.placement import Placement
    from loracli.pushing.push import Pushed, PushRequest, push_adapter
    from loracli.recipe.recipe import Recipe, load_recipe
    from loracli.report.report import Written, write_report
    from loracli.serving.lint import Lint, lint_adapter
    from loracli.verifying.findings import Verification
    from loracli.verifying.verify import verify_directory

_HOMES = {
    "CompareSettings": "loracli.comparison.settings",
    "Comparison": "loracli.evaluation.comparison",
    "Composed": "loracli.export.export",
    "Controls": "loracli.comparison.settings",
    "ConvertRequest": "loracli.conversion.convert",
    "Converted": "loracli.conversion.convert",
    "ExportRequest": "loracli.export.request",
    "Exported": "loracli.export.export",
    "Fetched": "loracli.hub.fetch",
    "FitSettings": "loracli.fitting.settings",
    "FuseRequest": "loracli.fusing.composition",
    "Fused": "loracli.fusing.fuse",
    "GenerateRequest": "loracli.generating.generate",
    "Generated": "loracli.generating.generate",
    "Inspection": "loracli.adapters.compatible",
    "Lint": "loracli.serving.lint",
    "LoraAdapter": "loracli.adapters.adapter",
    "LoracatError": "loracli.errors",
    "MethodOptions": "loracli.algebra.methods.method",
    "Placement": "loracli.model.placement",
    "PushRequest": "loracli.pushing.push",
    "Pushed": "loracli.pushing.push",
    "Recipe": "loracli.recipe.recipe",
    "TaskMetric": "loracli.evaluation.metrics",
    "Unpickled": "loracli.conversion.from_pickle",
    "Verification": "loracli.verifying.findings",
    "Written": "loracli.report.report",
    "compare_adapters": "loracli.comparison.compare",
    "compose": "loracli.export.export",
    "convert_adapter": "loracli.conversion.convert",
    "convert_pickle": "loracli.conversion.from_pickle",
    "export_adapter": "loracli.export.export",
    "fetch_adapter": "loracli.hub.fetch",
    "fit_mixing": "loracli.fitting.run",
    "fuse_model": "loracli.fusing.fuse",
    "generate_answers": "loracli.generating.generate",
    "inspect_adapters": "loracli.adapters.compatible",
    "lint_adapter": "loracli.serving.lint",
    "load_recipe": "loracli.recipe.recipe",
    "push_adapter": "loracli.pushing.push",
    "read_adapter": "loracli.adapters.adapter",
    "verify_directory": "loracli.verifying.verify",
    "write_report": "loracli.report.report",
}

__all__ = [
    "CompareSettings",
    "Comparison",
    "Composed",
    "Controls",
    "ConvertRequest",
    "Converted",
    "ExportRequest",
    "Exported",
    "Fetched",
    "FitSettings",
    "FuseRequest",
    "Fused",
    "GenerateRequest",
    "Generated",
    "Inspection",
    "Lint",
    "LoraAdapter",
    "LoracatError",
    "MethodOptions",
    "Placement",
    "PushRequest",
    "Pushed",
    "Recipe",
    "TaskMetric",
    "Unpickled",
    "Verification",
    "Written",
    "compare_adapters",
    "compose",
    "convert_adapter",
    "convert_pickle",
    "export_adapter",
    "fetch_adapter",
    "fit_mixing",
    "fuse_model",
    "generate_answers",
    "inspect_adapters",
    "lint_adapter",
    "load_recipe",
    "push_adapter",
    "read_adapter",
    "verify_directory",
    "write_report",
]


# What a room below shows by one above it: the package stands above all of them, and says by which.
_progress.drawn_by(lambda: import_module("loracli.cli._output").bars())
_display.drawn_by(lambda value: import_module("loracli.report.tables").html_of(value))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
