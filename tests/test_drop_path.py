"""Drop path of a group of samples, and of several that are packed."""

import math

import pytest
import torch
from torch import Tensor

from tests.test_vit import TINY, randomised
from unlabeled.drop_path import add_branch, draw
from unlabeled.packing import Shapes, cut, joined


@pytest.mark.parametrize(("B", "rate"), [(8, 0.3), (5, 0.9), (1, 0.4), (7, 0.5), (10, 0.99)])
@pytest.mark.parametrize("others", [(), ((4, 2),)])
def test_subset_drop_path(B: int, rate: float, others: Shapes) -> None:
    """Of each group exactly so many samples are kept, each as often as any other, and the rest are not computed."""
    torch.manual_seed(0)
    shapes = ((B, 3), *others)
    x = joined([torch.randn(*shape, 4) for shape in shapes]).requires_grad_()
    counts = [max(1, int(B * (1 - rate))) for B, _ in shapes]
    expected_shapes = tuple((n, T) for n, (_, T) in zip(counts, shapes, strict=True))
    totals = [torch.zeros(B) for B, _ in shapes]
    rounds = 400
    for kept in draw(rate, rounds, shapes, x):
        seen: list[Shapes] = []

        def branch(subset: Tensor, of_subset: Shapes, seen: list[Shapes] = seen) -> Tensor:
            seen.append(of_subset)
            assert subset.numel() == 4 * sum(n * T for n, T in of_subset)
            return 2 * subset

        out = add_branch(x, branch, shapes, kept)
        assert seen == [expected_shapes]
        for group, ratio, total, n in zip(
            cut(x, shapes), cut((out / x).detach(), shapes), totals, counts, strict=True
        ):
            is_kept = ratio[:, 0, 0] > 1.5
            total += is_kept
            expected = torch.where(is_kept, 1 + 2 * len(group) / n, 1.0)[:, None, None].expand_as(group)
            torch.testing.assert_close(ratio, expected, atol=1e-4, rtol=1e-4)
            assert is_kept.sum() == n
    for total, n in zip(totals, counts, strict=True):
        share = n / len(total)
        error = (total / rounds - share).abs().max()
        assert error < 5 * math.sqrt(share * (1 - share) / rounds) + 1e-6
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, (out / x).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("others", [(), ((4000, 3),)])
def test_per_sample_drop_path(others: Shapes) -> None:
    torch.manual_seed(0)
    shapes = ((20_000, 2), *others)
    x = joined([torch.ones(*shape, 3) for shape in shapes])
    (kept,) = draw(0.1, 1, shapes, x)
    dropped = add_branch(x, lambda x, _: x, shapes, kept) - 1
    for group in cut(dropped, shapes):
        assert group.unique().tolist() == [0.0, pytest.approx(1 / 0.9)]
        assert torch.equal(group[:, 0, 0], group[:, -1, 2])
        assert group.mean().item() == pytest.approx(1, abs=5 / 3 / math.sqrt(len(group)))  # 5 standard errors


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_branches_are_drawn_apart_and_groups_as_if_alone(rate: float) -> None:
    shapes = ((6, 5), (9, 2))
    x = torch.randn(48, 3)
    torch.manual_seed(1)
    packed = draw(rate, 50, shapes, x)
    torch.manual_seed(1)
    alone = [draw(rate, 50, (shape,), group) for shape, group in zip(shapes, cut(x, shapes), strict=True)]
    different = set()
    for of_all, *of_each in zip(packed, *alone, strict=True):
        out = add_branch(x, lambda x, _: 2 * x, shapes, of_all)
        for one, group, expected, shape in zip(
            cut(out, shapes), cut(x, shapes), of_each, shapes, strict=True
        ):
            assert torch.equal(one, add_branch(group, lambda x, _: 2 * x, (shape,), expected))
        different.add(tuple((out / x)[:, 0].round().tolist()))
    assert len(different) > 15  # of 50


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_drop_path_is_for_training_only(rate: float) -> None:
    images = torch.randn(6, 3, 32, 32)
    plain, model = randomised(TINY), randomised(TINY, drop_path=rate)
    assert torch.equal(plain(images).cls, model(images).cls)
    model.train()
    different = [not torch.equal(plain(images).cls, model(images).cls) for _ in range(3)]
    assert any(different) == (rate > 0)
    layers = [model.intermediate_layers(images, [0])[0].cls for _ in range(4)]
    assert any(not torch.equal(layers[0], layer) for layer in layers) == (rate > 0)


def test_drop_path_keeps_the_expectation_of_one_block() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 24)
    shapes = ((4, 5),)
    block = randomised(TINY).blocks[0]
    block.mlp_branch = lambda x, shapes: torch.zeros_like(x)
    exact = block(x)
    for rate in (0.1, 0.25, 0.5):
        drawn = draw(rate, 1000, shapes, x)
        with torch.no_grad():
            samples = torch.stack(
                [block(x, shapes, pair) for pair in zip(drawn[::2], drawn[1::2], strict=True)]
            )
        error = (samples.mean(0) - exact).abs()
        assert (error < 6 * samples.std(0) / math.sqrt(500) + 1e-6).all()
