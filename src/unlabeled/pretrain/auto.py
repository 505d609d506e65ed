"""The recipe `auto`: what the data and the machine ask for, with a reason for each choice."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import numpy as np
import torch

from unlabeled.images.decode import BadImage, decode
from unlabeled.images.sources import Source
from unlabeled.pretrain.crops import CropRecipe
from unlabeled.pretrain.method import Network, is_packed
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import (
    ALL_FIELDS,
    HeadRecipe,
    ModelRecipe,
    OptimizerRecipe,
    Recipe,
    RunRecipe,
    TeacherRecipe,
    check,
    with_fields,
)
from unlabeled.pretrain.targets import AT_ONCE

SHORT_RUN = 20_000  # steps under which LayerScale and teacher start as small_images has them
PASSES = 20  # over the images, if they are neither few nor many
FEWEST_STEPS = 1000
SMALL_BATCH = 64  # images a step of small_images, and what its learning rate is given for
LARGEST_BATCH = 128  # images a device that auto goes to by itself
# Values kept for the backward pass of one token in one block, over the width: measured 2.5 GB for 16 images of
# ViT-S/14 with 2 x 224 crops in float32.
KEPT = 16.5
SPARE = 1.25  # what allocators lose between the tensors: 5.3 GB measured where the tensors sum to 4.5


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
    """For small crops and short runs: a small backbone that starts to learn at once.

    Against the ImageNet recipes: LayerScale starts at 1 and the teacher follows faster, for a run of a thousand steps
    cannot wait for either; prototypes are few, since a batch of some hundred crops cannot tell thousands apart; the
    narrow bottleneck and the low temperatures make targets that say something from the first step on. The position
    embedding starts as sines, since learning where a patch is takes a thousand steps. (benchmarks/README.md has what
    each brought.)

    Args:
        side: short side of the images, pixels.
    """
    size, patch = (32, 8) if side < 48 else (48, 8) if side <= 64 else (64, 8) if side <= 96 else (96, 16)
    return Recipe(
        name="small_images",
        model=ModelRecipe(size="vit_tiny", depth=4, patch_size=patch, layer_scale=1.0, positions="sine"),
        head=HeadRecipe(
            num_prototypes=256, bottleneck=32, hidden=512, ibot_num_prototypes=256, ibot_bottleneck=32
        ),
        teacher=TeacherRecipe(momentum=0.98, temperature=0.02, final_temperature=0.03),
        optimizer=OptimizerRecipe(
            lr=5e-4,
            reference_batch=SMALL_BATCH,
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
            blur_sigma=(0.1, size / 48),
        ),
        run=RunRecipe(steps=2000, batch_size=SMALL_BATCH),
    )


def choose(
    source: Source, parallel: Parallel, values: dict[str, Any], has_weights: bool = False
) -> tuple[Recipe, list[str]]:
    """A recipe for this data on this machine.

    Args:
        source: the images.
        parallel: device and ranks.
        values: the user's own fields; a given run.steps or run.batch_size is what the rest is fitted to.
        has_weights: the backbone is given, so that there is nothing to say about it.

    Returns:
        The recipe, and a line for each choice with its reason.
    """
    count, side = len(source), median_side(source)
    on_gpu = parallel.device.type == "cuda"
    images = f"{count} image{'s' * (count > 1)}"
    reasons = [f"{images}, median short side {side} pixels, on {parallel.device} x {parallel.world}"]
    recipe = _photographs(count) if on_gpu and side > 96 else small_images(side)
    asked = _asked(recipe, values)
    if "model.patch_size" in values and asked.model.patch_size > 0:
        recipe = dataclasses.replace(recipe, crops=recipe.crops.fitted(asked.model.patch_size))
    # Weights, or a teacher, bring a patch that the crops are fitted to later.
    early = {name: value for name, value in values.items() if not name.startswith("crops.")}
    check(_asked(recipe, early if has_weights or "teacher.model" in values else values), "the command line")
    asked = _asked(recipe, values)
    if not has_weights and recipe.name == "photographs":
        reasons.append(f"{_shape(asked)}: a GPU and photographs")
    elif not has_weights:
        pixels = f"this many pixels are what a {parallel.device.type} is good for"
        reasons.append(f"{_shape(asked)}: {'images are no larger' if side <= 96 else pixels}")
    packed = is_packed(asked, parallel.device)
    in_one_pass = images_that_fit(asked, device_memory(parallel.device), packed)
    fits = in_one_pass
    if packed and asked.run.packed == "auto":  # more images are worth more than one pass
        fits = images_that_fit(asked, device_memory(parallel.device), packed=False)
    each = recipe.run.batch_size / parallel.world  # the same number on every rank
    automatic = parallel.world * (
        min(fits, LARGEST_BATCH) if recipe.name == "photographs" else math.ceil(each)
    )
    batch = asked.run.batch_size if "run.batch_size" in values else automatic
    accumulation = math.ceil(batch / parallel.world / fits)
    wanted = math.ceil(PASSES * count / batch)
    most = 125_000 if on_gpu else 5000
    default = min(max(FEWEST_STEPS, wanted), most)
    steps = asked.run.steps if "run.steps" in values else default
    if "run.steps" in values:
        why = "as asked"
    else:
        why = f"{steps * batch / count:.1f} passes over the images, {_why_so_many(steps, wanted, parallel.device.type)}"
    reasons.append(f"{steps} steps of {batch} images: {why}")
    memory = f"{device_memory(parallel.device) / 1e9:.0f} GB hold {fits} images"
    reasons.append(
        f"batch {batch} in {accumulation} part{'s' if accumulation > 1 else ''} a device: {memory}"
    )
    if recipe.name == "photographs" and steps < SHORT_RUN and not has_weights:
        recipe = dataclasses.replace(
            recipe,
            model=dataclasses.replace(recipe.model, layer_scale=0.1),
            teacher=dataclasses.replace(recipe.teacher, momentum=0.98),
        )
        reasons.append(f"LayerScale starts at 0.1: fewer than {SHORT_RUN} steps cannot wait for it")
    asked = _asked(recipe, values)
    teacher, optimizer = asked.teacher, asked.optimizer
    why = "short" if steps < SHORT_RUN else "long"
    reasons += [
        f"{asked.head.num_prototypes} prototypes: {_why_prototypes(recipe, asked, count, batch)}",
        f"teacher momentum from {teacher.momentum}, as for a {why} run; warm-up of the learning rate over "
        f"{optimizer.warmup:.0%} of it, of the teacher's temperature over {teacher.temperature_warmup:.0%}",
    ]
    run = dataclasses.replace(recipe.run, steps=steps, batch_size=batch, accumulation=accumulation)
    if packed and math.ceil(batch / parallel.world / accumulation) > in_one_pass:
        run = dataclasses.replace(run, packed=False)
        reasons.append(
            f"global and local crops in a pass each: in one, memory would hold {in_one_pass} images"
        )
    return dataclasses.replace(recipe, name="auto", run=run), reasons


def _photographs(count: int) -> Recipe:
    """ViT-S/14 as the papers train it, its prototypes from the number of images."""
    prototypes = 65536 if count >= 1_000_000 else 16384 if count >= 100_000 else 4096
    return Recipe(
        name="photographs",
        model=ModelRecipe(size="vit_small", drop_path=0.1),
        head=HeadRecipe(num_prototypes=prototypes, ibot_num_prototypes=prototypes),
        optimizer=OptimizerRecipe(layer_decay=0.9),
    )


def _asked(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with the user's own fields, not yet checked."""
    return with_fields(recipe, values, "the command line", ALL_FIELDS)


