"""The three losses, as functions of tensors.

Shape suffixes: B images, V views, D width, C bottleneck, K prototypes, M masked patches, N rows of any kind.
Views are view-major: row v * B + b is view v of image b. Every loss is a float32 scalar.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from unlabeled.pretrain.targets import Assignment

CHUNK_BYTES = 64 * 2**20  # of float32 logits held at once


def prototype_cross_entropy(
    bottleneck_NC: Tensor,
    prototypes_KC: Tensor,
    targets_NK: Tensor | Assignment,
    weights_N: Tensor,
    temperature: float,
) -> Tensor:
    """sum_n weights_n * -(sum_k targets_nk * log softmax_k(bottleneck_n . prototypes_k / temperature)).

    The logits are made, used and dropped a chunk of rows at a time, gradients included: beside the targets nothing
    of size (N, K) ever exists; of an Assignment, the targets neither.

    Args:
        bottleneck_NC: normalised rows, in the compute dtype; the matrix products are done in it.
        prototypes_KC: normalised rows.
        targets_NK: float32, not differentiated; rows need not sum to 1 (several views' targets may be added up).
        weights_N: float32.
        temperature: the student's.
    """
    arguments = (bottleneck_NC, prototypes_KC, targets_NK, weights_N, temperature)
    loss: Tensor = _PrototypeCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        rows_NC: Tensor,
        prototypes_KC: Tensor,
        targets_NK: Tensor | Assignment,
        weights_N: Tensor,
        temperature: float,
    ) -> Tensor:
        """Loss, and both gradients for a gradient of 1: they need the same logits, so making them twice is waste."""
        wanted = any(context.needs_input_grad[:2])
        accumulate = torch.promote_types(rows_NC.dtype, torch.float32)
        with torch.autocast(rows_NC.device.type, enabled=False):
            prototypes = prototypes_KC.to(rows_NC.dtype)
            loss = rows_NC.new_zeros((), dtype=accumulate)
            rows_gradient = torch.empty_like(rows_NC) if wanted else None
            prototypes_gradient = torch.zeros_like(prototypes, dtype=accumulate) if wanted else None
            chunk = max(1, CHUNK_BYTES // (4 * len(prototypes)))
            for start in range(0, len(rows_NC), chunk):
                part = slice(start, start + chunk)
                target_nK, weight_n = targets_NK[part].to(accumulate), weights_N[part, None].to(accumulate)
                mass_n = target_nK.sum(1, keepdim=True)
                logits_nK = (rows_NC[part] @ prototypes.T).to(accumulate).div_(temperature)
                log_sum_n = logits_nK.logsumexp(1, keepdim=True)
                dots_n = torch.linalg.vecdot(target_nK, logits_nK)[:, None]
                loss += (weight_n * (mass_n * log_sum_n - dots_n)).sum()
                if rows_gradient is None or prototypes_gradient is None:
                    continue
                # d/d logits = (mass * softmax - target) * weight / temperature
                slope_nK = logits_nK.sub_(log_sum_n).exp_().mul_(mass_n).sub_(target_nK)
                slope_nK = slope_nK.mul_(weight_n / temperature).to(rows_NC.dtype)
                rows_gradient[part] = slope_nK @ prototypes
                prototypes_gradient += slope_nK.T @ rows_NC[part]
        context.save_for_backward(rows_gradient, prototypes_gradient)
        context.prototypes_dtype = prototypes_KC.dtype
        return loss

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """The saved gradients, scaled."""
        rows, prototypes = context.saved_tensors
        scaled = (prototypes * gradient).to(context.prototypes_dtype)
        return (rows * gradient).to(rows.dtype), scaled, None, None, None


def dino_loss_local(
    bottleneck_VBC: Tensor,
    prototypes_KC: Tensor,
    targets_VBK: Tensor,
    temperature: float,
    num_pairs: int,
    num_images: int,
) -> Tensor:
    """The local crops' part of the DINO loss: each local view against each global view of the teacher.

    Args:
        bottleneck_VBC: (L * B, C) of the local crops.
        prototypes_KC: (K, C).
        targets_VBK: (G, B, K) probabilities of the teacher.
        temperature: the student's.
        num_pairs: pairs the whole DINO loss is averaged over, G * (G - 1) + G * L.
        num_images: images it is averaged over; more than B where B is a part of the batch.
    """
    summed_BK = targets_VBK.sum(0)  # one pass serves all pairs of a local view: their targets add up
    num_views = len(bottleneck_VBC) // len(summed_BK)
    targets = summed_BK.expand(num_views, -1, -1).flatten(0, 1)
    weights = targets.new_full((len(targets),), 1 / (num_pairs * num_images))
    return prototype_cross_entropy(bottleneck_VBC, prototypes_KC, targets, weights, temperature)


def dino_loss_global(
    bottleneck_VBC: Tensor,
    prototypes_KC: Tensor,
    targets_VBK: Tensor,
    temperature: float,
    num_pairs: int,
    num_images: int,
) -> Tensor:
    """The global crops' part of the DINO loss: each global view against every other of the teacher.

    Arguments as for `dino_loss_local`, bottleneck_VBC being (G * B, C) of the global crops.
    """
    others_VBK = targets_VBK.flip(0) if len(targets_VBK) == 2 else targets_VBK.sum(0) - targets_VBK
    targets = others_VBK.flatten(0, 1)
    weights = targets.new_full((len(targets),), 1 / (num_pairs * num_images))
    return prototype_cross_entropy(bottleneck_VBC, prototypes_KC, targets, weights, temperature)


def ibot_loss(
    bottleneck_MC: Tensor,
    prototypes_KC: Tensor,
    targets_MK: Tensor | Assignment,
    weights_M: Tensor,
    num_crops: int,
    temperature: float,
) -> Tensor:
    """Cross-entropy of the masked patches with the teacher's, who sees them (iBOT, equation 2).

    Args:
        bottleneck_MC: the student's masked patches.
        prototypes_KC: (K, C).
        targets_MK: the teacher's probabilities for the same patches.
        weights_M: 1 / (number of masked patches of the patch's crop).
        num_crops: global crops of the batch, masked or not: what the sum is divided by.
        temperature: the student's.
    """
    return prototype_cross_entropy(
        bottleneck_MC, prototypes_KC, targets_MK, weights_M / num_crops, temperature
    )


class GatheredRows(Function):
    """(B, D) of every rank -> (world * B, D), with the gradient that all ranks have for the rows of this one."""

    @staticmethod
    def forward(ctx: Any, mine_BD: Tensor) -> Tensor:
        """Concatenate; the ranks hold the same number of rows."""
        parts = [torch.empty_like(mine_BD) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, mine_BD.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> Tensor:
        """Sum over the ranks; each keeps its own rows."""
        total_ND = gradient_ND.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total_ND)
        return total_ND.chunk(dist.get_world_size())[dist.get_rank()]


def koleo_loss(
    features_BD: Tensor, eps: float = 1e-8, group_wide: bool = False, left_out_BB: Tensor | None = None
) -> Tensor:
    """-mean log(distance to the nearest other row + eps), rows L2-normalised (DINOv2 section 4; 1806.03198).

    Always in float32. Two equal rows give a large, finite loss and no gradient; a single row gives 0.

    Args:
        features_BD: backbone CLS tokens of one view.
        eps: keeps the logarithm finite.
        group_wide: search the rows of all ranks for the nearest, as if they were one batch.
        left_out_BB: bool, pairs that are not searched either (SSCD's copies of one image); not with group_wide.
    """
    with torch.autocast(features_BD.device.type, enabled=False):
        mine_BD = F.normalize(features_BD.to(torch.promote_types(features_BD.dtype, torch.float32)), dim=-1)
        all_ND, first = mine_BD, 0
        if group_wide and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            all_ND = cast(Any, GatheredRows).apply(mine_BD)
            first = dist.get_rank() * len(mine_BD)
        if len(all_ND) < 2:
            return mine_BD.sum() * 0
        with torch.no_grad():
            cosine_BN = mine_BD @ all_ND.T
            if left_out_BB is not None:
                cosine_BN.masked_fill_(left_out_BB, -2)
            cosine_BN.diagonal(first).fill_(-2)
            nearest_B = cosine_BN.argmax(1)
        difference_BD = mine_BD - all_ND[nearest_B]
        # The square root has no gradient at 0: equal rows stay out of it.
        squared_B = difference_BD.square().sum(1)
        apart_B = squared_B > 0
        distance_B = torch.where(apart_B, squared_B, 1.0).sqrt() * apart_B
        return -(distance_B + eps).log().mean()
