"""One whole training step against the plain reference of reference_step.py."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.pretrain import reference_step as plain
from unlabeled.pretrain.loop import make_optimizer
from unlabeled.pretrain.masks import block_masks
from unlabeled.pretrain.method import Batch, SelfDistillation
from unlabeled.pretrain.optimizer import apply_schedule
from unlabeled.pretrain.recipe import Recipe, named_recipe, override
from unlabeled.pretrain.schedules import StepValues

PATCH, DEPTH, HEADS, IMAGES, LOCALS = 4, 2, 2, 3, 3
VALUES = StepValues(
    lr=1e-2, last_layer_lr=5e-3, weight_decay=0.1, teacher_momentum=0.9, teacher_temperature=0.06
)
STUDENT_TEMPERATURE = 0.1


def recipe_of(**overrides: Any) -> Recipe:
    return override(
        named_recipe("tiny"),
        {
            "model.width": 16, "model.depth": DEPTH, "model.num_heads": HEADS, "model.patch_size": PATCH,
            "model.layer_scale": 0.5, "head.num_prototypes": 12, "head.hidden": 10, "head.bottleneck": 6,
            "head.ibot_num_prototypes": 9, "head.ibot_bottleneck": 5, "crops.global_size": 16,
            "crops.local_size": 8, "crops.num_locals": LOCALS, "optimizer.clip": 0.5, "optimizer.layer_decay": 0.8,
            "optimizer.patch_embed_multiplier": 0.2, "run.precision": "float32", "run.batch_size": IMAGES,
        } | {name.replace("__", "."): value for name, value in overrides.items()},
        "test",
    )  # fmt: skip


def made(recipe: Recipe) -> tuple[SelfDistillation, Batch]:
    torch.manual_seed(0)
    method = SelfDistillation(recipe)
    for network in (method.student, method.teacher):  # far from their start, and from each other
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape) * (0.3 if "last_layer" in name else 0.15)
            parameter.data.add_(noise)
    for center in (method.dino_center, method.ibot_center):
        center.center.normal_(std=0.05)
    rng = np.random.default_rng(0)
    masks = None
    if recipe.loss.ibot:
        masks = torch.from_numpy(block_masks(2 * IMAGES, (4, 4), 0.5, (0.2, 0.6), rng))
    images = [torch.from_numpy(rng.integers(0, 256, (views * IMAGES, 3, side, side), dtype=np.uint8))
              for views, side in ((2, 16), (LOCALS, 8))]  # fmt: skip
    return method, Batch(images[0], images[1], masks, IMAGES)


def normalised(image: Tensor) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]
    return (image.double() / 255 - mean) / std


def positions(p: plain.Parameters, side: int, antialias: bool) -> Tensor:
    """The embedding of the 4 x 4 grid, resized by torch's own bicubic interpolation."""
    embedding = p["backbone.pos_embed"][0]
    if side == 4:
        return embedding
    square = embedding[1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(side, side), mode="bicubic", antialias=antialias)
    return torch.cat((embedding[:1], resized[0].flatten(1).T))


