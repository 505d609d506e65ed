"""Segmentation by reference: prototypes and similarities against plain loops, and what is found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import unlabeled
from tests.dense.discs import make_local_model, scene
from unlabeled import UserError
from unlabeled.dense.masks import patch_shares
from unlabeled.dense.reference import (
    PRIOR,
    RIDGE,
    TEMPERATURE,
    decided,
    learn_prototypes,
    open_references,
    spherical_kmeans,
    whitened,
)  # fmt: skip
from unlabeled.dense.regions import region_similarity
from unlabeled.features.fitting import patch_features


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def whitened_plainly(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = features.astype(np.float64)
    mean = rows.mean(0)
    covariance = np.zeros((rows.shape[1],) * 2)
    for row in rows:
        covariance += np.outer(row - mean, row - mean) / len(rows)
    covariance += RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    return mean, vectors @ np.diag(values**-0.5) @ vectors.T


def test_one_prototype_a_class_is_the_weighed_mean_of_its_patches() -> None:
    """All of it in float64 loops: shares, whitening, weighed mean direction, cosine of a target's patches."""
    model = make_local_model(depth=1)
    reference, inside = scene(1)
    target, _ = scene(2, 70, 50)
    found = learn_prototypes(
        model, open_references(reference, inside), num_prototypes=1, size=64, radius=0, device="cpu"
    )
    features = patch_features(model, reference, 64)
    h, w, D = features.shape
    rows = features.reshape(-1, D)
    mean, W = whitened_plainly(rows)
    white = unit((rows - mean) @ W)
    expected, sums = [], []
    for number in (0, 1):
        shares = patch_shares(inside == number, (h, w)).ravel()
        total = np.zeros(D)
        for share, row in zip(shares, white, strict=True):
            total += share * row
        expected.append(unit(total))
        sums.append(shares.sum())
    np.testing.assert_allclose(found.vectors, expected, atol=2e-4)
    segmentation = found.segment(target)
    target_rows = patch_features(model, target, 64)
    cosines = unit((target_rows - mean) @ W) @ np.array(expected).T
    # Of one prototype the soft maximum is the cosine, less what the rarer class is less expected.
    rarer = TEMPERATURE * PRIOR * np.log(np.array(sums) / max(sums))
    np.testing.assert_allclose(segmentation.similarity, (cosines + rarer).transpose(2, 0, 1), atol=1e-3)


def test_similarity_is_the_soft_maximum_of_a_plain_loop() -> None:
    model = make_local_model(depth=1)
    reference, inside = scene(1)
    found = learn_prototypes(
        model, open_references(reference, inside), num_prototypes=5, size=64, device="cpu"
    )
    assert (np.bincount(found.owners) <= 5).all() and len(found.owners) > 5
    totals = [float(found.weights[found.owners == place].sum()) for place in (0, 1)]
    areas = [1 - inside.mean(), inside.mean()]
    assert totals == pytest.approx([(area / max(areas)) ** PRIOR for area in areas], rel=1e-3)
    features = patch_features(model, scene(3)[0], 64)
    for row, column in ((0, 0), (2, 5), (7, 10)):
        x = unit((features[row, column].astype(np.float64) - found.mean) @ found.whitening)
        for place in (0, 1):
            total = 0.0
            for vector, weight, owner in zip(found.vectors, found.weights, found.owners, strict=True):
                if owner == place:
                    total += float(weight) * np.exp(float(x @ vector) / TEMPERATURE)
            value = found.similarity(features)[place, row, column]
            assert value == pytest.approx(TEMPERATURE * np.log(total), abs=1e-4)
            assert value <= 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.integers(1, 8), st.integers(2, 60))
def test_kmeans_is_at_a_fixed_point_of_plain_iterations(seed: int, num_means: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    rows = unit(rng.normal(size=(count, 6)) + 2 * rng.integers(0, 2, (count, 1))).astype(np.float32)
    weights = rng.random(count).astype(np.float32) + 0.05
    means = spherical_kmeans(rows, weights, num_means)
    assert means.shape == (min(num_means, count), 6)
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1, atol=1e-5)

    def quality(means: np.ndarray) -> float:
        return float(
            sum(
                weight * max(float(row @ mean) for mean in means)
                for row, weight in zip(rows, weights, strict=True)
            )
        )

    places = np.array([max(range(len(means)), key=lambda k: float(row @ means[k])) for row in rows])
    again = np.stack(
        [
            unit((weights[:, None] * rows)[places == k].sum(0, dtype=np.float64))
            if (places == k).any()
            else mean
            for k, mean in enumerate(means)
        ]
    )
    assert quality(again) <= quality(means) * 1.01 + 1e-6
    np.testing.assert_array_equal(means, spherical_kmeans(rows, weights, num_means))


def test_whitened_features_have_equal_variances_up_to_the_ridge() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(5000, 5)) * (1, 2, 3, 4, 5) + 7).astype(np.float32)
    mean, W = whitened(rows, ridge=1e-6)
    np.testing.assert_allclose(np.cov(((rows - mean) @ W).T), np.eye(5), atol=2e-3)
    same = np.ones((10, 4), np.float32)
    mean, W = whitened(same)
    assert not ((same - mean) @ W).any()


