"""Targets against plain loops in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlabeled.pretrain import targets
from unlabeled.pretrain.targets import Assignment, Center, prototype_logits, sinkhorn_knopp, softmax_center


def plain_sinkhorn(logits: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    scores = logits.astype(np.float64) / temperature
    assignment = np.exp(scores - scores.max()).T
    assignment /= assignment.sum()
    num_prototypes, num_samples = assignment.shape
    for _ in range(iterations):
        for k in range(num_prototypes):
            assignment[k] /= assignment[k].sum() * num_prototypes
        for n in range(num_samples):
            assignment[:, n] /= assignment[:, n].sum() * num_samples
    return (assignment * num_samples).T


@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 12),
    prototypes=st.integers(1, 20),
    iterations=st.integers(1, 5),
    temperature=st.sampled_from([0.04, 0.07, 1.0]),
    seed=st.integers(0, 99),
)
def test_sinkhorn_is_the_plain_formula(
    samples: int, prototypes: int, iterations: int, temperature: float, seed: int
) -> None:
    logits = np.random.default_rng(seed).uniform(-1, 1, (samples, prototypes)).astype(np.float32)
    found = sinkhorn_knopp(torch.from_numpy(logits), temperature, iterations).numpy()
    np.testing.assert_allclose(found, plain_sinkhorn(logits, temperature, iterations), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("at_once", [2**27, 6 * 24])
def test_sinkhorn_stays_in_float32_under_autocast(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "AT_ONCE", at_once)  # all at once, and by parts
    generator = torch.Generator().manual_seed(0)
    tokens, prototypes = torch.randn(30, 8, generator=generator), torch.randn(24, 8, generator=generator)
    logits = prototype_logits(tokens, prototypes)
    expected = plain_sinkhorn(logits.numpy(), 2.0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for found in (sinkhorn_knopp(logits, 2.0), Assignment.by_sinkhorn(tokens, prototypes, 2.0, 3)[:]):
            np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_sinkhorn_survives_extreme_logits(scale: float) -> None:
    logits = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) * scale
    found = sinkhorn_knopp(logits, 0.04)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(1), torch.ones(8))


def test_sinkhorn_balances_the_prototypes() -> None:
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    found = sinkhorn_knopp(logits, 0.5, 50)
    torch.testing.assert_close(found.sum(0), torch.full((16,), 4.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.sum(1), torch.ones(64))


def test_sinkhorn_leaves_its_input_alone() -> None:
    logits = torch.randn(4, 6)
    before = logits.clone()
    sinkhorn_knopp(logits, 0.1)
    assert torch.equal(logits, before)


def test_softmax_center_is_the_plain_formula() -> None:
    rng = np.random.default_rng(0)
    logits, center = rng.normal(size=(5, 7)), rng.normal(size=7)
    shifted = np.exp((logits - center) / 0.04)
    expected = shifted / shifted.sum(1, keepdims=True)
    found = softmax_center(torch.from_numpy(logits), torch.from_numpy(center).float(), 0.04)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-7)


def test_center_is_a_running_mean() -> None:
    center, expected = Center(3, 0.9), np.zeros(3)
    for seed in range(4):
        logits = np.random.default_rng(seed).normal(size=(5 + seed, 3)).astype(np.float32)
        center.update(torch.from_numpy(logits))
        expected = 0.9 * expected + 0.1 * logits.mean(0)
    np.testing.assert_allclose(center.center.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("at_once", [2**27, 11 * 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sinkhorn", "center"])
def test_an_assignment_is_the_same_targets_made_later(
    kind: str, dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.nn.functional.normalize(torch.randn(17, 6, generator=generator), dim=1).to(dtype)
    prototypes = torch.nn.functional.normalize(torch.randn(11, 6, generator=generator), dim=1)
    logits = prototype_logits(tokens, prototypes)
    if kind == "sinkhorn":
        expected = sinkhorn_knopp(logits, 0.05)
        found = Assignment.by_sinkhorn(tokens, prototypes, 0.05, 3)
    else:
        center, same = Center(11), Center(11)
        center.center.normal_(std=0.1, generator=generator)
        same.center.copy_(center.center)
        expected = softmax_center(logits, center.center, 0.05)
        center.update(logits)
        found = Assignment.by_center(tokens, prototypes, 0.05, same)
        torch.testing.assert_close(center.center, same.center)
    torch.testing.assert_close(found[:], expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.cat([found[:5], found[5:6], found[6:]]), expected, rtol=1e-5, atol=1e-7)
    some = found.of(lambda rows: torch.cat((rows[3:5], rows[10:])))
    torch.testing.assert_close(some[:], torch.cat((expected[3:5], expected[10:])), rtol=1e-5, atol=1e-7)
