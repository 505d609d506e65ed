"""Distillation: a frozen teacher in the place of the student's own EMA (DINOv2 section 5).

Shape suffixes: B images, V views, N patch tokens, D width, K prototypes, M patches.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.errors import UserError
from unlabeled.features.extract import token_batches
from unlabeled.images.sources import Source
from unlabeled.images.transform import normalize
from unlabeled.pretrain.auto import SMALL_BATCH
from unlabeled.pretrain.method import Crops, Outputs
from unlabeled.pretrain.recipe import Recipe
from unlabeled.pretrain.start import Start
from unlabeled.vit import VisionTransformer


class FeaturePrototypes(nn.Module):
    """What stands for the head of a teacher that has none: cosines with the features of some images.

    Args:
        features_KD: one feature for each prototype; their mean is taken off, from them and from what is compared.
    """

    mean: Tensor
    weight: Tensor

    def __init__(self, features_KD: Tensor) -> None:
        super().__init__()
        mean = features_KD.mean(0)
        self.register_buffer("mean", mean)
        self.register_buffer("weight", F.normalize(features_KD - mean, dim=-1))

    def forward(self, tokens_ND: Tensor) -> Tensor:
        """(N, D) tokens -> (N, D) float32 rows of norm 1."""
        return F.normalize(tokens_ND.float() - self.mean, dim=-1)


class FeatureTeacher(nn.Module):
    """A backbone without heads as a teacher: how much like each of K images, and of K patches, is what it sees.

    Args:
        backbone: the frozen model.
        cls_KD: CLS tokens of the images.
        patches_KD: one patch token of each.
    """

    def __init__(self, backbone: VisionTransformer, cls_KD: Tensor, patches_KD: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head, self.ibot_head = FeaturePrototypes(cls_KD), FeaturePrototypes(patches_KD)

    def forward(self, crops: Crops) -> list[Outputs]:
        """As `Network.forward`, of one set of crops without masks."""
        tokens = self.backbone(normalize(crops.images))
        dino = self.dino_head(tokens.cls), self.dino_head.weight
        if crops.patches is None:
            return [Outputs(tokens.cls, *dino)]
        chosen = tokens.patches.flatten(0, 1).index_select(0, crops.patches)
        return [Outputs(tokens.cls, *dino, self.ibot_head(chosen), self.ibot_head.weight)]


def frozen_teacher(start: Start, source: Source, recipe: Recipe, device: torch.device) -> nn.Module:
    """The teacher of a distillation, on its device: a run with its heads, or any backbone with features for heads.

    Raises:
        UserError: there are fewer images than prototypes, or the recipe's patch or prototypes are not the teacher's.
    """
    teacher: nn.Module
    patch = start.backbone.config.patch_size
    if recipe.loss.ibot and patch != recipe.model.patch_size:
        raise UserError(
            f"the teacher's patch is {patch} pixels and the student's {recipe.model.patch_size}: "
            f"patches are compared one with one; set model.patch_size {patch}, or loss.ibot 0"
        )
    if start.network is not None and start.recipe is not None:
        theirs, ours = start.recipe, recipe
        counts = [(one.head.num_prototypes, one.num_ibot_prototypes()) for one in (theirs, ours)]
        if counts[0] != counts[1] or theirs.head.shared != ours.head.shared:
            raise UserError(
                f"the heads of {start.name} have {counts[0]} prototypes and the recipe's {counts[1]}: "
                "leave head.num_prototypes, head.ibot_num_prototypes and head.shared to the teacher"
            )
        if recipe.loss.ibot and not theirs.loss.ibot and not theirs.head.shared:
            raise UserError(f"{start.name} was trained without an iBOT head; set loss.ibot 0")
        teacher = start.network
    else:
        teacher = FeatureTeacher(start.backbone, *_drawn_features(start, source, recipe, device))
    return teacher.to(device).requires_grad_(False).eval()


def _drawn_features(
    start: Start, source: Source, recipe: Recipe, device: torch.device
) -> tuple[Tensor, Tensor]:
    """CLS tokens and patch tokens, each of another image drawn from a source, as many as there are prototypes."""
    counts = recipe.head.num_prototypes, recipe.num_ibot_prototypes()
    count = max(counts)
    rng = np.random.default_rng(recipe.run.seed)
    cls, patches, found = [], [], 0
    backbone, size = start.backbone.to(device).eval(), recipe.crops.global_size
    for tokens, _, _ in token_batches(
        backbone, source, rng.permutation(len(source)), resize=size, crop=size, device=device, bad=[]
    ):
        rows = torch.arange(len(tokens.cls), device=device)
        columns = torch.from_numpy(rng.integers(tokens.patches.shape[1], size=len(rows))).to(device)
        cls.append(tokens.cls.float())
        patches.append(tokens.patches[rows, columns].float())
        found += len(rows)
        if found >= count:
            return torch.cat(cls)[: counts[0]], torch.cat(patches)[: counts[1]]
    raise UserError(
        f"the head has {count} prototypes (head.num_prototypes, head.ibot_num_prototypes), and {source.name} has "
        f"{found} images that can be read: each prototype of a teacher without heads is one image"
    )


def distillation(recipe: Recipe, start: Start, num_images: int) -> Recipe:
    """A recipe with the paper's changes for a frozen teacher: no masks, no drop path, its patch, its heads' prototypes.

    The learning rate is the paper's, 1e-3 at a batch of 2048; recipes for small images keep their own.

    Args:
        recipe: of the student.
        start: the teacher.
        num_images: of the source; a teacher without heads has no more prototypes than that.
    """
    patch = start.backbone.config.patch_size
    head, optimizer = recipe.head, recipe.optimizer
    if optimizer.reference_batch > SMALL_BATCH:
        optimizer = dataclasses.replace(optimizer, lr=1e-3, scaling="sqrt", reference_batch=2048)
    if start.recipe is not None and start.network is not None:
        head = dataclasses.replace(start.recipe.head, hidden=recipe.head.hidden)
    else:
        count = min(head.num_prototypes, num_images)
        head = dataclasses.replace(head, shared=False, num_prototypes=count, ibot_num_prototypes=count)
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(
            recipe.model, patch_size=patch, drop_path=0.0, width=0, depth=0, num_heads=0
        ),
        head=head,
        optimizer=optimizer,
        crops=recipe.crops.fitted(patch),
        teacher=dataclasses.replace(recipe.teacher, model=start.name),
    )