def test_the_object_is_found_at_every_size_and_shape(local_model: unlabeled.VisionTransformer) -> None:
    reference, inside = scene(1)
    for shape in ((96, 128), (150, 70), (61, 200), (24, 24)):
        target, truth = scene(5, *shape)
        found = unlabeled.segment(local_model, target, reference, inside, size=96, device="cpu")
        assert found.mask.shape == found.margin.shape == shape and found.classes == (0, 1)
        assert set(np.unique(found.mask)) == {0, 255}
        assert ((found.margin > 0) == (found.mask == 255)).mean() > 0.999
        assert region_similarity(found.mask == 255, truth) > 0.75
        assert found.margin.min() >= -1 and found.similarity.max() <= 1


def test_several_references_classes_and_targets(local_model: unlabeled.VisionTransformer) -> None:
    references = [scene(seed, 96, 64 + 16 * seed) for seed in (1, 2)]
    images = [pixels for pixels, _ in references]
    first = np.where(references[0][1], 4, 255).astype(np.uint8)  # the object only
    second = np.where(references[1][1], 255, 9).astype(np.uint8)  # the background only
    targets = [scene(seed) for seed in (5, 6)]
    found = unlabeled.segment(
        local_model, [pixels for pixels, _ in targets], images, [first, second], size=96, device="cpu"
    )
    for segmentation, (_, truth) in zip(found, targets, strict=True):
        assert segmentation.classes == (4, 9)
        assert ((segmentation.mask == 4) == truth).mean() > 0.97
        assert set(np.unique(segmentation.mask)) == {4, 9}


def test_of_several_classes_the_rare_ones_count_alike() -> None:
    reference, inside = scene(1)
    for numbers, is_binary in (((0, 255), True), ((4, 9), False)):
        mask = np.where(inside, numbers[1], numbers[0]).astype(np.uint8)
        references = open_references(reference, mask)
        assert references.labels.is_binary == is_binary
        found = learn_prototypes(make_local_model(depth=1), references, size=64, device="cpu")
        rare, common = sorted(np.bincount(found.owners, found.weights))
        assert common == pytest.approx(1) and (rare < 0.9 if is_binary else rare == pytest.approx(1))


def test_masks_of_one_object_each(local_model: unlabeled.VisionTransformer) -> None:
    pixels, inside = scene(1)
    left = np.arange(pixels.shape[1]) < 20
    stripe = np.broadcast_to(left, inside.shape) & ~inside
    found = unlabeled.segment(local_model, pixels, pixels, [inside, stripe], size=96, device="cpu")
    assert found.classes == (0, 1, 2)
    assert ((found.mask == 1) == inside).mean() > 0.97


def test_decided_is_the_largest_map_and_its_margin(photograph: np.ndarray) -> None:
    pixels = photograph[:40, :50]
    maps = np.random.default_rng(0).normal(size=(5, 40, 50)).astype(np.float32)
    places, margin = decided(maps, pixels, radius=0)
    np.testing.assert_array_equal(places, maps.argmax(0))
    ordered = np.sort(maps, axis=0)
    np.testing.assert_allclose(margin, ordered[-1] - ordered[-2], atol=1e-6)


def test_the_same_result_each_time(local_model: unlabeled.VisionTransformer) -> None:
    reference, inside = scene(1)
    runs = [
        learn_prototypes(local_model, open_references(reference, inside), size=96, device="cpu")
        for _ in range(2)
    ]
    assert runs[0].identity() == runs[1].identity()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_prototypes": 0}, "at least one prototype, not 0"),
        ({"radius": -1}, "radius is 0 or more patches, not -1"),
        ({"size": 3}, "size of 3 pixels"),
        ({"layer": 5}, "no layer 5"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_options_out_of_range(local_model: unlabeled.VisionTransformer, options: dict, words: str) -> None:
    pixels, inside = scene(1)
    with pytest.raises(UserError, match=words):
        unlabeled.segment(local_model, pixels, pixels, inside, **{"device": "cpu", **options})


def test_bad_references_and_models(local_model: unlabeled.VisionTransformer) -> None:
    pixels, inside = scene(1)
    with pytest.raises(UserError, match=r"image 1: .* smaller than one patch"):
        unlabeled.segment(local_model, pixels, pixels[:5], inside[:5] | (np.arange(128) < 9), device="cpu")
    with pytest.raises(UserError, match="at least one reference"):
        unlabeled.segment(local_model, pixels, [], [], device="cpu")
    with pytest.raises(UserError, match="2 references have 1 masks"):
        unlabeled.segment(local_model, pixels, [pixels, pixels], inside, device="cpu")
    with pytest.raises(UserError, match=r"missing\.jpg cannot be read"):
        unlabeled.segment(local_model, pixels, "missing.jpg", inside, device="cpu")
    with pytest.raises(UserError, match="no_model"):
        unlabeled.segment("no_model", pixels, pixels, inside, device="cpu")
    with pytest.raises(UserError, match="training mode"):
        unlabeled.segment(make_local_model(1).train(), pixels, pixels, inside, device="cpu")
