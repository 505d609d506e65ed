"""Sequences of several lengths end to end in one tensor, so that what acts on each token alone runs once for all.

Shape suffixes: B sequences of one group, T tokens of each, P tokens of all groups, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]
"""(B, T) of each group, in their order: P is the sum of B * T."""


def joined(groups_BTD: Sequence[Tensor]) -> Tensor:
    """Return the groups as one tensor, (P, D); a group alone stays as it is, (B, T, D)."""
    if len(groups_BTD) == 1:
        return groups_BTD[0]
    return torch.cat([group.flatten(0, 1) for group in groups_BTD])


def cut(x_PD: Tensor, shapes: Shapes) -> list[Tensor]:
    """Return the groups in what `joined` returned for such shapes, (B, T, D) each, without a copy."""
    if len(shapes) == 1:
        return [x_PD]
    parts = x_PD.split([B * T for B, T in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]
