"""Losses against plain loops in float64, gradients included."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from unlabeled.pretrain import losses
from unlabeled.pretrain.targets import Assignment

TEMPERATURE = 0.1


def unit_rows(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def probabilities(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).softmax(-1)


def plain_cross_entropy(row: torch.Tensor, prototypes: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    logits = [(row * prototype).sum() / TEMPERATURE for prototype in prototypes]
    log_total = torch.stack([logit.exp() for logit in logits]).sum().log()
    return sum((-t * (logit - log_total) for t, logit in zip(target, logits, strict=True)), torch.zeros(()))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 7), prototypes=st.integers(1, 9), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_prototype_cross_entropy_is_the_plain_formula(
    rows: int, prototypes: int, width: int, seed: int
) -> None:
    z = unit_rows(rows, width, seed).requires_grad_()
    w = unit_rows(prototypes, width, seed + 1).requires_grad_()
    targets = probabilities(rows, prototypes, seed=seed) * 2  # rows need not sum to 1
    weights = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = sum(
        (weights[n] * plain_cross_entropy(z[n], w, targets[n]) for n in range(rows)), (z.sum() + w.sum()) * 0
    )
    gradients = torch.autograd.grad(3 * expected, (z, w))
    found = losses.prototype_cross_entropy(z, w, targets, weights, TEMPERATURE)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * found, (z, w)), gradients)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (
        unit_rows(50, 8, 0),
        unit_rows(20, 8, 1),
        probabilities(50, 20, seed=2),
        torch.ones(50),
        TEMPERATURE,
    )
    whole = losses.prototype_cross_entropy(*arguments)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 20 * 7)
    torch.testing.assert_close(losses.prototype_cross_entropy(*arguments), whole)


def test_gradients_pass_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 5 * 2)
    z, w = unit_rows(5, 3, 0).requires_grad_(), unit_rows(5, 3, 1).requires_grad_()
    targets, weights = probabilities(5, 5, seed=2), torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z, w: losses.prototype_cross_entropy(z, w, targets, weights, TEMPERATURE), (z, w)
    )


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        out = function(*arguments, **(options or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


def test_the_students_logits_never_exist_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 500 * 10)
    z = unit_rows(100, 16, 0).float().requires_grad_()
    w = unit_rows(500, 16, 1).float().requires_grad_()
    targets, weights = probabilities(100, 500, seed=2).float(), torch.ones(100)
    with LargestTensor() as mode:
        losses.prototype_cross_entropy(z, w, targets, weights, TEMPERATURE).backward()
    assert mode.largest <= max(500 * 16, 500 * 10)


def test_of_an_assignment_the_targets_never_exist_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 500 * 10)
    z, w = (unit_rows(rows, 16, rows).float().requires_grad_() for rows in (100, 500))
    targets = Assignment.by_sinkhorn(unit_rows(100, 16, 5).float(), unit_rows(500, 16, 6).float(), 0.05, 3)
    weights = torch.ones(100)
    with LargestTensor() as mode:
        found = losses.prototype_cross_entropy(z, w, targets, weights, TEMPERATURE)
    assert mode.largest <= max(500 * 16, 500 * 10)
    expected = losses.prototype_cross_entropy(z, w, targets[:], weights, TEMPERATURE)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (z, w)), torch.autograd.grad(expected, (z, w)))


@pytest.mark.parametrize("num_locals", [0, 1, 3])
def test_dino_loss_is_the_mean_over_all_pairs_but_the_same_crop(num_locals: int) -> None:
    images, prototypes, width = 3, 6, 4
    z_global = unit_rows(2 * images, width, 0).requires_grad_()
    z_local = unit_rows(num_locals * images, width, 1).requires_grad_()
    w = unit_rows(prototypes, width, 2).requires_grad_()
    targets = probabilities(2, images, prototypes, seed=3)
    terms = []
    for teacher in range(2):
        for student in range(2 + num_locals):
            if student == teacher:
                continue
            for image in range(images):
                z = (
                    z_global[student * images + image]
                    if student < 2
                    else z_local[(student - 2) * images + image]
                )
                terms.append(plain_cross_entropy(z, w, targets[teacher, image]))
    expected = torch.stack(terms).mean()
    pairs = 2 + 2 * num_locals
    found = losses.dino_loss_global(z_global, w, targets, TEMPERATURE, pairs, images)
    if num_locals:
        found = found + losses.dino_loss_local(z_local, w, targets, TEMPERATURE, pairs, images)
    torch.testing.assert_close(found, expected)
    inputs = (z_global, w, z_local) if num_locals else (z_global, w)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))


def test_ibot_weighs_each_image_alike_and_counts_every_crop() -> None:
    per_crop, num_crops = [3, 1, 2], 6  # three of the six global crops are masked
    rows = sum(per_crop)
    z, w, targets = unit_rows(rows, 4, 0), unit_rows(5, 4, 1), probabilities(rows, 5, seed=2)
    expected, row = 0.0, 0
    for count in per_crop:
        expected += (
            sum(float(plain_cross_entropy(z[row + i], w, targets[row + i])) for i in range(count)) / count
        )
        row += count
    weights = torch.tensor([1 / count for count in per_crop for _ in range(count)], dtype=torch.float64)
    found = losses.ibot_loss(z, w, targets, weights, num_crops, TEMPERATURE)
    assert float(found) == pytest.approx(expected / num_crops, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 9), width=st.integers(2, 6), seed=st.integers(0, 99))
def test_koleo_is_the_plain_formula(rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, width, dtype=torch.float64, generator=generator, requires_grad=True)
    unit = [row / row.square().sum().sqrt() for row in features]
    terms = []
    for i in range(rows):
        distances = [(unit[i] - unit[j]).square().sum().sqrt() for j in range(rows) if j != i]
        terms.append(-(min(distances, key=lambda distance: distance.item()) + 1e-8).log())
    expected = torch.stack(terms).mean()
    found = losses.koleo_loss(features)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, features), torch.autograd.grad(expected, features))


def test_koleo_of_equal_rows_is_finite_and_in_float32_under_autocast() -> None:
    features = torch.ones(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.koleo_loss(features)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(-math.log(1e-8), rel=1e-6)
    loss.backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert float(losses.koleo_loss(torch.randn(1, 8))) == 0
