"""J and F against plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlabeled.dense.regions import boundary, boundary_accuracy, region_similarity, video_scores


def edge_pixels(mask: np.ndarray) -> list[tuple[int, int]]:
    """Where the pixel to the right, below, or below to the right is another; past the border is the last pixel."""
    height, width = mask.shape
    found = []
    for y in range(height):
        for x in range(width):
            down, right = min(y + 1, height - 1), min(x + 1, width - 1)
            if not mask[y, x] == mask[down, x] == mask[y, right] == mask[down, right]:
                found.append((y, x))
    return found


def share_near(points: list, others: list, radius: int) -> float:
    near = [any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in others) for y, x in points]
    return sum(near) / len(near)


def blobs(seed: int, height: int, width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    masks = []
    for _ in range(2):
        centre, radius = rng.random(2) * (height, width), rng.random() * 0.6 * min(height, width)
        masks.append((y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2)
    return masks


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 20), st.integers(1, 20), st.sampled_from([0.008, 0.05, 0.12]))
def test_against_plain_loops(seed: int, height: int, width: int, tolerance: float) -> None:
    predicted, truth = blobs(seed, height, width)
    edges = [edge_pixels(mask) for mask in (predicted, truth)]
    assert sorted(zip(*map(list, np.nonzero(boundary(truth))), strict=True)) == edges[1]
    both = sum(1 for a, b in zip(predicted.flat, truth.flat, strict=True) if a and b)
    either = sum(1 for a, b in zip(predicted.flat, truth.flat, strict=True) if a or b)
    assert region_similarity(predicted, truth) == pytest.approx(both / either if either else 1)
    radius = int(np.ceil(tolerance * np.hypot(height, width)))
    if not edges[0] or not edges[1]:
        expected = float(not edges[0] and not edges[1])
    else:
        p, r = share_near(edges[0], edges[1], radius), share_near(edges[1], edges[0], radius)
        expected = 2 * p * r / (p + r) if p + r else 0
    assert boundary_accuracy(predicted, truth, tolerance) == pytest.approx(expected)


def test_a_video_leaves_out_its_first_frame_and_what_is_unknown() -> None:
    truth = np.zeros((3, 10, 10), np.uint8)
    truth[:, 2:6, 2:6] = 1
    truth[2, 2:6, 5] = 255
    predicted = truth.copy()
    predicted[0] = 0
    predicted[2, 2:6, 5] = 1
    assert video_scores(list(predicted), list(truth), [1]) == (1, 1, 1)
    predicted[1] = 0
    scores = video_scores(list(predicted), list(truth), [1])
    assert (scores.j, scores.f, scores.jf) == (0.5, 0.5, 0.5)
