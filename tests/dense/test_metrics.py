"""Metrics against scikit-learn and plain formulas."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score

from unlabeled.dense.metrics import (
    DEPTH_METRICS,
    confusion_matrix,
    crop_mask,
    depth_scores,
    segmentation_scores,
)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 9), st.integers(0, 99))
def test_iou_against_scikit_learn(num_classes: int, side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, predicted = rng.integers(0, num_classes, (2, side, side)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.2] = 255
    confusion = confusion_matrix(predicted, labels, num_classes)
    kept = labels != 255
    if not kept.any():
        assert confusion.sum() == 0
        return
    truth, said = labels[kept], predicted[kept]
    np.testing.assert_array_equal(confusion, sklearn_confusion(truth, said, labels=np.arange(num_classes)))
    scores = segmentation_scores(confusion)
    occurring = sorted({*truth, *said})
    expected = jaccard_score(truth, said, labels=occurring, average=None, zero_division=0)
    np.testing.assert_allclose(scores.iou[occurring], expected)
    assert np.isnan(np.delete(scores.iou, occurring)).all()
    assert scores.miou == pytest.approx(expected.mean())
    assert scores.accuracy == pytest.approx((truth == said).mean())


def test_several_matrices_at_once() -> None:
    confusions = np.random.default_rng(0).integers(0, 9, (4, 3, 3))
    together = segmentation_scores(confusions)
    for index, one in enumerate(confusions):
        assert together.miou[index] == segmentation_scores(one).miou
    assert np.isnan(segmentation_scores(np.zeros((2, 2), np.int64)).miou)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(0, 99))
def test_depth_against_the_formulas(side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    depth = rng.uniform(0, 12, (side, side)).astype(np.float32)
    depth[rng.random(depth.shape) < 0.2] = (0, np.nan)[seed % 2]
    predicted = rng.uniform(-1, 14, (side, side)).astype(np.float32)
    found = depth_scores(predicted, depth, 0.5, 10)
    pairs = [
        (min(max(float(p), 0.5), 10.0), float(d))
        for p, d in zip(predicted.flat, depth.flat, strict=True)
        if math.isfinite(d) and 0.5 < d < 10
    ]
    if not pairs:
        assert found is None
        return
    n = len(pairs)
    expected = {
        "rmse": math.sqrt(sum((p - d) ** 2 for p, d in pairs) / n),
        "abs_rel": sum(abs(p - d) / d for p, d in pairs) / n,
        "log10": sum(abs(math.log10(p) - math.log10(d)) for p, d in pairs) / n,
        **{f"delta{i}": sum(max(p / d, d / p) < 1.25**i for p, d in pairs) / n for i in (1, 2, 3)},
    }
    np.testing.assert_allclose(found, [expected[name] for name in DEPTH_METRICS], rtol=1e-6)


def test_alignment_takes_out_scale_and_shift() -> None:
    depth = np.random.default_rng(0).uniform(1, 9, (6, 7)).astype(np.float32)
    assert depth_scores(3 * depth, depth)[0] > 1
    assert depth_scores(3 * depth, depth, align="median")[0] == pytest.approx(0, abs=1e-5)
    assert depth_scores(2 - 3 * depth, depth, align="least squares")[0] == pytest.approx(0, abs=1e-5)


def test_crops_of_the_protocols() -> None:
    eigen = crop_mask((480, 640), "eigen")
    assert np.flatnonzero(eigen.any(1))[[0, -1]].tolist() == [45, 470]
    assert np.flatnonzero(eigen.any(0))[[0, -1]].tolist() == [41, 600]
    garg = crop_mask((352, 1216), "garg")
    assert np.flatnonzero(garg.any(1))[[0, -1]].tolist() == [143, 348]
    assert np.flatnonzero(garg.any(0))[[0, -1]].tolist() == [43, 1171]
    assert crop_mask((3, 4), "").all()
    depth = np.full((480, 640), 2.0, np.float32)
    wrong_outside = np.where(eigen, depth, 5).astype(np.float32)
    assert depth_scores(wrong_outside, depth, crop="eigen")[0] == 0
    assert depth_scores(wrong_outside, depth)[0] > 0
