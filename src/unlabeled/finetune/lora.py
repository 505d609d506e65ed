"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) as reparametrised weights, merged back exactly.

The weight itself is W + B A, so that a layer's own code runs unchanged and merging is no other arithmetic.

Shape suffixes: R rank, I inputs, O outputs of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unlabeled.errors import UserError
from unlabeled.vit import Block, VisionTransformer


class LowRank(nn.Module):
    """Adds up_OR down_RI to a weight; up starts at zero, so nothing changes before the first step."""

    def __init__(self, weight_OI: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight_OI.shape
        if not 1 <= rank <= min(outputs, inputs):
            raise UserError(f"--lora {rank} is no rank of {outputs} x {inputs}; 4 to 64 are common.")
        self.down_RI = nn.Parameter(weight_OI.new_empty(rank, inputs))
        self.up_OR = nn.Parameter(weight_OI.new_zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down_RI, a=math.sqrt(5))

    def forward(self, weight_OI: Tensor) -> Tensor:
        """Return the adapted weight."""
        return weight_OI + self.up_OR @ self.down_RI


def add_adapters(model: VisionTransformer, rank: int, mlp: bool = False) -> None:
    """Freeze a backbone and give attention's matrices adapters, the only weights that learn; mlp: the FFN's too.

    Raises UserError for a rank above a matrix's own.
    """
    model.requires_grad_(False)
    for linear in adaptable(model, mlp):
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank), unsafe=True)


@torch.no_grad()
def merge_adapters(model: VisionTransformer) -> None:
    """Put W + B A in the place of every adapted weight: a plain backbone again, with the same outputs."""
    for linear in [one for one in adaptable(model, mlp=True) if parametrize.is_parametrized(one)]:
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    model.requires_grad_(True)


def adaptable(model: VisionTransformer, mlp: bool) -> Iterator[nn.Linear]:
    """Give the matrices that adapters are for."""
    for block in cast("Iterable[Block]", model.blocks):
        for part in (block.attn, block.mlp) if mlp else (block.attn,):
            yield from (module for module in part.modules() if isinstance(module, nn.Linear))
