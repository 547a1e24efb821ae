"""Which methods, options and controls can be asked for together: every choice, and every refusal by its name."""

from __future__ import annotations

from typing import Any

import pytest

from loracli.algebra.methods import METHODS
from loracli.algebra.methods.method import MethodOptions
from loracli.comparison.settings import FITTED_MIXINGS, CompareSettings, Controls, parse_controls, parse_methods
from loracli.errors import UsageError
from loracli.fitting.settings import FitSettings


def test_words_of_methods_and_controls() -> None:
    assert parse_methods(" ties, dare,ties") == ("ties", "dare")
    assert parse_controls(["random", "datamix", "x", "fresh-lora"]) == Controls(True, True, "x")
    assert parse_controls([]) == Controls()
    for bad in (["datamix"], ["other"], ["fresh-lora", "x"]):
        with pytest.raises(UsageError):
            parse_controls(bad)
    for none in (" , ", ""):
        with pytest.raises(UsageError, match="--methods names no method"):
            parse_methods(none)


def test_every_method_and_kind_of_mixing_can_be_named_and_nothing_else() -> None:
    for name in ("all", "data-free", *METHODS, *FITTED_MIXINGS):
        assert CompareSettings((name,)).methods == (name,)
    for name in ("tie", "fit", "base", "TIES", ""):
        with pytest.raises(UsageError, match=f"--methods {name} is not one of all, data-free, "):
            CompareSettings((name,))


@pytest.mark.parametrize(
    ("option", "allowed", "refused"),
    [
        ("density", [None, 1e-9, 0.5, 1.0], [0.0, -0.1, 1.0000001, float("nan")]),
        ("rank", [None, 1, 10_000], [0, -1]),
        ("scale", [-1e6, 1e-9, 1e6], [0.0, 1.1e6, -1.1e6, float("nan"), float("inf")]),
        ("seed", [0, (1 << 63) - 1], [-1, 1 << 63]),
    ],
)
def test_options_of_methods_have_their_ranges_with_both_ends(
    option: str, allowed: list[Any], refused: list[Any]
) -> None:
    for value in allowed:
        MethodOptions(**{option: value}).check()
    for value in refused:
        with pytest.raises(UsageError, match=f"--{option} .* is "):
            MethodOptions(**{option: value}).check()


def test_a_margin_is_above_zero_and_below_a_hundred() -> None:
    for margin in (1e-9, 99.9):
        assert CompareSettings(margin=margin).margin == margin
    for margin in (0.0, -1.0, 100.0, float("nan")):
        with pytest.raises(UsageError, match="is not between 0 and 100"):
            CompareSettings(margin=margin)


@pytest.mark.parametrize(
    ("methods", "options", "refused"),
    [
        (("ties",), MethodOptions(density=0.5), None),
        (("sum", "ties"), MethodOptions(density=0.5), None),
        (("sum",), MethodOptions(density=0.5), "--methods sum takes --density"),
        (("tsv",), MethodOptions(scale=2.0), None),
        (("svd",), MethodOptions(scale=2.0), "--methods svd takes --scale"),
        (("svd",), MethodOptions(rank=3), None),
        (("knots",), MethodOptions(rank=3), "--methods knots takes --rank"),
        (("sum",), MethodOptions(seed=3), None),  # the bootstrap's too
        (("module",), MethodOptions(scale=2.0), "--methods module takes --scale"),
        (("all",), MethodOptions(0.5, 2.0, 1, 3), None),
        (("data-free",), MethodOptions(0.5, 2.0, 1, 3), None),
    ],
)
def test_an_option_that_none_of_the_methods_takes_is_refused(
    methods: tuple[str, ...], options: MethodOptions, refused: str | None
) -> None:
    if refused is None:
        assert CompareSettings(methods, options).options == options
        return
    with pytest.raises(UsageError, match=refused):
        CompareSettings(methods, options)


@pytest.mark.parametrize(
    ("settings", "fit_data", "guard", "refused"),
    [
        (CompareSettings(), False, False, None),
        (CompareSettings(margin=0.1), False, True, None),
        (CompareSettings(margin=0.1), False, False, "--margin is for the records of --guard"),
        (CompareSettings(), True, False, "--fit-data has no use here"),
        (CompareSettings(("all",)), True, False, None),
        (CompareSettings(("sum", "auto")), True, False, None),
        (CompareSettings(("lorahub",)), True, False, None),
        (CompareSettings(controls=Controls(fresh_lora=True)), True, False, None),
        (CompareSettings(controls=Controls(datamix="x")), True, False, "--fit-data has no use here"),
        (CompareSettings(("lorahub",), fit=FitSettings(passes=2)), True, False, "--passes has no use here"),
        (CompareSettings(("module",), fit=FitSettings(passes=2)), False, False, "--passes has no use here"),
        (CompareSettings(("module",), fit=FitSettings(passes=2)), True, False, None),
        (CompareSettings(("task-arithmetic",), fit=FitSettings(cv=3)), True, False, "--cv has no use here"),
        (CompareSettings(controls=Controls(random=True), fit=FitSettings(cv=3)), True, False, None),
    ],
)
def test_records_and_settings_that_could_change_no_row_are_refused(
    settings: CompareSettings, fit_data: bool, guard: bool, refused: str | None
) -> None:
    if refused is None:
        settings.check_used(fit_data=fit_data, guard=guard)
        return
    with pytest.raises(UsageError, match=refused):
        settings.check_used(fit_data=fit_data, guard=guard)
