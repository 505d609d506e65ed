"""Losses of segmentation and depth.

Shape suffixes: B images, C classes, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LOG_EPS = 0.001  # metres, added to depth before the logarithm
GRADIENT_STRIDES = (1, 2, 4, 8)
SQUARE_FLOOR = 1e-12  # below it the square root's gradient is taken as 0, not infinite


def segmentation_loss(logits_BCHW: Tensor, labels_BHW: Tensor, ignore: int = 255) -> Tensor:
    """Return the mean cross-entropy over the pixels whose label is not `ignore`; 0 if there is none.

    labels: int64. Logits of another size are resized bilinearly to the labels'.
    """
    logits_BCHW = resized(logits_BCHW.float(), labels_BHW.shape[-2:])
    total = functional.cross_entropy(logits_BCHW, labels_BHW, ignore_index=ignore, reduction="sum")
    return total / (labels_BHW != ignore).sum().clamp_min(1)


def depth_loss(
    predicted_B1HW: Tensor, depth_B1HW: Tensor, max_depth: float | None = None, gradient_weight: float = 0.5
) -> Tensor:
    """Return the protocol's loss: scale-invariant logarithmic error + 0.5 * multi-scale gradient error.

    predicted, depth: metres. Predictions of another size are resized bilinearly to the depth's. Pixels of depth that
    is 0, negative, NaN, infinite or beyond max_depth do not count; 0 if none is left.
    """
    predicted_B1HW = resized(predicted_B1HW.float(), depth_B1HW.shape[-2:])
    valid_B1HW = valid_depth(depth_B1HW, max_depth)
    error_B1HW = log_error(predicted_B1HW, depth_B1HW, valid_B1HW)
    return scale_invariant_loss(error_B1HW, valid_B1HW) + gradient_weight * gradient_loss(
        error_B1HW, valid_B1HW
    )


def valid_depth(depth: Tensor, max_depth: float | None = None) -> Tensor:
    """Return where depth counts: finite, above 0 and at most max_depth."""
    valid = torch.isfinite(depth) & (depth > 0)
    return valid if max_depth is None else valid & (depth <= max_depth)


def log_error(predicted: Tensor, depth: Tensor, valid: Tensor) -> Tensor:
    """Return log(predicted + 0.001 m) - log(depth + 0.001 m), and 0 where depth is not valid."""
    safe = torch.where(valid, depth, 1.0)  # before the logarithm: 0 * NaN is NaN, in gradients too
    return torch.where(valid, torch.log(predicted + LOG_EPS) - torch.log(safe + LOG_EPS), 0.0)


def scale_invariant_loss(error: Tensor, valid: Tensor) -> Tensor:
    """Return sqrt(Var(g) + 0.15 Mean(g)^2) of the valid errors g of a batch (Eigen et al. 2014, as DINOv2 trains it).

    error: as of `log_error`. Var is that of a sample (n - 1).
    """
    count = valid.sum()
    mean = error.sum() / count.clamp_min(1)
    squares = torch.where(valid, error - mean, 0.0).square().sum()
    return (squares / (count - 1).clamp_min(1) + 0.15 * mean.square()).clamp_min(SQUARE_FLOOR).sqrt()


def gradient_loss(error_B1HW: Tensor, valid_B1HW: Tensor) -> Tensor:
    """Return the sum over 4 scales of the mean |difference| of errors two pixels apart (1804.00607, equation 4).

    error: as of `log_error`. A scale is every 1st, 2nd, 4th, 8th pixel; differences count where both ends are valid,
    horizontal and vertical ones, and their sum is divided by the number of valid pixels of the scale.
    """
    total = error_B1HW.new_zeros(())
    for stride in GRADIENT_STRIDES:
        error, valid = error_B1HW[..., ::stride, ::stride], valid_B1HW[..., ::stride, ::stride]
        count = valid.sum().clamp_min(1)
        for dim in (-2, -1):
            length = error.shape[dim] - 2
            if length < 1:
                continue
            difference = error.narrow(dim, 0, length) - error.narrow(dim, 2, length)
            both = valid.narrow(dim, 0, length) & valid.narrow(dim, 2, length)
            total = total + torch.where(both, difference, 0.0).abs().sum() / count
    return total


def resized(maps_BCHW: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Return maps at a size (H, W), bilinearly (corners not aligned)."""
    if maps_BCHW.shape[-2:] == size:
        return maps_BCHW
    return functional.interpolate(maps_BCHW, size=tuple(size), mode="bilinear")
