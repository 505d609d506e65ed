"""Patch PCA against scikit-learn in float64, and the foreground against known objects."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

import unlabeled
from tests.features.conftest import tokens_of
from unlabeled.errors import UserError
from unlabeled.features.pca import above, components, more_on_the_border, patch_pca, principal
from unlabeled.vit import VisionTransformer

grids = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


def reference_colours(rows: np.ndarray) -> np.ndarray:
    """Scikit-learn's components, with the sign of the largest loading, scaled between percentiles."""
    pca = PCA(3, svd_solver="full").fit(rows.astype(np.float64))
    signs = [np.sign(vector[np.abs(vector).argmax()]) for vector in pca.components_]
    scores = pca.transform(rows.astype(np.float64)) * signs
    low, high = (np.percentile(scores, percent, axis=0) for percent in (1, 99))
    return np.clip((scores - low) / (high - low), 0, 1)


@settings(max_examples=40, deadline=None)
@given(shapes=grids, width=st.integers(3, 20), seed=st.integers(0, 99))
def test_it_is_scikit_learn_s(shapes: list[tuple[int, int]], width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = [(5 + rng.normal(size=(*shape, width))).astype(np.float32) for shape in shapes]
    rows = np.concatenate([grid.reshape(-1, width) for grid in features])
    if len(rows) < 5:
        return
    found = components(features, foreground=False)
    assert [grid.shape for grid in found.colours] == [(*shape, 3) for shape in shapes]
    assert all(mask.all() for mask in found.foreground)
    flat = np.concatenate([grid.reshape(-1, 3) for grid in found.colours])
    assert flat.dtype == np.float32
    np.testing.assert_allclose(flat, reference_colours(rows), atol=1e-4)
    pca = PCA(3, svd_solver="full").fit(rows.astype(np.float64))
    np.testing.assert_allclose(found.explained, pca.explained_variance_ratio_, rtol=1e-5)


def test_many_rows_are_one_analysis() -> None:
    rows = np.random.default_rng(0).normal(size=(9001, 6)).astype(np.float32) * [5, 4, 3, 2, 1, 1]
    scores, _ = principal(rows.astype(np.float32), 3)
    expected = PCA(3, svd_solver="full").fit_transform(rows.astype(np.float32).astype(np.float64))
    np.testing.assert_allclose(np.abs(scores), np.abs(expected), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    boxes=st.lists(st.tuples(*[st.integers(1, 4) for _ in range(4)], st.integers(1, 5), st.integers(1, 5)), min_size=1,
                   max_size=4),
    seed=st.integers(0, 99),
    sign=st.sampled_from([-1, 1]),
)  # fmt: skip
def test_the_foreground_is_the_object(boxes: list[tuple[int, ...]], seed: int, sign: int) -> None:
    """Rectangles of one kind of feature, off the borders of images of another kind, each with its own offset."""
    rng = np.random.default_rng(seed)
    kind = sign * rng.normal(size=12)
    features, masks = [], []
    for top, bottom, left, right, height, width in boxes:
        mask = np.zeros((top + height + bottom, left + width + right), bool)
        mask[top : top + height, left : left + width] = True
        noise = 0.05 * rng.normal(size=(*mask.shape, 12)) + 3 * rng.normal(size=12)
        features.append((noise + mask[..., None] * kind).astype(np.float32))
        masks.append(mask)
    found = components(features)
    for ours, mask, colours in zip(found.foreground, masks, found.colours, strict=True):
        np.testing.assert_array_equal(ours, mask)
        assert not colours[~mask].any()
    rows = np.concatenate([grid[mask] for grid, mask in zip(features, masks, strict=True)])
    if len(rows) >= 5:
        flat = np.concatenate([colours[mask] for colours, mask in zip(found.colours, masks, strict=True)])
        np.testing.assert_allclose(flat, reference_colours(rows), atol=1e-3)


def test_the_first_component_is_of_each_image_s_own_centre() -> None:
    rng = np.random.default_rng(3)
    features = [rng.normal(size=(h, w, 8)).astype(np.float32) + h for h, w in ((6, 9), (9, 4))]
    rows = [grid.reshape(-1, 8).astype(np.float64) for grid in features]
    centred = np.concatenate([part - part.mean(0) for part in rows])
    scores = PCA(1, svd_solver="full").fit_transform(centred)[:, 0]
    first = np.concatenate([brute_force_otsu(scores[:54]), brute_force_otsu(scores[54:])])
    found = np.concatenate([mask.ravel() for mask in components(features).foreground])
    assert (found == first).all() or (found == ~first).all()


def brute_force_otsu(values: np.ndarray) -> np.ndarray:
    def within(threshold: float) -> float:
        parts = values[values > threshold], values[values <= threshold]
        return sum(float(((part - part.mean()) ** 2).sum()) for part in parts)

    return values > min(sorted(set(values))[:-1], key=within)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(2, 30), share=st.floats(0.05, 0.95))
