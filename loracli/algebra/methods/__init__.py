"""Ways to compose adapters, one in each file; a new one is a file and a line here."""

from __future__ import annotations

from loracli.algebra.methods.dare import DARE
from loracli.algebra.methods.dare_ties import DARE_TIES
from loracli.algebra.methods.knots import KNOTS
from loracli.algebra.methods.linear_peft import LINEAR_PEFT
from loracli.algebra.methods.lorahub import LORAHUB
from loracli.algebra.methods.method import Method
from loracli.algebra.methods.sum import SUM
from loracli.algebra.methods.svd import SVD
from loracli.algebra.methods.task_arithmetic import TASK_ARITHMETIC
from loracli.algebra.methods.ties import TIES
from loracli.algebra.methods.tsv import TSV
from loracli.algebra.methods.uniform import UNIFORM

_EVERY = (UNIFORM, SUM, TASK_ARITHMETIC, LORAHUB, LINEAR_PEFT, TIES, DARE, DARE_TIES, KNOTS, TSV, SVD)
METHODS: dict[str, Method] = {method.name: method for method in _EVERY}