def _why_so_many(steps: int, wanted: int, device: str) -> str:
    if steps > wanted:
        return f"as fewer than {FEWEST_STEPS} steps teach little"
    return "as is usual" if steps == wanted else f"as many as a {device} is given; --steps takes more"


def _why_prototypes(recipe: Recipe, asked: Recipe, count: int, batch: int) -> str:
    if asked.head.num_prototypes != recipe.head.num_prototypes:
        return "as asked"
    return (
        f"for {count} images" if recipe.name == "photographs" else f"a batch of {batch} tells no more apart"
    )


def _shape(recipe: Recipe) -> str:
    config, size = recipe.vit_config(), recipe.crops.global_size
    return f"{config.depth} blocks of width {config.width}, {size}-pixel crops, patch {config.patch_size}"


def device_memory(device: torch.device) -> float:
    """Bytes of memory of a device, all of it; the machine's for a CPU and for MPS."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def images_that_fit(recipe: Recipe, memory: float, packed: bool) -> int:
    """How many images of a step a device has memory for, at least 1.

    Counted are weights, gradients, moments and teacher; what the backward pass of the global crops keeps, or of all
    crops if they are packed; the teacher's logits of the masked patches and a copy, of no more than are held at once.
    A fifth of the memory is left alone.

    Args:
        recipe: of the run.
        memory: bytes.
        packed: whether the student sees all crops in one pass.
    """
    config, crops = recipe.vit_config(), recipe.crops
    with torch.device("meta"):
        network = Network(recipe, drop_path=0.0)
    fixed = 5 * 4 * sum(parameter.numel() for parameter in network.parameters())
    patches = (crops.global_size // config.patch_size) ** 2
    tokens = crops.num_globals * (1 + config.num_registers + patches)
    local = crops.num_locals * (1 + config.num_registers + (crops.local_size // config.patch_size) ** 2)
    tokens = tokens + local if packed else max(tokens, local)
    kept = 4 * KEPT * config.width * (2 if recipe.run.checkpoint_blocks else config.depth) * tokens
    masked = crops.num_globals * patches * recipe.loss.mask_probability * sum(recipe.loss.mask_ratio) / 2
    targets = 2 * 4 * masked * recipe.num_ibot_prototypes() if recipe.loss.ibot else 0.0
    left = 0.8 * memory / SPARE - fixed
    return max(1, int(max(left // (kept + targets), (left - 2 * 4 * AT_ONCE) // kept)))


def median_side(source: Source, count: int = 32) -> int:
    """Median short side in pixels of some readable images, evenly spaced over the source."""
    sides = []
    for index in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int):
        try:
            sides.append(min(decode(source.read(int(index)).data).shape[:2]))
        except (BadImage, OSError):
            continue
    return int(np.median(sides)) if sides else 224
