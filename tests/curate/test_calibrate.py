"""Thresholds against counting pairs one by one."""

import numpy as np
import pytest

from unlabeled.curate.calibrate import calibrate, calibrate_on, from_cosines
from unlabeled.curate.copy_scores import pooled
from unlabeled.errors import UserError

from .made import clustered


def test_the_lowest_threshold_with_the_precision():
    vectors, *_ = clustered(400, copies=0)
    generator = np.random.default_rng(1)
    source = np.repeat(np.arange(400), 2)
    copies = vectors[source] + 0.12 * generator.normal(size=(800, 32))
    found = calibrate(vectors, copies.astype(np.float32), source, precisions=(0.9, 0.99))
    unit = copies / np.linalg.norm(copies, axis=1, keepdims=True)
    cosines, right = unit @ vectors.T, source[:, None] == np.arange(400)
    assert (found.positives, found.negatives) == (800, 800 * 399)
    for point in found.points:
        above = cosines >= point.threshold
        precision = (above & right).sum() / above.sum()
        assert point.precision == pytest.approx(precision, abs=0.01)
        assert precision >= point.wanted - 0.005
        assert point.recall == pytest.approx((above & right).sum() / 800, abs=0.01)
        assert point.precision_bound < point.precision
        lower = cosines >= point.threshold - 0.002
        assert (lower & right).sum() / lower.sum() < point.wanted + 0.02
    assert found.points[0].threshold < found.points[1].threshold


def test_known_copies_among_the_originals_count_neither_way():
    vectors, *_ = clustered(100, copies=0)
    vectors[1] = vectors[0]
    groups = np.arange(100)
    groups[1] = 0
    source = np.arange(100)
    plain = calibrate(vectors, vectors, source, precisions=(1.0,))
    grouped = calibrate(vectors, vectors, source, precisions=(1.0,), groups=groups)
    assert plain.negatives - grouped.negatives == 2
    assert grouped.points[0].recall == 1
    assert plain.points[0].recall == 0


def test_bounds_are_those_of_the_pairs_seen():
    found = from_cosines([0.9] * 100, [0.1] * 1000, (0.9,))
    point = found.points[0]
    assert 0.1 < point.threshold <= 0.9
    assert (point.precision, point.recall) == (1, 1)
    assert point.precision_bound == pytest.approx(0.05 ** (1 / 100))
    assert point.false_rate_bound == pytest.approx(1 - 0.05 ** (1 / 1000))
    assert point.precision_among(0, 1) == 1
    assert point.precision_among(1_000_000, 1) < 0.01


def test_no_threshold_is_good_enough():
    point = from_cosines([0.1] * 10, [0.9] * 1000, (0.9,)).points[0]
    assert point.threshold == float("inf")
    assert point.recall == 0


def test_copies_are_made_by_a_function():
    images = [np.full(4, value, np.float32) + np.arange(4) ** value for value in range(1, 5)]
    found = calibrate_on(
        images, lambda image, generator: image + 0.01 * generator.random(4), np.stack, copies_of_each=3
    )
    assert found.positives == 12
    assert found.points[0].recall == 1


def test_mistakes_are_named():
    with pytest.raises(UserError, match="one of two at least"):
        calibrate(np.ones((1, 2), np.float32), np.ones((1, 2), np.float32), [0])
    with pytest.raises(UserError, match="precision is above 0"):
        from_cosines([1.0], [0.0], (0,))


def test_micro_average_precision_is_that_of_all_pairs_in_one_list():
    rng = np.random.default_rng(3)
    right, wrong = rng.normal(0.6, 0.2, 80).clip(-1, 1), rng.normal(0.2, 0.2, 4000).clip(-1, 1)
    found = from_cosines(right, wrong)
    scores = np.floor((np.concatenate((right, wrong)) + 1) * 10_000)  # ties within a bin, wrong ones first
    expected, _, _ = pooled(scores, np.arange(4080) < 80, 0.9)
    assert found.micro_ap == pytest.approx(expected, rel=1e-12)
    assert from_cosines([], [0.5]).micro_ap == 0
