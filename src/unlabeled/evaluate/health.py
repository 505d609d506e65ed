"""Figures of features that need no labels."""

from __future__ import annotations

import torch
from torch import Tensor


def rankme(features_ND: Tensor, eps: float = 1e-7) -> float:
    """Effective rank: exp of the entropy of the normalised singular values (RankMe, 2210.02885, equation 1).

    Args:
        features_ND: (N, D), not centred.
        eps: added to each share.

    Returns:
        In [1, min(N, D)].
    """
    singular = torch.linalg.svdvals(features_ND.float().cpu())
    share = singular / singular.sum().clamp_min(1e-30) + eps
    return float(torch.special.entr(share).sum().exp())
