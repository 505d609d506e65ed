"""A position embedding to start from that says where a patch is, for runs too short to learn that first."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 0.5  # of its values: patch embeddings of normalised pixels have a standard deviation of about 0.6
LONGEST = 10_000.0  # wavelength, in patches over 2 pi


def sine_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column, as MoCo v3 and MAE fix theirs (2104.02057, 2111.06377); here they learn on.

    Args:
        side: patches along one side of the grid.
        width: D, a multiple of 4.

    Returns:
        (1, side * side, D) float32: sines of the row, its cosines, sines of the column, its cosines, D / 4 each, of
        wavelengths from 2 pi to 2 pi * 10,000 patches.
    """
    quarter = width // 4
    rates = LONGEST ** -(torch.arange(quarter) / quarter)
    angles = torch.outer(torch.arange(side, dtype=torch.float32), rates)
    axis = torch.cat((angles.sin(), angles.cos()), 1)
    rows, columns = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
    return SCALE * torch.cat((rows, columns), -1).reshape(1, side * side, width)
