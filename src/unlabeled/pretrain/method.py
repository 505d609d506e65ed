"""DINOv2's method: one training step, top to bottom, in the paper's words.

Shape suffixes: B images, V views, N patch tokens, D width, C bottleneck, K prototypes, M masked patches, H W pixels.
Crops are view-major: row v * B + b is view v of image b.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from unlabeled.images.transform import normalize
from unlabeled.pretrain.batch import Batch, parts
from unlabeled.pretrain.head import ProjectionHead
from unlabeled.pretrain.losses import dino_loss_global, dino_loss_local, ibot_loss, koleo_loss
from unlabeled.pretrain.optimizer import clip_gradients, guarded_update
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.positions import sine_positions
from unlabeled.pretrain.recipe import Recipe
from unlabeled.pretrain.schedules import StepValues
from unlabeled.pretrain.targets import Assignment, Center, prototype_logits, sinkhorn_knopp, softmax_center
from unlabeled.vit import VisionTransformer


class Targets(NamedTuple):
    """What the teacher says: the student's targets, and the features they came from."""

    dino_VBK: Tensor  # probabilities, one row a global crop
    ibot_MK: Assignment | None  # the same, one row a masked patch, in the order of the masks
    cls_VBD: Tensor  # CLS tokens of the teacher's backbone, for the health figures


class Outputs(NamedTuple):
    """What the student says of one set of crops."""

    cls: Tensor  # (VB, D) backbone CLS tokens
    dino: Tensor  # (VB, C) bottleneck of the DINO head
    prototypes: Tensor  # (K, C)
    ibot: Tensor | None = None  # (M, C) bottleneck of the iBOT head, masked patches
    ibot_prototypes: Tensor | None = None  # (K, C)


class Network(nn.Module):
    """Backbone and heads; the student and the teacher are one each."""

    def __init__(self, recipe: Recipe, drop_path: float) -> None:
        super().__init__()
        head, config = recipe.head, recipe.vit_config()
        checkpoint = recipe.run.checkpoint_blocks
        self.backbone = VisionTransformer(config, drop_path=drop_path, checkpoint_blocks=checkpoint)
        if recipe.model.positions == "sine":
            with torch.no_grad():
                self.backbone.pos_embed[:, 1:] = sine_positions(config.grid_side, config.width)
        self.dino_head = ProjectionHead(config.width, head.num_prototypes, head.bottleneck, head.hidden)
        self.ibot_head: ProjectionHead | None = None
        if recipe.loss.ibot > 0 and not head.shared:
            self.ibot_head = ProjectionHead(
                config.width, head.ibot_num_prototypes, head.ibot_bottleneck, head.hidden
            )
        if recipe.loss.ibot == 0 or recipe.teacher.model:
            self.backbone.mask_token.requires_grad_(False)  # nothing is masked, so it would get no gradient

    def forward(self, images: Tensor, masks: Tensor | None = None, patches: Tensor | None = None) -> Outputs:
        """Backbone and heads on one set of crops.

        Args:
            images: (VB, 3, H, W) uint8.
            masks: (VB, N) bool, patches replaced by the mask token, or None.
            patches: (M,) int64, flat indices of the patch tokens the iBOT head is wanted for, or None.
        """
        tokens = self.backbone(normalize(images), masks)
        dino, prototypes = self.dino_head.bottleneck(tokens.cls), self.dino_head.prototypes()
        cls = tokens.cls.clone()  # FSDP2 warns of views, which nobody may write to
        if patches is None:
            return Outputs(cls, dino, prototypes)
        chosen = tokens.patches.flatten(0, 1).index_select(0, patches)
        if self.ibot_head is None:
            return Outputs(cls, dino, prototypes, self.dino_head.bottleneck(chosen), prototypes)
        return Outputs(cls, dino, prototypes, self.ibot_head.bottleneck(chosen), self.ibot_head.prototypes())


