"""DINOv2's method: one training step, top to bottom, in the paper's words.

Shape suffixes: B images, V views, N patch tokens, D width, C bottleneck, K prototypes, M masked patches, H W pixels.
Crops are view-major: row v * B + b is view v of image b.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from unlabeled.images.transform import normalize
from unlabeled.pretrain.batch import Batch, Part, parts
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


class Crops(NamedTuple):
    """One set of crops, all of one size."""

    images: Tensor  # (VB, 3, H, W) uint8
    masks: Tensor | None = None  # (VB, N) bool, patches replaced by the mask token
    patches: Tensor | None = None  # (M,) int64, flat indices of the patch tokens the iBOT head is wanted for


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

    def forward(self, *sets: Crops) -> list[Outputs]:
        """Backbone and heads on one set of crops, or on several in one pass."""
        seen = self.backbone.all_tokens([(normalize(crops.images), crops.masks) for crops in sets])
        cls = [tokens.cls.clone() for tokens in seen]  # FSDP2 warns of views, which nobody may write to
        chosen = [
            tokens.patches.flatten(0, 1).index_select(0, crops.patches)
            for tokens, crops in zip(seen, sets, strict=True)
            if crops.patches is not None
        ]
        prototypes = self.dino_head.prototypes()
        if self.ibot_head is None:
            rows, ibot_prototypes = bottlenecks(self.dino_head, cls + chosen), prototypes
            dino, ibot = rows[: len(cls)], rows[len(cls) :]
        else:
            dino, ibot = bottlenecks(self.dino_head, cls), bottlenecks(self.ibot_head, chosen)
            ibot_prototypes = self.ibot_head.prototypes() if chosen else prototypes
        of_patches = iter(ibot)
        return [
            Outputs(cls_VBD, dino_VBC, prototypes)
            if crops.patches is None
            else Outputs(cls_VBD, dino_VBC, prototypes, next(of_patches), ibot_prototypes)
            for crops, cls_VBD, dino_VBC in zip(sets, cls, dino, strict=True)
        ]


def bottlenecks(head: ProjectionHead, tokens: list[Tensor]) -> list[Tensor]:
    """The head's bottleneck of each (N, D), (N, C), in one pass over all of them."""
    if len(tokens) < 2:
        return [head.bottleneck(one) for one in tokens]
    rows_NC = head.bottleneck(torch.cat(tokens))
    return [part.clone() for part in rows_NC.split([len(one) for one in tokens])]


def is_packed(recipe: Recipe, device: torch.device) -> bool:
    """Whether the student sees all crops of a step in one pass.

    That saves a third of a step's kernels and, under FSDP, half the gathers of the student's blocks, and holds the
    activations of all crops at once: a CPU, whose kernels are long, gains next to nothing.
    """
    return device.type == "cuda" if recipe.run.packed == "auto" else recipe.run.packed


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
        self.packed = is_packed(recipe, self.parallel.device)
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
        patches = batch.masks.patches_M if batch.masks else None
        with self.parallel.autocast(self.recipe.run.precision):
            teacher = self.frozen_teacher or self.teacher
            (seen,) = teacher(Crops(batch.globals_VB3HW, patches=patches))
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
            (seen,) = cast("list[Outputs]", self.teacher(Crops(batch.globals_VB3HW)))
        return seen.cls

    def backward(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        """Losses of the student and their gradients.

        The DINO loss of the local crops, and everything of the global crops, are separate terms of one sum. Packed,
        the student sees all crops in one pass. Otherwise each term is differentiated as soon as it is known, so that
        activations of both are never held at once.
        """
        recipe, num_images = self.recipe, batch.num_images
        weights = {"dino": recipe.loss.dino, "ibot": recipe.loss.ibot, "koleo": recipe.loss.koleo}
        total: dict[str, Tensor] = {}
        for part in parts(batch, recipe.run.accumulation):
            masks = part.batch.masks
            hidden = masks.hidden_VBN if masks and not self.frozen_teacher else None
            patches = masks.patches_M if masks else None
            terms = [(Crops(part.batch.globals_VB3HW, hidden, patches), self._global_losses)]
            if recipe.crops.num_locals:
                terms.insert(0, (Crops(part.batch.locals_VB3HW), self._local_losses))
            passes = [terms] if self.packed else [[term] for term in terms]
            for number, chosen in enumerate(passes, 1):
                is_last = number == len(passes) and part.images.stop == num_images
                with contextlib.nullcontext() if is_last else self.parallel.no_sync(self.student):
                    with self.parallel.autocast(recipe.run.precision):
                        outputs = self.student(*(crops for crops, _ in chosen))
                        found = [
                            named
                            for (_, losses), seen in zip(chosen, outputs, strict=True)
                            for named in losses(seen, part, targets, num_images).items()
                        ]
                    torch.stack([weights[name] * loss for name, loss in found]).sum().backward()
                for name, loss in found:
                    total[name] = total[name] + loss.detach() if name in total else loss.detach()
        summed = torch.stack([weights[name] * loss for name, loss in total.items()]).sum()
        return {"loss": summed, **total}

    def _local_losses(
        self, seen: Outputs, part: Part, targets: Targets, num_images: int
    ) -> dict[str, Tensor]:
        """What the local crops of a part add to the losses of a batch."""
        return {"dino": dino_loss_local(*self._of_dino(seen, part, targets, num_images))}

    def _global_losses(
        self, seen: Outputs, part: Part, targets: Targets, num_images: int
    ) -> dict[str, Tensor]:
        """What the global crops of a part add to the losses of a batch."""
        found = {"dino": dino_loss_global(*self._of_dino(seen, part, targets, num_images))}
        if self.recipe.loss.koleo:
            share = part.batch.num_images / num_images
            first, second = seen.cls.chunk(2)
            found["koleo"] = share * (
                koleo_loss(first, group_wide=True) + koleo_loss(second, group_wide=True)
            )
        else:
            found["koleo"] = seen.cls.new_zeros((), dtype=torch.float32)
        masks = part.batch.masks
        if masks and targets.ibot_MK is not None:
            found["ibot"] = ibot_loss(
                cast(Tensor, seen.ibot),
                cast(Tensor, seen.ibot_prototypes),
                targets.ibot_MK.of(part.of_masked),
                masks.weights_M,
                2 * num_images,
                self.recipe.loss.student_temperature,
            )
        return found

    def _of_dino(
        self, seen: Outputs, part: Part, targets: Targets, num_images: int
    ) -> tuple[Tensor, Tensor, Tensor, float, int, int]:
        """The arguments of both parts of the DINO loss."""
        chosen_VBK = targets.dino_VBK.unflatten(0, (2, num_images))[:, part.images]
        num_pairs = 2 + 2 * self.recipe.crops.num_locals
        temperature = self.recipe.loss.student_temperature
        return seen.dino, seen.prototypes, chosen_VBK, temperature, num_pairs, num_images

    def submodules(self) -> dict[str, nn.Module]:
        """The parts of the student whose gradients are clipped each by themselves."""
        network = self.parallel.unwrap(self.student)
        return {name: part for name, part in network.named_children() if part is not None}

    def teacher_backbone(self) -> VisionTransformer:
        """The backbone that a run is for; sharded under FSDP."""
        return cast(VisionTransformer, self.parallel.unwrap(self.teacher).backbone)
