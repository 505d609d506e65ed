"""What a training reads: tokens of a frozen backbone that are computed once, or images for each step anew.

Shape suffixes: B images, H W pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from unlabeled.dense.inference import Head
from unlabeled.devices import has_bf16
from unlabeled.features.engines import weights_hash
from unlabeled.finetune.backbone import reader
from unlabeled.finetune.batches import Group, Report, all_batches, training_batches
from unlabeled.finetune.cache import CacheTooLarge, TokenCache, cached
from unlabeled.finetune.examples import Examples
from unlabeled.finetune.recipe import TrainRecipe
from unlabeled.images.decode import BadImage
from unlabeled.vit import Tokens, VisionTransformer

STANDARDISED_ON = 2048  # examples, at most
JUDGED_AT_ONCE = 256  # cached examples of validation


class Frozen:
    """The tokens that a head reads of uint8 images, without gradients."""

    def __init__(self, model: VisionTransformer, head: Head, device: torch.device) -> None:
        self.device, self.bf16 = device, device.type != "mps" and has_bf16(device)
        self.read = reader(model, head, device, self.bf16)

    def __call__(self, images_B3HW: Tensor) -> list[Tokens]:
        """Return tokens in float32 on the CPU, or in bf16 where that is fast."""
        with self.autocast():
            return self.read(images_B3HW)

    def autocast(self) -> torch.autocast:
        """Return the context in which tokens are computed."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @property
    def batch(self) -> int:
        """Images at once where nothing is learned."""
        return 32 if self.device.type == "cpu" else 128


@dataclass(frozen=True)
class Feed:
    """What is learned from, and what is judged on.

    Attributes:
        recipe, frozen, report: of the training.
        examples, judged_on: images; judged_on is None where nothing is held out.
        tokens, judged_tokens: of the same, where they are cached.
    """

    recipe: TrainRecipe
    frozen: Frozen
    report: Report
    examples: Examples
    judged_on: Examples | None
    tokens: TokenCache | None = None
    judged_tokens: TokenCache | None = None

    def batches(self, start: int) -> Iterator[list[Group]]:
        """Give the batches of the steps from `start` on."""
        recipe = self.recipe
        if self.tokens is None:
            steps = range(start, recipe.steps)
            yield from training_batches(
                self.examples, recipe.batch_size, steps, recipe.seed, recipe.augment, self.report
            )
            return
        for step in range(start, recipe.steps):
            yield self._cached(self.tokens, step, recipe.batch_size)

    def judged(self) -> Iterable[Group]:
        """Return all examples to judge on."""
        if self.judged_tokens is not None:
            return self.judged_tokens.all_groups(JUDGED_AT_ONCE)
        assert self.judged_on is not None
        return all_batches(self.judged_on, self.frozen.batch, self.report)

    def sample(self) -> Iterator[list[Tokens]]:
        """Give tokens of some of the examples as in prediction."""
        batch = min(self.recipe.batch_size, STANDARDISED_ON)
        steps = range(math.ceil(min(len(self.examples), STANDARDISED_ON) / batch))
        if self.tokens is not None:
            for step in steps:
                for group in self._cached(self.tokens, step, batch):
                    yield cast("list[Tokens]", group.inputs)
            return
        seed = self.recipe.seed
        for groups in training_batches(self.examples, batch, steps, seed, False, lambda key, reason: None):
            for group in groups:
                yield self.frozen(cast(Tensor, group.inputs))

    def saved(self, steps: int, seconds: float) -> str:
        """Return what cached tokens saved, by the rate at which they were computed."""
        tokens = self.tokens
        if tokens is None or not steps:
            return ""
        rate = len(tokens) / tokens.seconds
        without = steps * self.recipe.batch_size / rate
        return (
            f"features of {len(tokens):,} images took {tokens.seconds:.1f} s ({tokens.size / 2**20:.1f} MB), "
            f"{steps:,} steps on them {seconds:.1f} s; computing them in each step would have added about "
            f"{without:.0f} s: {(without + seconds) / (tokens.seconds + seconds):.1f} times as long"
        )

    def _cached(self, tokens: TokenCache, step: int, batch: int) -> list[Group]:
        places = np.arange(step * batch, (step + 1) * batch)
        return tokens.groups(tokens.order(self.recipe.seed).indices(places))


def open_feed(
    model: VisionTransformer,
    head: Head,
    recipe: TrainRecipe,
    frozen: Frozen,
    examples: Examples,
    judged_on: Examples | None,
    folder: Path,
    report: Report,
    console: Console | None,
) -> Feed:
    """Return what a training reads, its tokens cached in a folder where the recipe has that and the disk has room."""
    plain = Feed(recipe, frozen, report, examples, judged_on)
    if not recipe.cached:
        return plain
    key = {"model": weights_hash(model), "layers": head.layers(len(model.blocks)), "norm": head.norm}

    def tokens_of(name: str, some: Examples, views: int) -> TokenCache | None:
        try:
            return cached(
                some,
                frozen,
                folder / name,
                key | {"images": len(some), "first": _first(some)},
                views=views,
                pooled_only=getattr(head, "pooled_only", False),
                seed=recipe.seed,
                report=report,
                console=console,
                batch_size=frozen.batch,
                dtype=recipe.cache_dtype,
            )
        except CacheTooLarge as error:
            if console:
                console.print(f"not cached: {error}", highlight=False)
            return None

    tokens = tokens_of("train", examples, recipe.views)
    judged_tokens = tokens_of("validation", judged_on, 1) if judged_on is not None else None
    return dataclasses.replace(plain, tokens=tokens, judged_tokens=judged_tokens)


def _first(examples: Examples) -> str:
    """Return a hash of the first example as it is prepared: other data, or other sizes, have another."""
    try:
        one = examples.load(0, None)
    except BadImage as error:
        return str(error)
    return hashlib.sha256(f"{one.key} {one.pixels.shape}".encode() + one.pixels.tobytes()).hexdigest()