def compile_blocks(*networks: Network, backend: str = "inductor") -> None:
    """Compile the transformer blocks: one graph for all blocks of the same kind, crops and mode, whatever the masks.

    The number of masked patches changes from step to step, and what depends on it is outside the blocks; so are the
    ranks' hooks, which sit on the modules. A graph break is an error.
    """
    for network in networks:
        for block in network.backbone.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)


class SelfDistillation(nn.Module):
    """Student, teacher and centres, and the step that trains them (DINOv2 section 4).

    Args:
        recipe: every number of the method.
        parallel: how ranks share the work.
        begin: gives the student its first weights; without it they are random.
        frozen_teacher: makes the targets in the place of the student's EMA, which is still kept: distillation.
    """

    student: nn.Module
    teacher: nn.Module

    def __init__(
        self,
        recipe: Recipe,
        parallel: Parallel | None = None,
        begin: Callable[[Network], None] | None = None,
        frozen_teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.parallel = parallel or Parallel()
        self.frozen_teacher = frozen_teacher
        self.student = Network(recipe, drop_path=recipe.model.drop_path)
        if begin is not None:
            begin(self.student)
        self.teacher = Network(recipe, drop_path=0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False).eval()
        self.dino_center = Center(recipe.head.num_prototypes, recipe.loss.center_momentum)
        self.ibot_center = Center(recipe.num_ibot_prototypes(), recipe.loss.center_momentum)
        self.to(self.parallel.device)
        if recipe.run.compile:
            compile_blocks(self.student, self.teacher)
        self.student, self.teacher = self.parallel.wrap(
            self.student, self.teacher, recipe.run.sharding, recipe.run.reduce
        )

    def train_step(
        self, batch: Batch, optimizer: torch.optim.Optimizer, values: StepValues
    ) -> dict[str, Tensor]:
        """One step: targets, losses, gradients, optimizer, EMA.

        A step whose loss or gradient is not finite on any rank leaves everything as it was. Nothing here waits for
        the device: what is to be decided is decided there, and shapes are known to the host beforehand.

        Args:
            batch: this rank's crops, on the device.
            optimizer: over the student's parameters, its schedules applied.
            values: the schedules' values at this step.

        Returns:
            Scalars, averaged over ranks: loss, dino, ibot, koleo, gradient norms, and `finite` (1 or 0);
            and from this rank `targets` (2B, K) and `teacher_cls` (2B, D).
        """
        centers = (self.dino_center.center, self.ibot_center.center)
        before = [center.clone() for center in centers]
        targets = self.teacher_targets(batch, values.teacher_temperature)
        optimizer.zero_grad(set_to_none=True)
        losses = self.backward(batch, targets)
        norms = clip_gradients(self.submodules(), self.recipe.optimizer.clip)
        scalars = self.parallel.mean(losses | {f"gradient_{name}": norm for name, norm in norms.items()})
        finite = torch.stack(list(scalars.values())).isfinite().all()
        guarded_update(optimizer, self.teacher, self.student, values.teacher_momentum, finite)
        for center, value in zip(centers, before, strict=True):
            center.copy_(torch.where(finite, center, value))
        return scalars | {"finite": finite, "targets": targets.dino_VBK, "teacher_cls": targets.cls_VBD}

    @torch.no_grad()
    def teacher_targets(self, batch: Batch, temperature: float) -> Targets:
        """The teacher's view of the unmasked global crops, as probabilities over prototypes."""
        patches = batch.masks and batch.masks.patches_M
        with self.parallel.autocast(self.recipe.run.precision):
            teacher = self.frozen_teacher or self.teacher
            seen = teacher(batch.globals_VB3HW, patches=patches)
            loss, dino_logits_VBK = self.recipe.loss, prototype_logits(seen.dino, seen.prototypes)
            if loss.targets == "sinkhorn":
                dino_VBK = sinkhorn_knopp(dino_logits_VBK, temperature, loss.sinkhorn_iterations)
            else:
                dino_VBK = softmax_center(dino_logits_VBK, self.dino_center.center, temperature)
                self.dino_center.update(dino_logits_VBK)  # this batch moves the next batch's centre
            if patches is None:
                return Targets(dino_VBK, None, seen.cls)
            said = (seen.ibot, seen.ibot_prototypes, temperature)
            if loss.targets == "sinkhorn":
                ibot_MK = Assignment.by_sinkhorn(*said, loss.sinkhorn_iterations)
            else:
                ibot_MK = Assignment.by_center(*said, self.ibot_center)
            return Targets(dino_VBK, ibot_MK, seen.cls)

    @torch.no_grad()
    def teacher_cls(self, batch: Batch) -> Tensor:
        """(2B, D) CLS tokens of the student's EMA, for the health figures of a distillation."""
        with self.parallel.autocast(self.recipe.run.precision):
            seen: Outputs = self.teacher(batch.globals_VB3HW)
        return seen.cls

    def backward(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        """Losses of the student and their gradients.

        The DINO loss of the local crops, and everything of the global crops, are separate terms of one sum:
        each is differentiated as soon as it is known, so that activations of both are never held at once.
        """
        recipe = self.recipe
        total: dict[str, Tensor] = {}
        num_images, num_locals = batch.num_images, recipe.crops.num_locals
        num_pairs = 2 + 2 * num_locals
        targets_VBK = targets.dino_VBK.unflatten(0, (2, num_images))
        temperature = recipe.loss.student_temperature
        for part in parts(batch, recipe.run.accumulation):
            crops, chosen = part.batch, targets_VBK[:, part.images]
            if num_locals:
                with self.parallel.no_sync(self.student), self._forward():
                    local = self.student(crops.locals_VB3HW)
                    loss = dino_loss_local(
                        local.dino, local.prototypes, chosen, temperature, num_pairs, num_images
                    )
                (recipe.loss.dino * loss).backward()
                _add(total, "dino", loss)
            is_last = part.images.stop == num_images
            with contextlib.nullcontext() if is_last else self.parallel.no_sync(self.student):
                with self._forward():
                    hidden = None if self.frozen_teacher else crops.masks and crops.masks.hidden_VBN
                    seen = self.student(crops.globals_VB3HW, hidden, crops.masks and crops.masks.patches_M)
                    dino = dino_loss_global(
                        seen.dino, seen.prototypes, chosen, temperature, num_pairs, num_images
                    )
                    koleo = self._koleo(seen.cls, crops.num_images / num_images)
                    loss = recipe.loss.dino * dino + recipe.loss.koleo * koleo
                    if crops.masks and targets.ibot_MK is not None:
                        ibot = ibot_loss(
                            seen.ibot,
                            seen.ibot_prototypes,
                            targets.ibot_MK.of(part.of_masked),
                            crops.masks.weights_M,
                            2 * num_images,
                            temperature,
                        )
                        loss = loss + recipe.loss.ibot * ibot
                        _add(total, "ibot", ibot)
                loss.backward()
            _add(total, "dino", dino)
            _add(total, "koleo", koleo)
        weights = {"dino": recipe.loss.dino, "ibot": recipe.loss.ibot, "koleo": recipe.loss.koleo}
        summed = torch.stack([weights[name] * value for name, value in total.items()]).sum()
        return {"loss": summed, **total}

    def _koleo(self, cls_VBD: Tensor, share: float) -> Tensor:
        if self.recipe.loss.koleo == 0:
            return cls_VBD.new_zeros((), dtype=torch.float32)
        first, second = cls_VBD.chunk(2)
        return share * (koleo_loss(first, group_wide=True) + koleo_loss(second, group_wide=True))

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        with self.parallel.autocast(self.recipe.run.precision):
            yield

    def submodules(self) -> dict[str, nn.Module]:
        """The parts of the student whose gradients are clipped each by themselves."""
        network = self.parallel.unwrap(self.student)
        return {name: part for name, part in network.named_children() if part is not None}

    def teacher_backbone(self) -> VisionTransformer:
        """The backbone that a run is for; sharded under FSDP."""
        return cast(VisionTransformer, self.parallel.unwrap(self.teacher).backbone)


def _add(total: dict[str, Tensor], name: str, value: Tensor) -> None:
    total[name] = total[name] + value.detach() if name in total else value.detach()
