"""What the schedules of a pretraining run say at each of its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from unlabeled.schedules import cosine, cosine_warmup, linear_warmup

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
