"""The copy detector's loss against plain loops in float64, gradients included."""

import numpy as np
import pytest
import torch

from unlabeled.curate.contrastive import contrastive_loss, detector_loss


def plain_contrastive(z: np.ndarray, shows: np.ndarray, temperature: float) -> float:
    """The formula, pair by pair."""
    unit = [row / np.sqrt((row * row).sum()) for row in z]
    shares = [[bool((a & b).any()) for b in shows] for a in shows]
    means = []
    for i in range(len(z)):
        terms = []
        wrong = sum(np.exp(unit[i] @ unit[n] / temperature) for n in range(len(z)) if not shares[i][n])
        for p in range(len(z)):
            if p != i and shares[i][p]:
                own = np.exp(unit[i] @ unit[p] / temperature)
                terms.append(-np.log(own / (own + wrong)))
        if terms:
            means.append(sum(terms) / len(terms))
    return float(np.mean(means))


def plain_entropy(z: np.ndarray, shows: np.ndarray) -> float:
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    logs = []
    for i in range(len(z)):
        others = [n for n in range(len(z)) if not (shows[i] & shows[n]).any()]
        logs.append(np.log(min(np.linalg.norm(unit[i] - unit[n]) for n in others) + 1e-8))
    return float(-np.mean(logs))


def two_views(images: int, collages: bool) -> np.ndarray:
    shows = np.concatenate((np.eye(images, dtype=bool),) * 2)
    if collages:
        shows[images, 1] = shows[images + 2, 0] = True
    return shows


def numeric_gradient(function: object, z: np.ndarray) -> np.ndarray:
    gradient = np.empty_like(z)
    for place in np.ndindex(*z.shape):
        ends = []
        for step in (1e-6, -1e-6):
            moved = z.copy()
            moved[place] += step
            ends.append(function(moved))  # type: ignore[operator]
        gradient[place] = (ends[0] - ends[1]) / 2e-6
    return gradient


@pytest.mark.parametrize("collages", [False, True])
def test_loss_and_gradient_are_the_formulas(collages: bool) -> None:
    shows = two_views(4, collages)
    z = np.random.default_rng(0).standard_normal((8, 5))
    tensor = torch.tensor(z, requires_grad=True)
    found = detector_loss(tensor, torch.from_numpy(shows), temperature=0.2, entropy_weight=0.7)
    assert found["contrastive"].item() == pytest.approx(plain_contrastive(z, shows, 0.2), rel=1e-12)
    assert found["koleo"].item() == pytest.approx(plain_entropy(z, shows), rel=1e-9)
    (gradient,) = torch.autograd.grad(found["loss"], tensor)
    expected = numeric_gradient(
        lambda moved: plain_contrastive(moved, shows, 0.2) + 0.7 * plain_entropy(moved, shows), z
    )
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-7)


def test_of_two_views_each_it_is_nt_xent() -> None:
    z = torch.nn.functional.normalize(torch.randn(12, 7, dtype=torch.float64), dim=1)
    shows = torch.from_numpy(two_views(6, False))
    logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
    targets = torch.arange(12).roll(6)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    shares = shows.float() @ shows.float().T > 0
    torch.testing.assert_close(contrastive_loss(z, shares, 0.1), expected)


def test_a_batch_of_one_image_alone_has_no_loss_and_a_finite_gradient() -> None:
    z = torch.randn(4, 3, requires_grad=True)
    found = contrastive_loss(z, torch.ones(4, 4, dtype=torch.bool), 0.05)
    found.backward()
    assert found.item() == 0 and z.grad is not None and torch.isfinite(z.grad).all()
