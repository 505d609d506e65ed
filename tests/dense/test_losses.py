"""Losses and their gradients against plain loops in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlabeled.dense.losses import depth_loss, segmentation_loss, valid_depth


def loop_depth_loss(predicted: Tensor, depth: Tensor, max_depth: float) -> Tensor:
    """One image's worth of loops; every operation is on a scalar."""
    B, _, H, W = depth.shape

    def ok(b: int, y: int, x: int) -> bool:
        value = depth[b, 0, y, x].item()
        return math.isfinite(value) and 0 < value <= max_depth

    def error(b: int, y: int, x: int) -> Tensor:
        return torch.log(predicted[b, 0, y, x] + 0.001) - torch.log(depth[b, 0, y, x] + 0.001)

    places = [(b, y, x) for b in range(B) for y in range(H) for x in range(W)]
    errors = [error(*place) for place in places if ok(*place)]
    if not errors:
        return predicted.sum() * 0
    mean = sum(errors) / len(errors)
    variance = sum((one - mean) ** 2 for one in errors) / max(len(errors) - 1, 1)
    loss = torch.sqrt(variance + 0.15 * mean**2)
    for stride in (1, 2, 4, 8):
        total, count = predicted.new_zeros(()), 0
        for b, y, x in places:
            if y % stride or x % stride:
                continue
            count += ok(b, y, x)
            for there in ((b, y + 2 * stride, x), (b, y, x + 2 * stride)):
                if there[1] < H and there[2] < W and ok(b, y, x) and ok(*there):
                    total = total + (error(b, y, x) - error(*there)).abs()
        loss = loss + 0.5 * total / max(count, 1)
    return loss


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2), st.integers(1, 11), st.integers(1, 11), st.integers(0, 5))
def test_depth_loss_and_gradient(B: int, H: int, W: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    depth = torch.rand(B, 1, H, W, generator=generator, dtype=torch.float64) * 12
    holes = torch.rand(B, 1, H, W, generator=generator)
    for value, low in ((0.0, 0.0), (float("nan"), 0.1), (float("inf"), 0.2), (-1.0, 0.3)):
        depth[(holes >= low) & (holes < low + 0.1)] = value
    predicted = torch.rand(B, 1, H, W, generator=generator, dtype=torch.float64) * 10 + 0.1
    gradients, losses = [], []
    for function in (depth_loss, loop_depth_loss):
        # float32 is what training sees; the loops stay in float64.
        leaf = predicted.float() if function is depth_loss else predicted.clone()
        leaf.requires_grad_()
        loss = function(leaf, depth.float() if function is depth_loss else depth, 10.0)
        loss.backward()
        losses.append(loss.item())
        gradients.append(leaf.grad.double())
    # One valid pixel, or all errors the same: the square root's slope at 0 is not defined.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=2e-6)
    assert torch.isfinite(gradients[0]).all()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-3, atol=1e-5)


def test_nothing_valid_is_zero_without_nan() -> None:
    for depth in (torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), float("nan"))):
        predicted = torch.ones(1, 1, 2, 2, requires_grad=True)
        loss = depth_loss(predicted, depth)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=2e-6)
        assert predicted.grad.abs().max() == 0


def test_a_perfect_prediction_has_a_finite_gradient() -> None:
    depth = torch.rand(1, 1, 6, 6) + 1
    predicted = depth.clone().requires_grad_()
    depth_loss(predicted, depth).backward()
    assert torch.isfinite(predicted.grad).all()


def test_scale_costs_little() -> None:
    """A tenth too much everywhere costs sqrt(0.15) of what it would as a root mean square."""
    depth = torch.rand(1, 1, 8, 8) + 1
    found = depth_loss(1.1 * depth, depth, gradient_weight=0).item()
    assert found == pytest.approx(math.sqrt(0.15) * math.log(1.1), rel=1e-2)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5), st.integers(2, 4), st.integers(0, 5))
def test_segmentation_loss_and_gradient(B: int, H: int, W: int, C: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, (B, H, W))
    labels[rng.random((B, H, W)) < 0.3] = 9
    logits = torch.from_numpy(rng.normal(size=(B, C, H, W)))
    leaf = logits.float().requires_grad_()
    loss = segmentation_loss(leaf, torch.from_numpy(labels), ignore=9)
    loss.backward()
    kept = [(b, y, x) for b in range(B) for y in range(H) for x in range(W) if labels[b, y, x] != 9]
    total, gradient = 0.0, np.zeros(logits.shape)
    for b, y, x in kept:
        row = logits[b, :, y, x].numpy()
        exponentials = np.exp(row)
        total -= math.log(exponentials[labels[b, y, x]] / exponentials.sum())
        gradient[b, :, y, x] = exponentials / exponentials.sum()
        gradient[b, labels[b, y, x], y, x] -= 1
    assert loss.item() == pytest.approx(total / max(len(kept), 1), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(leaf.grad.numpy(), gradient / max(len(kept), 1), rtol=1e-3, atol=1e-5)


def test_small_logits_are_resized_to_the_labels() -> None:
    logits = torch.zeros(1, 2, 1, 1)
    logits[0, 1] = 50
    assert segmentation_loss(logits, torch.ones(1, 7, 9, dtype=torch.long)).item() == pytest.approx(0)


def test_valid_depth() -> None:
    depth = torch.tensor([0.0, -1, 1, 10, 11, float("nan"), float("inf")])
    assert valid_depth(depth, 10).tolist() == [False, False, True, True, False, False, False]
    assert valid_depth(depth).tolist() == [False, False, True, True, True, False, False]