def test_the_threshold_is_otsu_s(seed: int, count: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=count) + 3 * (rng.random(count) < share)
    np.testing.assert_array_equal(above(values), brute_force_otsu(values))
    assert not above(np.full(count, 0.3)).any()


def test_the_border_rule() -> None:
    inside = np.zeros((4, 5), bool)
    inside[1:3, 1:4] = True
    assert not more_on_the_border([inside]) and more_on_the_border([~inside])
    # A large object that the image cuts off is still more common inside.
    cut = np.ones((6, 6), bool)
    cut[0] = False
    assert not more_on_the_border([cut]) and more_on_the_border([~cut])
    # Each image counts the same, however large.
    large = np.zeros((40, 40), bool)
    large[0, :10] = True
    assert not more_on_the_border([inside, large])
    # All border: the smaller part is the object.
    assert not more_on_the_border([np.array([[True, False, False]])])
    assert more_on_the_border([np.array([[True, True, False]])])


@pytest.mark.parametrize("foreground", [True, False])
def test_without_variance_everything_is_middle_grey(foreground: bool) -> None:
    found = components([np.full((3, 4, 5), 0.1, np.float32), np.full((1, 1, 5), 0.1, np.float32)], foreground)
    for colours, mask in zip(found.colours, found.foreground, strict=True):
        assert (colours == 0.5).all() and mask.all()
    assert (found.explained == 0).all()


def test_fewer_dimensions_than_colours() -> None:
    rows = np.random.default_rng(0).normal(size=(4, 4, 2)).astype(np.float32)
    found = components([rows], foreground=False)
    assert (found.colours[0][..., 2] == 0.5).all() and np.ptp(found.colours[0][..., 1]) == 1
    assert found.explained.sum() == pytest.approx(1) and found.explained[2] == 0


def test_from_images(photograph: np.ndarray, make_model: Callable[..., VisionTransformer]) -> None:
    model = make_model(registers=2)
    one, two = photograph[:160, :240], np.ascontiguousarray(photograph[:240, :160])
    tokens = [tokens_of(model, image).astype(np.float32) for image in (one, two)]
    for foreground in (True, False):
        found = unlabeled.patch_pca(model, [one, two], foreground=foreground, size=160)
        expected = components(tokens, foreground)
        for index, grid in enumerate(((20, 30), (30, 20))):
            assert found.colours[index].shape == (*grid, 3)
            np.testing.assert_allclose(found.colours[index], expected.colours[index], atol=1e-3)
            np.testing.assert_array_equal(found.foreground[index], expected.foreground[index])
    alone = patch_pca(model, one, size=160)
    np.testing.assert_allclose(alone.colours[0], components(tokens[:1]).colours[0], atol=1e-3)
    with pytest.raises(UserError, match="at least one image"):
        patch_pca(model, [])
