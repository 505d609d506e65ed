"""The teacher's targets: from its logits to probabilities, by centering or by Sinkhorn-Knopp.

Shape suffixes: N samples, K prototypes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def softmax_center(logits_NK: Tensor, center_K: Tensor, temperature: float) -> Tensor:
    """softmax((logits - center) / temperature), float32 rows that sum to 1 (DINO, equation 1 and section 3.1)."""
    return ((logits_NK.float() - center_K) / temperature).softmax(-1)


class Center(nn.Module):
    """The running mean of the teacher's logits: center <- m * center + (1 - m) * batch mean (DINO, equation 4)."""

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))

    @torch.no_grad()
    def update(self, logits_NK: Tensor) -> None:
        """Move towards the mean over the rows of all ranks, which may hold different numbers of them."""
        total_K, count = logits_NK.float().sum(0), logits_NK.new_tensor(len(logits_NK), dtype=torch.float32)
        _all_reduce(total_K)
        _all_reduce(count)
        if count > 0:
            self.center.lerp_(total_K / count, 1 - self.momentum)


@torch.no_grad()
def sinkhorn_knopp(logits_NK: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    """Soft assignment of samples to prototypes that uses all prototypes alike (SwAV, 2006.09882, section 3.1).

    Q = diag(u) exp(logits / temperature) diag(v) with prototype sums 1/K and sample sums 1/B, alternated
    `num_iterations` times, samples last. Each row of the exponential is divided by its own maximum, which is put
    back through the starting value of v: nothing overflows, and no row vanishes, whatever the logits.

    Args:
        logits_NK: this rank's samples; ranks may hold different N, or none.
        temperature: above 0.
        num_iterations: at least 1.

    Returns:
        (N, K) float32, rows that sum to 1.
    """
    scaled_NK = logits_NK.float() / temperature
    num_samples, num_prototypes = scaled_NK.shape
    row_max_N = scaled_NK.amax(1)
    highest = row_max_N.amax() if num_samples else scaled_NK.new_full((), -torch.inf)
    _all_reduce(highest, dist.ReduceOp.MAX)
    count = scaled_NK.new_tensor(float(num_samples))
    _all_reduce(count)
    exponential_NK = scaled_NK.sub_(row_max_N[:, None]).exp_()
    sample_scale_N = (row_max_N - highest).exp()
    for _ in range(num_iterations):
        sums_K = sample_scale_N @ exponential_NK
        _all_reduce(sums_K)
        # A prototype that no sample reaches in float32 keeps a finite scale.
        prototype_scale_K = (sums_K * num_prototypes).clamp_min(1e-30).reciprocal()
        sample_scale_N = (exponential_NK @ prototype_scale_K * count).reciprocal()
    return exponential_NK.mul_(prototype_scale_K).mul_((sample_scale_N * count)[:, None])


def _all_reduce(value: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value, operation)
