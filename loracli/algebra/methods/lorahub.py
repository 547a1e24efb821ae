"""LoRAHub (arXiv 2307.13269, section 3): one weight for each adapter, found without gradients on a few records.

    minimise  loss(w) + 0.05 sum_i |w_i| / N,    w in [-1.5, 1.5]^N,    by nevergrad's NGOpt with 40 evaluations from 0

What differs: the paper averages A and B apart, (sum w_i B_i)(sum w_i A_i), which brings in cross terms B_i A_j; here
dW = sum_i w_i dW_i. The search draws, so it depends on the order of the adapters and on the seed.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from loracli.algebra.methods.method import Loss, Method, MethodOptions

EVALUATIONS = 40
LARGEST = 1.5
PENALTY = 0.05


def search_weights(loss: Loss, adapters: int, options: MethodOptions) -> tuple[float, ...]:
    """Weights of N adapters, the best that were seen.

    Raises:
        ValueError: if nevergrad is not installed.
    """
    try:
        import nevergrad
    except ImportError:
        raise ValueError("nevergrad is not installed: pip install 'loracat[lorahub]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about settings of optimisers that it chose itself
        return _search(nevergrad, loss, adapters, options.seed)


def _search(nevergrad: Any, loss: Loss, adapters: int, seed: int) -> tuple[float, ...]:
    parameters = nevergrad.p.Array(init=[0.0] * adapters).set_bounds(-LARGEST, LARGEST)
    parameters.random_state.seed(seed % (1 << 32))
    optimiser = nevergrad.optimizers.NGOpt(parametrization=parameters, budget=EVALUATIONS)
    best, found = math.inf, (0.0,) * adapters
    for _ in range(EVALUATIONS):
        trial = optimiser.ask()
        weights = tuple(float(weight) for weight in trial.value)
        value = loss(weights) + PENALTY * sum(map(abs, weights)) / adapters
        optimiser.tell(trial, value if math.isfinite(value) else 1e9)
        if value < best:
            best, found = value, weights
    return found


LORAHUB = Method(
    "lorahub",
    "one weight each, found without gradients",
    search=search_weights,
    takes=frozenset({"seed"}),
    extra="lorahub",
)
