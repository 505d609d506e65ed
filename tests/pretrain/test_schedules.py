"""Schedules at their ends, in the middle, and as fractions of any run."""

import math

import pytest

from unlabeled.pretrain.recipe import override
from unlabeled.pretrain.recipes import named_recipe
from unlabeled.pretrain.schedules import cosine, cosine_warmup, linear_warmup, values_at


def test_ends_are_exact() -> None:
    assert cosine(0, 100, 0.04, 0.4) == 0.04
    assert cosine(99, 100, 0.04, 0.4) == 0.4
    assert cosine(500, 100, 0.04, 0.4) == 0.4
    assert cosine(0, 1, 3.0, 1.0) == 3.0
    assert linear_warmup(0, 10, 1.0, 2.0) == 1.0
    assert linear_warmup(10, 10, 1.0, 2.0) == 2.0
    assert linear_warmup(0, 0, 1.0, 2.0) == 2.0
    assert cosine_warmup(0, 100, 10, 0.0, 1.0, 0.1) == 0.0
    assert cosine_warmup(10, 100, 10, 0.0, 1.0, 0.1) == 1.0
    assert cosine_warmup(99, 100, 10, 0.0, 1.0, 0.1) == 0.1


@pytest.mark.parametrize("step", [1, 10, 33, 77])
def test_closed_forms(step: int) -> None:
    assert cosine(step, 101, 2.0, 1.0) == pytest.approx(1.0 + 0.5 * (1 + math.cos(math.pi * step / 100)))
    assert linear_warmup(step, 100, 4.0, 7.0) == pytest.approx(4.0 + 3.0 * step / 100)


@pytest.mark.parametrize("steps", [20, 500, 125_000])
def test_a_run_of_any_length_passes_through_every_phase(steps: int) -> None:
    recipe = override(named_recipe("vitl16_short"), {"run.steps": steps}, "test")
    first, last = values_at(recipe, 0), values_at(recipe, steps - 1)
    assert first.lr == 0
    assert last.lr == pytest.approx(1e-6)
    assert values_at(recipe, round(0.1 * steps)).lr == pytest.approx(4e-3 * math.sqrt(2048 / 1024))
    assert (first.weight_decay, last.weight_decay) == (0.04, 0.4)
    assert (first.teacher_momentum, last.teacher_momentum) == (0.992, 1.0)
    assert first.teacher_temperature == 0.04
    assert values_at(recipe, round(0.3 * steps)).teacher_temperature == 0.07
    frozen = round(0.01 * steps)
    assert all(values_at(recipe, step).last_layer_lr == 0 for step in range(frozen))
    assert values_at(recipe, steps - 1).backbone_lr == last.lr
    held = override(recipe, {"optimizer.freeze_backbone": 0.25}, "test")
    for step in range(steps) if steps < 1000 else (0, steps // 5, steps // 3, steps - 1):
        values = values_at(held, step)
        assert values.backbone_lr == (0 if step < round(0.25 * steps) else values.lr)
    assert values_at(recipe, frozen + 1).last_layer_lr == values_at(recipe, frozen + 1).lr > 0
