"""The teacher's targets: from its logits to probabilities, by centering or by Sinkhorn-Knopp.

Shape suffixes: N samples, K prototypes, C bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

AT_ONCE = 2**27  # logits of masked patches held at once in the making of targets: 0.5 GB in float32


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
        self.move(logits_NK.float().sum(0), len(logits_NK))

    @torch.no_grad()
    def move(self, total_K: Tensor, num_rows: int) -> None:
        """The same, given the sum of this rank's rows, which is used up."""
        count = _number(num_rows, total_K)
        _all_reduce(total_K)
        _all_reduce(count)
        moved_K = self.center.lerp(total_K / count.clamp_min(1), 1 - self.momentum)
        self.center.copy_(torch.where(count > 0, moved_K, self.center))


def prototype_logits(tokens_NC: Tensor, prototypes_KC: Tensor) -> Tensor:
    """(N, K) cosines in the dtype of the tokens."""
    with torch.autocast(tokens_NC.device.type, enabled=False):
        return tokens_NC @ prototypes_KC.to(tokens_NC.dtype).T


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
    with _in_float32(logits_NK):
        exponential_NK, _, prototype_scale_K, sample_scale_N = _sinkhorn(
            logits_NK, temperature, num_iterations
        )
    return exponential_NK.mul_(prototype_scale_K).mul_(sample_scale_N[:, None])


