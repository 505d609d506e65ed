"""The figures of a run's health, and when they are called out."""

import math
from typing import Any

import pytest
import torch

from unlabeled.pretrain.health import CollapseWatch, figures
from unlabeled.pretrain.parallel import Parallel


def test_figures_are_their_formulas() -> None:
    targets = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75], [0, 0, 0.25, 0.75]])
    found = figures(targets, torch.eye(4), Parallel())
    one, two, three = 0.0, math.log(2), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert found["teacher_entropy"] == pytest.approx((one + two + 2 * three) / 4)
    marginal = (0.375, 0.125, 0.125, 0.375)
    assert found["target_entropy"] == pytest.approx(-sum(share * math.log(share) for share in marginal))
    assert found["prototypes_used"] == 2 / 4  # the first and the fourth are the most likely of some crop
    assert found["rankme"] == pytest.approx(4, rel=1e-5)
    few = figures(targets[:2], torch.ones(2, 8), Parallel())
    assert few["prototypes_used"] == 1 / 2  # two crops reach two prototypes at most
    assert few["rankme"] == pytest.approx(1, rel=1e-4)


def test_features_that_are_not_finite_have_no_rank() -> None:
    broken = torch.full((4, 8), torch.nan)
    assert math.isnan(figures(broken, broken, Parallel())["rankme"])
    assert CollapseWatch(8).check(figures(broken, broken, Parallel())) == []


@pytest.mark.parametrize(
    ("sign", "words"),
    [({"teacher_entropy": math.log(64)}, "uniform"), ({"target_entropy": 0.01}, "same target"),
     ({"rankme": 1.2}, "one direction")],
)  # fmt: skip
def test_collapse_is_said_each_time_it_starts(sign: dict[str, Any], words: str) -> None:
    watch, healthy = CollapseWatch(64), {"teacher_entropy": 2.0, "target_entropy": 3.5, "rankme": 12.0}
    assert watch.check(healthy) == []
    (text,) = watch.check(healthy | sign)
    assert words in text
    assert watch.check(healthy | sign) == []
    assert watch.check(healthy) == []
    assert len(watch.check(healthy | sign)) == 1
