"""How good a segmentation or a depth map is, one image at a time, so that intervals can be drawn over images.

Shape suffixes: I images, C classes, M metrics, H W pixels.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

DEPTH_METRICS = ("rmse", "abs_rel", "log10", "delta1", "delta2", "delta3")
Crop = Literal["", "eigen", "garg"]
Align = Literal["", "median", "least squares"]


def confusion_matrix(
    predicted_HW: NDArray[np.integer], labels_HW: NDArray[np.integer], num_classes: int, ignore: int = 255
) -> NDArray[np.int64]:
    """Return pixel counts (C, C): rows are the true class, columns the predicted one.

    Pixels labelled `ignore` do not count. All other labels and predictions are in [0, C).
    """
    kept = labels_HW != ignore
    cells = labels_HW[kept].astype(np.int64) * num_classes + predicted_HW[kept]
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


class SegmentationScores(NamedTuple):
    """Of one confusion matrix, or of each of several."""

    miou: NDArray[
        np.float64
    ]  # (...), mean over the classes that occur in truth or prediction; NaN if none does
    iou: NDArray[np.float64]  # (..., C), NaN for a class that occurs in neither
    accuracy: NDArray[np.float64]  # (...), share of pixels


def segmentation_scores(confusion_CC: NDArray[np.int64]) -> SegmentationScores:
    """Return IoU = true positives / (truth + prediction - true positives), its mean, and pixel accuracy.

    confusion: (..., C, C) pixel counts; of a whole set, the sum over its images.
    """
    confusion = confusion_CC.astype(np.float64)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    union = confusion.sum(-1) + confusion.sum(-2) - hits
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(union > 0, hits / union, np.nan)
        accuracy = hits.sum(-1) / confusion.sum((-2, -1))
        occurs = union > 0
        miou = np.where(occurs, iou, 0).sum(-1) / occurs.sum(-1)
    return SegmentationScores(miou, iou, accuracy)


def depth_scores(
    predicted_HW: NDArray[np.float32],
    depth_HW: NDArray[np.float32],
    min_depth: float = 0.001,
    max_depth: float = 10.0,
    crop: Crop = "",
    align: Align = "",
) -> NDArray[np.float64] | None:
    """Return one image's (M,) DEPTH_METRICS, or None where no pixel counts.

    RMSE in metres; AbsRel = mean(|p - d| / d); log10 = mean |log10 p - log10 d|; delta_i = share of pixels with
    max(p / d, d / p) < 1.25^i. Pixels count whose true depth is finite and in (min_depth, max_depth), in the crop:
    eigen, of 480 x 640 NYU images, or garg, of KITTI, in shares of the sides. Predictions are clamped to
    [min_depth, max_depth], after alignment: median multiplies them by median(d) / median(p); least squares fits scale
    and shift (for what is known up to those only).
    """
    valid = np.isfinite(depth_HW) & (depth_HW > min_depth) & (depth_HW < max_depth)
    valid &= crop_mask(depth_HW.shape, crop)
    if not valid.any():
        return None
    depth, predicted = depth_HW[valid].astype(np.float64), predicted_HW[valid].astype(np.float64)
    if align == "median":
        predicted = predicted * (np.median(depth) / np.median(predicted))
    elif align:
        design = np.stack((predicted, np.ones_like(predicted)), axis=1)
        predicted = design @ np.linalg.lstsq(design, depth, rcond=None)[0]
    predicted = predicted.clip(min_depth, max_depth)
    ratio = np.maximum(predicted / depth, depth / predicted)
    return np.array(
        [
            np.sqrt(np.mean((predicted - depth) ** 2)),
            np.mean(np.abs(predicted - depth) / depth),
            np.mean(np.abs(np.log10(predicted) - np.log10(depth))),
            *(np.mean(ratio < 1.25**power) for power in (1, 2, 3)),
        ]
    )


def crop_mask(shape: tuple[int, ...], crop: Crop) -> NDArray[np.bool_]:
    """Return (H, W), True where an evaluation crop counts."""
    height, width = shape
    top, bottom, left, right = 0, height, 0, width
    if crop == "eigen":
        top, bottom, left, right = (
            45 * height // 480,
            471 * height // 480,
            41 * width // 640,
            601 * width // 640,
        )
    elif crop == "garg":
        top, bottom = int(0.40810811 * height), int(0.99189189 * height)
        left, right = int(0.03594771 * width), int(0.96405229 * width)
    mask = np.zeros((height, width), np.bool_)
    mask[top:bottom, left:right] = True
    return mask
