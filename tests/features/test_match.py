"""Mutual nearest patches and similarity maps against loops in float64, and at known places of real photographs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import unlabeled
from tests.features.conftest import tokens_of
from unlabeled.errors import UserError
from unlabeled.features import match as matching
from unlabeled.features.fitting import centres, unit_rows
from unlabeled.features.match import Matches, best_spread, match, mutual_nearest
from unlabeled.features.similar import patch_at, similar, similar_across
from unlabeled.vit import VisionTransformer


def loops(a: np.ndarray, b: np.ndarray) -> dict[tuple[int, int], float]:
    """Every pair that is each other's nearest, by float64 cosines."""

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(sum(x * y) / np.sqrt(sum(x * x) * sum(y * y)))

    table = [[cosine(x, y) for y in b.astype(np.float64)] for x in a.astype(np.float64)]
    pairs = {}
    for i in range(len(a)):
        j = max(range(len(b)), key=lambda column: table[i][column])
        if max(range(len(a)), key=lambda row: table[row][j]) == i:
            pairs[i, j] = table[i][j]
    return pairs


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    seed=st.integers(0, 99),
    part=st.sampled_from([3, 1024]),
)
def test_mutual_nearest_is_what_loops_find(rows: int, columns: int, seed: int, part: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(count, 5)).astype(np.float32) * 7 for count in (rows, columns))
    kept, matching._ROWS = matching._ROWS, part
    try:
        found_a, found_b, cosines = mutual_nearest(unit_rows(a), unit_rows(b))
    finally:
        matching._ROWS = kept
    expected = loops(a, b)
    assert set(zip(found_a.tolist(), found_b.tolist(), strict=True)) == set(expected)
    np.testing.assert_allclose(
        cosines, [expected[i, j] for i, j in zip(found_a, found_b, strict=True)], atol=1e-6
    )
    assert (np.diff(cosines) <= 0).all()


def test_of_equal_rows_the_first_is_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    same = np.tile(np.float32([[0.6, 0.8]]), (5, 1))
    for part in (2, 1024):
        monkeypatch.setattr(matching, "_ROWS", part)
        found_a, found_b, cosines = mutual_nearest(same, same[:3])
        assert found_a.tolist() == [0] and found_b.tolist() == [0] and cosines[0] == pytest.approx(1)


@pytest.mark.parametrize("scale", [1, 3])
def test_a_moved_photograph_matches_at_the_move(
    scale: int, photograph: np.ndarray, local_model: VisionTransformer, tmp_path: Path
) -> None:
    """A crop 16 to the right and 8 down, of a photograph as it is and enlarged; points are of the files' own pixels."""
    a, b = photograph[40:200, 60:220], photograph[48:208, 76:300]
    files = []
    for name, pixels in (("a.png", a), ("b.png", b)):
        enlarged = Image.fromarray(pixels).resize((pixels.shape[1] * scale, pixels.shape[0] * scale), 0)
        enlarged.save(tmp_path / name)
        files.append(tmp_path / name)
    found = unlabeled.match(local_model, *files, size=160)
    assert found.points_a.shape == found.points_b.shape == (len(found.similarities), 2)
    exact = found.similarities > 1 - 1e-5
    assert exact.sum() > 200  # of 18 x 19 patches that are in both; some are saturated and alike
    moves = (found.points_a - found.points_b)[exact]
    assert (np.abs(moves - [16 * scale, 8 * scale]).max(1) < 1e-6).mean() > 0.98
    corner = found.points_a.min(0)
    assert (
        corner[0] >= 4 * scale and corner[1] >= 4 * scale and found.points_b[:, 0].max() <= (224 - 4) * scale
    )