def _sinkhorn(
    logits_NK: Tensor, temperature: float, num_iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp(scaled - highest), highest (N), and the scales of prototypes (K) and samples (N) that make it Q."""
    scaled_NK = logits_NK.float() / temperature
    num_samples, num_prototypes = scaled_NK.shape
    row_max_N = scaled_NK.amax(1)
    highest = row_max_N.amax() if num_samples else scaled_NK.new_full((), -torch.inf)
    _all_reduce(highest, dist.ReduceOp.MAX)
    count = _number(num_samples, scaled_NK)
    _all_reduce(count)
    exponential_NK = scaled_NK.sub_(row_max_N[:, None]).exp_()
    sample_scale_N = (row_max_N - highest).exp()
    for _ in range(num_iterations):
        sums_K = sample_scale_N @ exponential_NK
        _all_reduce(sums_K)
        # A prototype that no sample reaches in float32 keeps a finite scale.
        prototype_scale_K = (sums_K * num_prototypes).clamp_min(1e-30).reciprocal()
        sample_scale_N = (exponential_NK @ prototype_scale_K * count).reciprocal()
    return exponential_NK, row_max_N, prototype_scale_K, sample_scale_N * count


def _sinkhorn_by_parts(
    parts: list[slice], scaled: Callable[[slice], Tensor], num_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What _sinkhorn gives beside the exponential, which is made again in each pass, a part at a time.

    scaled: (n, K) float32 logits / temperature of a part, a new tensor each time.
    """
    row_max_N = torch.cat([scaled(part).amax(1) for part in parts])
    highest, count = row_max_N.amax(), _number(len(row_max_N), row_max_N)
    _all_reduce(highest, dist.ReduceOp.MAX)
    _all_reduce(count)
    sample_scale_N = (row_max_N - highest).exp()

    def exponentials() -> Iterator[tuple[slice, Tensor]]:
        for part in parts:
            yield part, scaled(part).sub_(row_max_N[part, None]).exp_()

    sums_K = torch.stack([sample_scale_N[part] @ rows_nK for part, rows_nK in exponentials()]).sum(0)
    for _ in range(num_iterations):
        _all_reduce(sums_K)
        prototype_scale_K = (sums_K * len(sums_K)).clamp_min(1e-30).reciprocal()
        sums_K = torch.zeros_like(sums_K)
        for part, rows_nK in exponentials():  # sums of the next iteration from the scales of this one
            sample_scale_N[part] = (rows_nK @ prototype_scale_K * count).reciprocal()
            sums_K += sample_scale_N[part] @ rows_nK
    return row_max_N, prototype_scale_K, sample_scale_N * count


def _parts(num_rows: int, num_prototypes: int) -> list[slice]:
    step = max(1, AT_ONCE // num_prototypes)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


@dataclass(frozen=True)
class Assignment:
    """Targets of many samples that are made when they are wanted, some rows at a time, and never all at once.

    Row n is exp((tokens_n . prototypes - center) / temperature - highest_n) * prototype_scale * sample_scale_n.
    """

    tokens_NC: Tensor
    prototypes_KC: Tensor
    temperature: float
    center_K: Tensor | None
    highest_N: Tensor
    prototype_scale_K: Tensor | None
    sample_scale_N: Tensor

    @staticmethod
    @torch.no_grad()
    def by_sinkhorn(
        tokens_NC: Tensor, prototypes_KC: Tensor, temperature: float, num_iterations: int
    ) -> Assignment:
        """What sinkhorn_knopp makes of the tokens' logits."""

        def scaled(part: slice) -> Tensor:
            return prototype_logits(tokens_NC[part], prototypes_KC).float() / temperature

        parts = _parts(len(tokens_NC), len(prototypes_KC))
        with _in_float32(tokens_NC):
            if len(parts) > 1:
                scales = _sinkhorn_by_parts(parts, scaled, num_iterations)
            else:
                logits_NK = prototype_logits(tokens_NC, prototypes_KC)
                scales = _sinkhorn(logits_NK, temperature, num_iterations)[1:]
        return Assignment(tokens_NC, prototypes_KC, temperature, None, *scales)

    @staticmethod
    @torch.no_grad()
    def by_center(tokens_NC: Tensor, prototypes_KC: Tensor, temperature: float, center: Center) -> Assignment:
        """What softmax_center makes of the tokens' logits; they move the next batch's centre."""
        center_K, total_K = center.center.clone(), torch.zeros_like(center.center)
        highest, sums = [], []
        for part in _parts(len(tokens_NC), len(prototypes_KC)):
            logits_nK = prototype_logits(tokens_NC[part], prototypes_KC).float()
            total_K += logits_nK.sum(0)
            scaled_nK = (logits_nK - center_K).div_(temperature)
            highest.append(scaled_nK.amax(1))
            sums.append(scaled_nK.sub_(highest[-1][:, None]).exp_().sum(1))
        center.move(total_K, len(tokens_NC))
        highest_N = torch.cat(highest) if highest else tokens_NC.new_zeros(0, dtype=torch.float32)
        sums_N = torch.cat(sums) if sums else highest_N
        return Assignment(
            tokens_NC, prototypes_KC, temperature, center_K, highest_N, None, sums_N.reciprocal()
        )

    def __len__(self) -> int:
        return len(self.tokens_NC)

    def __getitem__(self, part: slice) -> Tensor:
        """(n, K) float32, rows that sum to 1."""
        logits_nK = prototype_logits(self.tokens_NC[part], self.prototypes_KC).float()
        if self.center_K is not None:
            logits_nK = logits_nK.sub_(self.center_K)
        rows_nK = logits_nK.div_(self.temperature).sub_(self.highest_N[part, None]).exp_()
        if self.prototype_scale_K is not None:
            rows_nK = rows_nK.mul_(self.prototype_scale_K)
        return rows_nK.mul_(self.sample_scale_N[part, None])

    def of(self, pick: Callable[[Tensor], Tensor]) -> Assignment:
        """That of some of the samples, which `pick` takes out of anything that has a row for each."""
        return replace(
            self,
            tokens_NC=pick(self.tokens_NC),
            highest_N=pick(self.highest_N),
            sample_scale_N=pick(self.sample_scale_N),
        )


def _in_float32(like: Tensor) -> torch.autocast:
    """Without autocast, which would round the sums that are written as matrix products to bf16."""
    return torch.autocast(like.device.type, enabled=False)


def _number(value: int, like: Tensor) -> Tensor:
    """A float32 scalar, filled in on the device: a copy from the host would wait for it."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _all_reduce(value: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value, operation)
