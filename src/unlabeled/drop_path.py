"""Drop path: in training, a residual branch is left out for some of the samples (arXiv 1603.09382).

Shape suffixes: B samples, T tokens of each, P tokens of all groups, D width, L residual branches, n kept.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from unlabeled.packing import Shapes

# Above this rate the branch runs on a part of the samples only.
SUBSET_DROP_PATH = 0.1


class Kept(NamedTuple):
    """What of the tokens x one branch is added to.

    x is (B, T, D), one group of samples, or (P, D), several packed ones: its rows are samples, or tokens.
    """

    shapes: Shapes  # of what the branch runs on
    scale: Tensor  # (B, 1, 1) or (P, 1) of what it runs on: the branch is multiplied by it
    rows: Tensor | None = None  # (n,) int64, the rows of x that it runs on; None: all


def draw(rate: float, num_branches: int, shapes: Shapes, x: Tensor) -> list[Kept]:
    """Draw for each branch what it is added to, so that the expectation is x + branch(x).

    Up to a rate of SUBSET_DROP_PATH each sample is left out with that probability, and the rest are scaled by
    1 / (1 - rate). Above it max(1, int(B * (1 - rate))) of each group's B samples are kept, and scaled by B over that.
    All branches are drawn at once, group by group: the numbers do not depend on which groups are packed.

    x: what enters the first block, for its device and dtype.
    """
    is_subset = rate > SUBSET_DROP_PATH
    kept_shapes, scales, rows = [], [], []
    first_rows = accumulate((B * T for B, T in shapes), initial=0)
    for (B, T), first in zip(shapes, first_rows, strict=False):
        random_LB = torch.rand(num_branches, B, device=x.device)
        if is_subset:
            n = max(1, int(B * (1 - rate)))
            rows_Ln = random_LB.argsort(1)[:, :n]
            scale_LB11 = x.new_full((num_branches, n, 1, 1), B / n)
            if len(shapes) > 1:  # a row is a token
                tokens_T = torch.arange(first, first + T, device=x.device)
                rows_Ln = (rows_Ln[..., None] * T + tokens_T).flatten(1)
            rows.append(rows_Ln)
        else:
            n = B
            scale_LB11 = ((random_LB >= rate) / (1 - rate)).to(x.dtype)[..., None, None]
        kept_shapes.append((n, T))
        if len(shapes) > 1:
            scale_LB11 = scale_LB11.expand(-1, -1, T, -1).flatten(1, 2)
        scales.append(scale_LB11)
    branches = zip(
        torch.cat(scales, 1).unbind(),
        torch.cat(rows, 1).unbind() if is_subset else [None] * num_branches,
        strict=True,
    )
    return [Kept(tuple(kept_shapes), scale, of_x) for scale, of_x in branches]


def add_branch(
    x_PD: Tensor, branch: Callable[[Tensor, Shapes], Tensor], shapes: Shapes, kept: Kept | None
) -> Tensor:
    """Return x + branch(x), of the samples that are kept."""
    if kept is None:
        return x_PD + branch(x_PD, shapes)
    if kept.rows is None:
        return x_PD + branch(x_PD, shapes) * kept.scale
    added = branch(x_PD.index_select(0, kept.rows), kept.shapes) * kept.scale
    return torch.index_add(x_PD, 0, kept.rows, added)