def test_match_is_the_tokens_own(
    photograph: np.ndarray, make_model: Callable[..., VisionTransformer]
) -> None:
    model = make_model(registers=1)
    a, b = photograph[:48, :80], photograph[100:164, 200:248]
    found = match(model, a, b, size=48)
    expected = loops(tokens_of(model, a).reshape(-1, 24), tokens_of(model, b).reshape(-1, 24))
    pairs = {}
    for start, end, cosine in zip(*found, strict=True):
        i = int(start[1] // 8) * 10 + int(start[0] // 8)
        j = int(end[1] // 8) * 6 + int(end[0] // 8)
        assert (start % 8 == 4).all() and (end % 8 == 4).all()
        pairs[i, j] = cosine
    assert set(pairs) == set(expected)
    for pair, cosine in pairs.items():
        assert cosine == pytest.approx(expected[pair], abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 80), most=st.integers(1, 50), seed=st.integers(0, 99), same=st.booleans())
def test_the_best_are_shown(count: int, most: int, seed: int, same: bool) -> None:
    rng = np.random.default_rng(seed)
    points = np.zeros((count, 2)) if same else rng.uniform(0, 400, (count, 2))
    matches = Matches(points, points[::-1], np.sort(rng.random(count))[::-1].astype(np.float32))
    chosen = best_spread(matches, most)
    assert len(set(chosen.tolist())) == len(chosen) and (np.diff(chosen) > 0).all()
    if not same:
        assert len(chosen) == min(most, count)
    if count:
        assert chosen[0] == 0


def test_what_is_shown_is_apart() -> None:
    """Four clumps far from each other, the best twenty of which are in one: one of each is shown."""
    corners = np.repeat([[0, 0], [300, 0], [0, 300], [300, 300]], 20, axis=0).astype(float)
    points = corners + np.random.default_rng(0).uniform(0, 10, corners.shape)
    matches = Matches(points, points, np.linspace(1, 0, 80).astype(np.float32))
    assert best_spread(matches, 4).tolist() == [0, 20, 40, 60]


def test_similar_is_the_cosine(photograph: np.ndarray, make_model: Callable[..., VisionTransformer]) -> None:
    model = make_model(registers=2)
    a, b = photograph[:48, :80], photograph[100:164, 200:248]
    tokens_a, tokens_b = tokens_of(model, a), tokens_of(model, b)
    for at, place in (((0, 0), (0, 0)), ((79, 47), (5, 9)), ((16, 23.9), (2, 2)), ((15.9, 24), (3, 1))):
        wanted = tokens_a[place]
        found = [unlabeled.similar(model, a, at=at, size=48), *similar_across(model, [a, b], at, size=48)]
        for ours, tokens in zip(found, (tokens_a, tokens_a, tokens_b), strict=True):
            lengths = np.sqrt((tokens**2).sum(-1) * (wanted**2).sum())
            assert ours.dtype == np.float32 and np.abs(ours).max() <= 1
            np.testing.assert_allclose(ours, (tokens * wanted).sum(-1) / lengths, atol=1e-5)
        assert found[0][place] == pytest.approx(1, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(8, 400), height=st.integers(8, 400), h=st.integers(1, 40), w=st.integers(1, 40),
    across=st.floats(0, 1, exclude_max=True), down=st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_a_point_is_in_the_patch_that_covers_its_pixel(
    width: int, height: int, h: int, w: int, across: float, down: float
) -> None:
    x, y = int(across * width), int(down * height)
    row, column = patch_at((x, y), (h, w), (height, width))
    assert column * width <= (x + 0.5) * w <= (column + 1) * width and 0 <= column < w
    assert row * height <= (y + 0.5) * h <= (row + 1) * height and 0 <= row < h
    (centre,) = centres(np.array([row * w + column]), (h, w), (height, width))
    assert (
        abs(centre[0] - x - 0.5) <= width / w / 2 + 1e-9 and abs(centre[1] - y - 0.5) <= height / h / 2 + 1e-9
    )


@pytest.mark.parametrize("at", [(80, 3), (3, 48), (-1, 3), (3, -0.1), (float("nan"), 3)])
def test_a_point_outside_is_refused(
    at: tuple[float, float], make_model: Callable[..., VisionTransformer]
) -> None:
    with pytest.raises(UserError, match=r"outside of the image: x is from 0 to 79, y to 47"):
        similar(make_model(), np.zeros((48, 80, 3), np.uint8), at=at)
