"""LoRA on convolutions, as PEFT keeps it: kernels for factors, one pair of them for all groups.

    base_model.model.<module>.lora_A.weight    (r, in, kh, kw)    one size for nn.Conv1d, three for nn.Conv3d
    base_model.model.<module>.lora_B.weight    (out, r / groups, 1, 1)

The update of a group is read as that of a module of its own, `encoder.conv[1]`, with flat factors: A (r / groups,
in kh kw) and B (out / groups, r / groups). That of a convolution of one group goes by its own name. How many groups
there are, the two shapes tell (algebra/packing.py).
"""

from __future__ import annotations

from loracli.algebra.packing import Convolution
from loracli.errors import MalformedAdapter

Shape = tuple[int, ...]
DIMENSIONS = (3, 4, 5)  # of the kernels of nn.Conv1d, nn.Conv2d and nn.Conv3d


def convolution_of(module: str, lora_A: Shape, lora_B: Shape, where: str) -> Convolution:
    """The convolution that factors of these shapes belong to.

    Args:
        module: whose they are.
        lora_A, lora_B: shapes in the file, one of them at least no matrix's.
        where: the file, for errors.
    Raises:
        MalformedAdapter: if PEFT has no convolution with such factors.
    """
    fits = len(lora_A) == len(lora_B) and len(lora_A) in DIMENSIONS and set(lora_B[2:]) == {1}
    if not fits or lora_A[0] % lora_B[1]:
        raise MalformedAdapter(
            f"{module!r} has lora_A {lora_A} and lora_B {lora_B}, which are neither matrices nor the kernels of a "
            "convolution",
            where=where,
            hint="expected (r, in, kh, kw) and (out, r / groups, 1, 1)",
        )
    groups = lora_A[0] // lora_B[1]
    if lora_A[1] % groups or lora_B[0] % groups:
        raise MalformedAdapter(
            f"{module!r} has {groups} groups, by the ranks of lora_A {lora_A} and lora_B {lora_B}, and they do not "
            "divide its channels",
            where=where,
        )
    return Convolution(groups, lora_A[2:])
