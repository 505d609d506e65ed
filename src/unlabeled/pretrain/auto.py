"""The recipe `auto`: what the data and the machine ask for, with a reason for each choice."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from unlabeled.images.decode import BadImage, decode
from unlabeled.images.sources import Source
from unlabeled.pretrain.crops import CropRecipe
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import (
    HeadRecipe,
    ModelRecipe,
    OptimizerRecipe,
    Recipe,
    RunRecipe,
    TeacherRecipe,
)


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


def small_images(side: int) -> Recipe:
    """For images of up to 96 pixels a side, and short runs: a small backbone that starts to learn at once.

    Against the ImageNet recipes: LayerScale starts at 1 and the teacher follows faster, for a run of a thousand steps
    cannot wait for either; prototypes are few, since a batch of some hundred crops cannot tell thousands apart.
    """
    size = 32 if side < 48 else 48 if side <= 64 else 64
    patch = 4 if size == 32 else 8
    return Recipe(
        name="small_images",
        model=ModelRecipe(size="vit_tiny", depth=4, patch_size=patch, layer_scale=1.0),
        head=HeadRecipe(
            num_prototypes=512, bottleneck=32, hidden=512, ibot_num_prototypes=512, ibot_bottleneck=32
        ),
        teacher=TeacherRecipe(momentum=0.98, temperature=0.02, final_temperature=0.03),
        optimizer=OptimizerRecipe(
            lr=2e-3,
            scaling="none",
            patch_embed_multiplier=1.0,
            final_weight_decay=0.1,
            freeze_last_layer=0.01,
        ),
        crops=CropRecipe(
            global_size=size,
            local_size=size // 2,
            num_locals=2,
            global_scale=(0.4, 1.0),
            local_scale=(0.1, 0.4),
            blur_sigma=(0.1, 1.0),
        ),
        run=RunRecipe(steps=2000, batch_size=64),
    )


def choose(source: Source, parallel: Parallel, values: dict[str, Any]) -> tuple[Recipe, list[str]]:
    """A recipe for this data on this machine."""
    side = median_side(source)
    return small_images(side), [f"{len(source)} images, median short side {side} pixels"]


def median_side(source: Source, count: int = 32) -> int:
    """Median short side in pixels of some readable images, evenly spaced over the source."""
    sides = []
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int):
        try:
            sides.append(min(decode(source.read(int(index)).data).shape[:2]))
        except (BadImage, OSError):
            continue
    return int(np.median(sides)) if sides else 224
