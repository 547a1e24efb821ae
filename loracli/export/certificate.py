"""The certificate of an export: how far the bytes that were written are from the exact composition.

Per module, |dW_written - dW_exact|_F / |dW_exact|_F, with dW_exact = B_l M_l A_l in float64 from ingredients and
recipe, and dW_written from the tensors as rounded to the output dtype. Both norms come from factors.
"""

from __future__ import annotations

from dataclasses import dataclass

from loracli.adapters.names import target_of


@dataclass(frozen=True)
class ModuleCertificate:
    """One module's exactness.

    Args:
        name: of the module.
        rank: of the composition in it before padding; after truncation if there was one.
        relative_error: of the written bytes against the exact composition.
        kept_energy: share of |dW|_F^2 that the truncation kept; 1 without one.
    """

    name: str
    rank: int
    relative_error: float
    kept_energy: float


@dataclass(frozen=True)
class Certificate:
    """A whole export's exactness, and the sha256 of the tensor file."""

    modules: tuple[ModuleCertificate, ...]
    sha256: str

    @property
    def largest_error(self) -> float:
        return max(module.relative_error for module in self.modules)

    @property
    def least_energy(self) -> float:
        return min(module.kept_energy for module in self.modules)

    @property
    def worst(self) -> tuple[ModuleCertificate, ...]:
        """Of each module, and of all experts of a parameter the one that kept least; least energy first."""
        found: dict[str, ModuleCertificate] = {}
        for module in sorted(self.modules, key=lambda module: module.kept_energy):
            found.setdefault(target_of(module.name), module)
        return tuple(found.values())

    @property
    def mean_energy(self) -> float:
        return sum(module.kept_energy for module in self.modules) / len(self.modules)
