"""KnOTS (arXiv 2410.19735, section 4): one basis for the outputs of all updates, TIES in its coordinates.

    [dW_1 ... dW_N] = U S [V_1^T ... V_N^T]        dW = U TIES(S V_1^T, ..., S V_N^T)

What is merged is S V_i^T, as in the authors' code. From the factors: with [s_1 B_1 ... s_N B_N] = Q R and
A_i^T = Q_i R_i, the SVD is that of the small matrix R blockdiag(R_i^T). The result has rank at most R and is exact; no
(out, in) matrix is formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loracli.algebra.factors import Factors
from loracli.algebra.methods.method import Merged, Method, MethodOptions
from loracli.algebra.methods.order import present_in_own_order
from loracli.algebra.methods.ties import DENSITY, disjoint_mean, trim

NEGLIGIBLE = 1e-12  # share of the largest singular value


def knots(updates: Sequence[Factors | None], options: MethodOptions) -> Merged:
    """KnOTS with TIES of one module."""
    present = present_in_own_order(updates)
    density = DENSITY if options.density is None else options.density
    q, r = torch.linalg.qr(torch.cat([u.scaling * u.lora_B.double() for u in present], dim=1))  # (out, p), (p, R)
    sides = [torch.linalg.qr(update.lora_A.double().T) for update in present]  # (in, q_i), (q_i, r_i)
    middle = torch.cat(
        [part @ side.R.T for part, side in zip(r.split([u.rank for u in present], dim=1), sides, strict=True)], dim=1
    )  # (p, sum q_i)
    u, singular, vh = torch.linalg.svd(middle, full_matrices=False)
    kept = singular > NEGLIGIBLE * singular.max()
    scaled = (singular[:, None] * vh)[kept].split([side.Q.shape[1] for side in sides], dim=1)
    tasks = [trim(part @ side.Q.T, density) for part, side in zip(scaled, sides, strict=True)]  # (m, in) each
    return Merged(Factors(disjoint_mean(tasks), options.scale * (q @ u[:, kept])))


KNOTS = Method("knots", "TIES in one basis of all updates' outputs", merge=knots, takes=frozenset({"density", "scale"}))
