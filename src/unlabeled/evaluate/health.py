"""Figures of features that need no labels, and what each says.

Shape suffixes: N images, D width, K patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unlabeled.errors import UserError
from unlabeled.features.table import FeatureTable, open_table

SAMPLE = 8192  # images, drawn evenly at random
PAIRED = 2048  # images that are compared in pairs
PATCH_SAMPLE = 256  # grids whose patches are looked at
DEAD = 1e-4  # of the mean variance, below which a dimension is dead
FAR = 3.0  # interquartile ranges above the third quartile: Tukey's far out


@dataclass(frozen=True)
class Health:
    """Figures of a feature table.

    Attributes:
        table: its folder.
        figures: by name, see `health`.
        meanings: a sentence on each.
        counts: images (or patches) that the figures are of.
    """

    table: str
    figures: dict[str, float]
    meanings: dict[str, str]
    counts: dict[str, int]


def health(table: str | Path | FeatureTable, *, seed: int = 0) -> Health:
    """What a feature table says of its model without labels, or with those it has.

    rankme: effective rank, 2210.02885. centred_rank: that of the features less their mean. uniformity: log of the
    mean of exp(-2 squared distance) over pairs of unit vectors, 2005.10242. dead_dimensions: share of dimensions
    that hardly vary. lidar: effective rank of what separates classes, 2312.04000, with labels as the classes.
    alignment: mean squared distance of unit vectors of one label. Of a table of patches: patch_norm_outliers,
    share of patches whose norm is far above the others', and patch_norm_ratio, the largest norm over the median.

    Args:
        table: a feature table of vectors or of patches.
        seed: of the sample of up to 8,192 images.

    Raises:
        UserError: the table is of attention, or has fewer than two images.
    """
    opened = open_table(table)
    if opened.identity["kind"] == "attention":
        raise UserError(
            f"{opened.path} holds attention; the health of features is that of vectors or patches."
        )
    if len(opened) < 2:
        raise UserError(f"{opened.path} has {len(opened)} image; two are needed at least.")
    rng = np.random.default_rng(seed)
    if opened.is_grid:
        chosen = np.sort(rng.permutation(len(opened))[:PATCH_SAMPLE])
        patches_KD = np.concatenate(
            [_float(opened.grids[int(row)]).reshape(-1, opened.dimension) for row in chosen]
        )
        figures = patch_norms(patches_KD)
        figures |= vector_figures(patches_KD[rng.permutation(len(patches_KD))[:SAMPLE]], rng)
        counts = {"images": len(chosen), "patches": len(patches_KD)}
    else:
        chosen = np.sort(rng.permutation(len(opened))[:SAMPLE])
        features_ND = _float(opened.vectors[chosen])
        figures = vector_figures(features_ND, rng)
        names = opened.rows.column("label").take(chosen).to_pylist()
        figures |= label_figures(features_ND, names)
        counts = {"images": len(chosen)}
    meanings = {name: _meaning(name, value, opened.dimension, len(chosen)) for name, value in figures.items()}
    return Health(str(opened.path), figures, meanings, counts)


def vector_figures(features_ND: NDArray[np.float32], rng: np.random.Generator) -> dict[str, float]:
    """rankme, centred_rank, uniformity, dead_dimensions of features of any norm."""
    features = torch.from_numpy(features_ND)
    variance = features_ND.astype(np.float64).var(0)
    some = features_ND[rng.permutation(len(features_ND))[:PAIRED]]
    return {
        "rankme": rankme(features),
        "centred_rank": rankme(features - features.mean(0)),
        "uniformity": uniformity(some),
        "dead_dimensions": float((variance <= DEAD * max(variance.mean(), 1e-300)).mean()),
    }


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


def uniformity(features_ND: NDArray[np.float32], t: float = 2.0) -> float:
    """Log of the mean over pairs of exp(-t squared distance) of unit vectors (Wang and Isola, 2005.10242, equation 3).

    From 0, where all are the same, to about -2t for directions without order.
    """
    squares = _squared_distances(features_ND)
    above = np.triu_indices(len(squares), 1)
    return float(np.log(np.exp(-t * squares[above]).mean()))


def label_figures(features_ND: NDArray[np.float32], names: Sequence[str | None]) -> dict[str, float]:
    """lidar and alignment, where two classes and more have two images and more; else nothing."""
    labelled = np.array([name is not None for name in names])
    texts, numbers = np.unique(
        np.array([name for name in names if name is not None], str), return_inverse=True
    )
    counts = np.bincount(numbers, minlength=len(texts))
    kept = counts[numbers] >= 2
    if (counts >= 2).sum() < 2:
        return {}
    features, labels = features_ND[labelled][kept], np.unique(numbers[kept], return_inverse=True)[1]
    return {"lidar": lidar(features, labels), "alignment": alignment(features, labels)}


def lidar(features_ND: NDArray[np.float32], labels_N: NDArray[np.int64], delta: float = 1e-4) -> float:
    """Effective rank of the between-class scatter in units of the within-class scatter (LiDAR, 2312.04000, equation 4).

    Args:
        features_ND: features.
        labels_N: int64 from 0, each occurring.
        delta: added to the diagonal of the within-class scatter, as in the paper, times its mean.

    Returns:
        In [1, number of classes - 1].
    """
    features = features_ND.astype(np.float64)
    counts = np.bincount(labels_N)
    sums = np.zeros((len(counts), features.shape[1]))
    np.add.at(sums, labels_N, features)
    means_CD = sums / counts[:, None]
    within = features - means_CD[labels_N]
    scatter_DD = within.T @ within / len(features)
    scatter_DD += np.eye(len(scatter_DD)) * max(delta * np.trace(scatter_DD) / len(scatter_DD), 1e-12)
    values, vectors = np.linalg.eigh(scatter_DD)
    between = (means_CD - means_CD.mean(0)) @ vectors / np.sqrt(values)
    share = np.linalg.svd(between, compute_uv=False) ** 2
    share = share / max(share.sum(), 1e-300)
    return float(np.exp(-(share * np.log(share + 1e-12)).sum()))


def alignment(features_ND: NDArray[np.float32], labels_N: NDArray[np.int64]) -> float:
    """Mean over classes of the mean squared distance of pairs of unit vectors (2005.10242, equation 2); in [0, 4]."""
    unit_ND = _unit(features_ND)
    counts = np.bincount(labels_N).astype(np.float64)
    sums = np.zeros((len(counts), unit_ND.shape[1]))
    np.add.at(sums, labels_N, unit_ND)
    # Of n vectors of lengths s the pairs' mean squared distance is 2 (n sum s^2 - |sum|^2) / (n (n - 1)).
    lengths = np.bincount(labels_N, (unit_ND**2).sum(1))
    spread = 2 * (counts * lengths - (sums**2).sum(1)) / (counts * (counts - 1))
    return float(spread.mean())


def patch_norms(patches_KD: NDArray[np.float32]) -> dict[str, float]:
    """patch_norm_outliers and patch_norm_ratio (the artefact of 2309.16588)."""
    norms = np.linalg.norm(patches_KD.astype(np.float64), axis=1)
    low, middle, high = np.quantile(norms, (0.25, 0.5, 0.75))
    return {
        "patch_norm_outliers": float((norms > high + FAR * (high - low)).mean()),
        "patch_norm_ratio": float(norms.max() / max(middle, 1e-300)),
    }


def _meaning(name: str, value: float, width: int, num_images: int) -> str:
    most = min(width, num_images)
    if name == "rankme":
        said = (
            "collapsed"
            if value < 2
            else "narrow"
            if value < 0.1 * most
            else "broad"
            if value > 0.4 * most
            else "usual"
        )
        return (
            f"the features use {value:.0f} of {most} possible directions ({said}); of two models trained alike the "
            "larger is usually the better"
        )
    if name == "centred_rank":
        return f"around their mean they use {value:.0f}; far more than rankme means that one common direction dominates"
    if name == "uniformity":
        said = (
            "all but one direction" if value > -0.5 else "crowded" if value > -2 else "spread over the sphere"
        )
        return f"{said}: 0 is where all images are alike, -4 where they lie without order"
    if name == "dead_dimensions":
        return f"{value:.1%} of the {width} dimensions hardly vary" + (
            "; some capacity is unused" if value > 0.01 else ""
        )
    if name == "lidar":
        return f"classes are separated along {value:.1f} independent directions; more tell more classes apart linearly"
    if name == "alignment":
        return "squared distance of images of one class: 0 is one point, 2 unrelated; lower is better, all else equal"
    if name == "patch_norm_outliers":
        said = "the artefact that registers remove" if value > 0.005 else "no artefact to speak of"
        return f"{value:.2%} of the patches have a norm far above the others': {said}"
    return f"the largest patch norm is {value:.1f} times the median; several times is a sign of the artefact"


def _float(values: Any) -> NDArray[np.float32]:
    return np.asarray(values).astype(np.float32, copy=False)


def _unit(features_ND: NDArray[np.float32]) -> NDArray[np.float64]:
    features = features_ND.astype(np.float64)
    unit: NDArray[np.float64] = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return unit


def _squared_distances(features_ND: NDArray[np.float32]) -> NDArray[np.float64]:
    unit_ND = _unit(features_ND)
    lengths = (unit_ND**2).sum(1)
    squares: NDArray[np.float64] = np.maximum(lengths[:, None] + lengths - 2 * unit_ND @ unit_ND.T, 0)
    return squares
