"""Schedules as pure functions of the step; every length is given in steps, every value is exact at the ends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from unlabeled.pretrain.recipe import Recipe


class StepValues(NamedTuple):
    """What the schedules say at one step."""

    lr: float
    last_layer_lr: float
    backbone_lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step total - 1 (and beyond)."""
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total - 1))))
    return share * start + (1 - share) * end


def linear_warmup(step: int, warmup: int, start: float, end: float) -> float:
    """Linear from `start` at step 0 to `end` at step `warmup` and beyond."""
    return end if step >= warmup else start + (end - start) * step / warmup


def cosine_warmup(step: int, total: int, warmup: int, start: float, peak: float, end: float) -> float:
    """Linear from `start` at step 0 to `peak` at step `warmup`, then half a cosine to `end` at step total - 1."""
    if step < warmup:
        return linear_warmup(step, warmup, start, peak)
    return cosine(step - warmup, total - warmup, peak, end)


def values_at(recipe: Recipe, step: int) -> StepValues:
    """All schedules at a step; lengths are the recipe's fractions of its run (DINOv2 appendix B)."""
    total, optimizer, teacher = recipe.run.steps, recipe.optimizer, recipe.teacher
    warmup = round(optimizer.warmup * total)
    lr = cosine_warmup(step, total, warmup, 0.0, recipe.peak_lr(), optimizer.final_lr)
    return StepValues(
        lr=lr,
        last_layer_lr=0.0 if step < round(optimizer.freeze_last_layer * total) else lr,
        backbone_lr=0.0 if step < round(optimizer.freeze_backbone * total) else lr,
        weight_decay=cosine(step, total, optimizer.weight_decay, optimizer.final_weight_decay),
        teacher_momentum=cosine(step, total, teacher.momentum, teacher.final_momentum),
        teacher_temperature=linear_warmup(
            step, round(teacher.temperature_warmup * total), teacher.temperature, teacher.final_temperature
        ),
    )