def reference_losses(recipe: Recipe, student: plain.Parameters, teacher: plain.Parameters, batch: Batch,
                     centers: tuple[Tensor, Tensor]) -> tuple[dict[str, Tensor], list[list[Tensor]]]:  # fmt: skip
    antialias = recipe.model.num_registers > 0
    first_patch = 1 + recipe.model.num_registers
    ibot_head = "dino_head." if recipe.head.shared else "ibot_head."

    def tokens(p: plain.Parameters, image: Tensor, mask: Tensor | None, side: int) -> list[Tensor]:
        position = positions(p, side, antialias)
        return plain.backbone(p, normalised(image), mask, PATCH, DEPTH, HEADS, position)

    with torch.no_grad():
        seen = [tokens(teacher, image, None, 4) for image in batch.globals_VB3HW]
        dino_logits = [plain.head_logits(teacher, one[0], "dino_head.") for one in seen]
        ibot_logits = []
        if batch.masks_VBN is not None:
            for one, mask in zip(seen, batch.masks_VBN, strict=True):
                hidden = [one[first_patch + number] for number in range(16) if mask[number]]
                ibot_logits += [plain.head_logits(teacher, token, ibot_head) for token in hidden]
        if recipe.loss.targets == "sinkhorn":
            dino_targets = plain.sinkhorn(dino_logits, VALUES.teacher_temperature, 3)
            ibot_targets = plain.sinkhorn(ibot_logits, VALUES.teacher_temperature, 3) if ibot_logits else []
        else:
            dino_targets = plain.centred(dino_logits, centers[0], VALUES.teacher_temperature)
            ibot_targets = plain.centred(ibot_logits, centers[1], VALUES.teacher_temperature)

    views: list[list[Tensor]] = [[], []]  # (V, B) student logits
    cls: list[list[Tensor]] = [[], []]
    ibot = torch.zeros((), dtype=torch.float64)
    target_number = 0
    for row, image in enumerate(batch.globals_VB3HW):
        mask = None if batch.masks_VBN is None else batch.masks_VBN[row]
        one = tokens(student, image, mask, 4)
        views[row // IMAGES].append(plain.head_logits(student, one[0], "dino_head."))
        cls[row // IMAGES].append(one[0])
        if mask is None:
            continue
        for number in range(16):
            if mask[number]:
                logits = plain.head_logits(student, one[first_patch + number], ibot_head)
                loss = plain.cross_entropy(ibot_targets[target_number], logits, STUDENT_TEMPERATURE)
                ibot = ibot + loss / int(mask.sum()) / (2 * IMAGES)
                target_number += 1
    for view in range(LOCALS):
        images = batch.locals_VB3HW[view * IMAGES : (view + 1) * IMAGES]
        views.append(
            [plain.head_logits(student, tokens(student, image, None, 2)[0], "dino_head.") for image in images]
        )
    terms = [
        plain.cross_entropy(dino_targets[t * IMAGES + image], views[s][image], STUDENT_TEMPERATURE)
        for t in range(2) for s in range(2 + LOCALS) if s != t for image in range(IMAGES)
    ]  # fmt: skip
    found = {"dino": torch.stack(terms).mean()}
    found["koleo"] = plain.koleo(cls[0]) + plain.koleo(cls[1])
    if batch.masks_VBN is not None:
        found["ibot"] = ibot
    return found, [dino_logits, ibot_logits]


def doubled(network: torch.nn.Module) -> plain.Parameters:
    return {name: value.detach().double().clone() for name, value in network.named_parameters()}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"loss__targets": "centering", "head__shared": False, "model__num_registers": 4},
        {"loss__ibot": 0.0, "loss__koleo": 0.0, "loss__targets": "centering"},
    ],
    ids=["sinkhorn, shared head", "centering, own heads, registers", "DINO v1"],
)
def test_one_step_is_the_plain_reference(overrides: dict[str, Any]) -> None:
    recipe = recipe_of(**overrides)
    method, batch = made(recipe)
    student, teacher = doubled(method.student), doubled(method.teacher)
    for parameter in student.values():
        parameter.requires_grad_()
    centers = (method.dino_center.center.double(), method.ibot_center.center.double())
    expected, teacher_logits = reference_losses(recipe, student, teacher, batch, centers)
    weights = {"dino": 1.0, "ibot": recipe.loss.ibot, "koleo": recipe.loss.koleo}
    total = sum(weights[name] * value for name, value in expected.items())
    assert isinstance(total, Tensor)
    total.backward()

    optimizer = make_optimizer(method)
    apply_schedule(optimizer, VALUES.lr, VALUES.weight_decay, VALUES.last_layer_lr)
    gradients: dict[str, Tensor] = {}
    optimizer.register_step_pre_hook(lambda *_: gradients.update(
        {name: p.grad.clone() for name, p in method.student.named_parameters() if p.grad is not None}))  # fmt: skip
    found = method.train_step(batch, optimizer, VALUES)

    assert float(found["loss"]) == pytest.approx(float(total), rel=1e-5)
    for name, value in expected.items():
        if weights[name]:
            assert float(found[name]) == pytest.approx(float(value), rel=1e-5), name

    # Clipping: each submodule by its own norm.
    for module in ("backbone", "dino_head", "ibot_head"):
        names = [name for name in student if name.startswith(module + ".") and student[name].grad is not None]
        if not names:
            continue
        norm = math.sqrt(sum(float(student[name].grad.square().sum()) for name in names))  # type: ignore[union-attr]
        assert float(found[f"gradient_{module}"]) == pytest.approx(norm, rel=1e-4)
        scale = min(1.0, 0.5 / (norm + 1e-6))
        for name in names:
            grad = student[name].grad
            assert grad is not None
            grad *= scale
            torch.testing.assert_close(gradients[name].double(), grad, rtol=2e-3, atol=2e-6, msg=name)

    # AdamW's first step: bias-corrected moments are the gradient and its square.
    after = doubled(method.student)
    for name, before in student.items():
        grad = gradients.get(name)
        if grad is None:
            assert torch.equal(after[name], before.detach())
            continue
        rate = VALUES.last_layer_lr if "last_layer" in name else VALUES.lr
        layer = DEPTH + 1
        if name.startswith("backbone.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith("backbone.") and ".norm." not in name:
            layer = 0
        rate *= 0.8 ** (DEPTH + 1 - layer) * (0.2 if "patch_embed" in name else 1)
        exempt = before.ndim == 1 or name.endswith((".bias", ".gamma"))
        value = before.detach() * (1 - rate * (0 if exempt else VALUES.weight_decay))
        value = value - rate * grad.double() / (grad.double().abs() + 1e-8)
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=2e-6, msg=name)

    moved = doubled(method.teacher)
    for name, before in teacher.items():
        torch.testing.assert_close(
            moved[name], 0.9 * before + 0.1 * after[name], rtol=1e-5, atol=1e-6, msg=name
        )
    if recipe.loss.targets == "centering":
        for center, before, logits in zip(
            (method.dino_center, method.ibot_center), centers, teacher_logits, strict=True
        ):
            if logits:
                expected_center = 0.9 * before + 0.1 * torch.stack(logits).mean(0)
                torch.testing.assert_close(center.center.double(), expected_center, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_of_a_batch_add_up(parts: int) -> None:
    """Accumulation gives the gradients of the whole; KoLeo is left out, its neighbours are searched within a part."""
    gradients = []
    for accumulation in (1, parts):
        method, batch = made(recipe_of(run__accumulation=accumulation, loss__koleo=0.0, head__shared=False))
        losses = method.backward(batch, method.teacher_targets(batch, 0.06))
        gradients.append((losses["loss"], {name: p.grad for name, p in method.student.named_parameters()}))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_bf16_is_near_float32() -> None:
    found = []
    for precision in ("float32", "bf16"):
        method, batch = made(recipe_of(run__precision=precision))
        found.append(method.backward(batch, method.teacher_targets(batch, 0.06))["loss"])
        assert all(parameter.dtype == torch.float32 for parameter in method.parameters())
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=0)


def test_a_recipe_compiles() -> None:
    whole, batch = made(recipe_of())
    eager = whole.backward(batch, whole.teacher_targets(batch, 0.06))["loss"]
    compiled, _ = made(recipe_of())
    compiled.student.compile(backend="eager")
    compiled.teacher.compile(backend="eager")
    torch.testing.assert_close(compiled.backward(batch, compiled.teacher_targets(batch, 0.06))["loss"], eager)
