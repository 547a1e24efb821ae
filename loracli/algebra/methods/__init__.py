"""Ways to compose adapters, a family in each file; a new one is a `Method` in one of them and its name here."""

from __future__ import annotations

from loracli.algebra.methods.linear import LINEAR_PEFT, LORAHUB, SUM, TASK_ARITHMETIC, UNIFORM
from loracli.algebra.methods.method import Method
from loracli.algebra.methods.regression import REGMEAN, REGMEAN_MODULE
from loracli.algebra.methods.sparse import DARE, DARE_TIES, TIES
from loracli.algebra.methods.spectral import KNOTS, SVD, TSV

_WEIGHTED = (UNIFORM, SUM, TASK_ARITHMETIC, LORAHUB, LINEAR_PEFT)
_EVERY = (*_WEIGHTED, TIES, DARE, DARE_TIES, KNOTS, TSV, SVD, REGMEAN, REGMEAN_MODULE)
METHODS: dict[str, Method] = {method.name: method for method in _EVERY}
