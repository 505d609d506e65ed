"""The recipe `auto`: what the data and the machine ask for, with a reason for each choice."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from unlabeled.images.decode import BadImage, decode
from unlabeled.images.sources import Source
from unlabeled.pretrain.crops import CropRecipe
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import HeadRecipe, ModelRecipe, OptimizerRecipe, Recipe, RunRecipe, TeacherRecipe


def filled(recipe: Recipe) -> Recipe:
    """The recipe with the bookkeeping intervals that were left to the length of the run."""
    run = recipe.run
    return dataclasses.replace(
        recipe,
        run=dataclasses.replace(
            run,
            checkpoint_every=run.checkpoint_every or max(1, run.steps // 20),
            health_every=run.health_every or max(1, run.steps // 100),
            eval_every=run.eval_every or max(1, run.steps // 10),
        ),
    )


def choose(source: Source, parallel: Parallel, values: dict[str, Any]) -> tuple[Recipe, list[str]]:
    """A recipe for this data on this machine."""
    side = median_side(source)
    patch, size, local = (4, 32, 16) if side < 48 else (8, 64, 32) if side < 96 else (16, 128, 64)
    recipe = Recipe(
        name="auto",
        model=ModelRecipe(size="vit_tiny", patch_size=patch, depth=6),
        head=HeadRecipe(num_prototypes=2048, bottleneck=128, hidden=512),
        teacher=TeacherRecipe(momentum=0.99),
        optimizer=OptimizerRecipe(lr=2e-3, scaling="none", patch_embed_multiplier=1.0, final_weight_decay=0.1),
        crops=CropRecipe(global_size=size, local_size=local, num_locals=4),
        run=RunRecipe(steps=1000, batch_size=64),
    )
    return recipe, [f"{len(source)} images, median short side {side} pixels"]


def median_side(source: Source, count: int = 32) -> int:
    """Median short side in pixels of some readable images, evenly spaced over the source."""
    sides = []
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int):
        try:
            sides.append(min(decode(source.read(int(index)).data).shape[:2]))
        except (BadImage, OSError):
            continue
    return int(np.median(sides)) if sides else 224
