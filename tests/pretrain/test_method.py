"""One whole training step against the plain reference of reference_step.py."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional as F

from tests.pretrain import reference_step as plain
from unlabeled.pretrain.batch import Batch, Masks
from unlabeled.pretrain.loop import make_optimizer
from unlabeled.pretrain.masks import block_masks
from unlabeled.pretrain.method import SelfDistillation, Targets, compile_blocks
from unlabeled.pretrain.optimizer import apply_schedule
from unlabeled.pretrain.recipe import Recipe, override
from unlabeled.pretrain.recipes import named_recipe
from unlabeled.pretrain.schedules import StepValues

PATCH, DEPTH, HEADS, IMAGES, LOCALS = 4, 2, 2, 3, 3
VALUES = StepValues(
    lr=1e-2,
    last_layer_lr=5e-3,
    backbone_lr=1e-2,
    weight_decay=0.1,
    teacher_momentum=0.9,
    teacher_temperature=0.06,
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
        masks = Masks.of(torch.from_numpy(block_masks(2 * IMAGES, (4, 4), 0.5, (0.2, 0.6), rng)))
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
                     centers: tuple[Tensor, Tensor], temperature: float,
                     ) -> tuple[dict[str, Tensor], list[list[Tensor]]]:  # fmt: skip
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
        if batch.masks is not None:
            for one, mask in zip(seen, batch.masks.hidden_VBN, strict=True):
                hidden = [one[first_patch + number] for number in range(16) if mask[number]]
                ibot_logits += [plain.head_logits(teacher, token, ibot_head) for token in hidden]
        if recipe.loss.targets == "sinkhorn":
            dino_targets = plain.sinkhorn(dino_logits, temperature, 3)
            ibot_targets = plain.sinkhorn(ibot_logits, temperature, 3) if ibot_logits else []
        else:
            dino_targets = plain.centred(dino_logits, centers[0], temperature)
            ibot_targets = plain.centred(ibot_logits, centers[1], temperature)

    views: list[list[Tensor]] = [[], []]  # (V, B) student logits
    cls: list[list[Tensor]] = [[], []]
    ibot = torch.zeros((), dtype=torch.float64)
    target_number = 0
    for row, image in enumerate(batch.globals_VB3HW):
        mask = batch.masks and batch.masks.hidden_VBN[row]
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
    if batch.masks is not None:
        found["ibot"] = ibot
    return found, [dino_logits, ibot_logits]


def doubled(network: torch.nn.Module) -> plain.Parameters:
    return {name: value.detach().double().clone() for name, value in network.named_parameters()}


CASES = {
    "sinkhorn, shared head": {},
    "sinkhorn, own heads, registers": {"head__shared": False, "model__num_registers": 4},
    "centering, shared head, registers": {"loss__targets": "centering", "model__num_registers": 4},
    "centering, own heads": {"loss__targets": "centering", "head__shared": False},
    "DINO v1": {"loss__ibot": 0.0, "loss__koleo": 0.0, "loss__targets": "centering"},
}
SECOND = StepValues(
    lr=2e-2,
    last_layer_lr=0.0,
    backbone_lr=3e-2,
    weight_decay=0.3,
    teacher_momentum=0.7,
    teacher_temperature=0.05,
)


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
@pytest.mark.parametrize("packed", [False, True], ids=["two passes", "packed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_steps_are_the_plain_reference(dtype: torch.dtype, packed: bool, overrides: dict[str, Any]) -> None:
    """Two steps: the second one's moments, centres, frozen prototypes and schedules are not the first one's.

    float64 is the whole method with nothing left to rounding. float32 is as it runs: there the reference takes
    the method's state before each step, and its gradients for AdamW, which turns a rounded sign into a full step.
    """
    with in_float64() if dtype == torch.float64 else contextlib.nullcontext():
        _two_steps(recipe_of(**overrides, run__packed=packed), dtype == torch.float64)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Meanwhile new tensors are float64, and what asks for float32 gets float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def _two_steps(recipe: Recipe, exact: bool) -> None:
    method, batch = made(recipe)
    state = student, teacher, centers = _state(method)
    optimizer = make_optimizer(method)
    taken: plain.Parameters = {}
    optimizer.register_step_pre_hook(
        lambda *_: taken.update(
            {
                name: p.grad.double().clone()
                for name, p in method.student.named_parameters()
                if p.grad is not None
            }
        )
    )
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in student}
    for number, values in enumerate((VALUES, SECOND), 1):
        taken.clear()
        apply_schedule(optimizer, values)
        found = method.train_step(batch, optimizer, values)
        if not exact:
            student, teacher, centers = state
        rate = recipe.optimizer
        losses, gradients, centers = _reference_gradients(recipe, student, teacher, batch, centers, values)
        for name, loss in losses.items():
            assert float(found[name]) == pytest.approx(float(loss), rel=1e-9 if exact else 1e-5), name
        for part in ("backbone", "dino_head", "ibot_head"):
            names = [name for name in gradients if name.startswith(part + ".")]
            assert bool(names) == (f"gradient_{part}" in found)
            if names:
                norm = plain.clipped(gradients, names, rate.clip)
                assert norm > rate.clip, "nothing is clipped here"
                assert float(found[f"gradient_{part}"]) == pytest.approx(norm, rel=1e-9 if exact else 1e-4)
        near = {"rtol": 1e-8, "atol": 1e-11} if exact else {"rtol": 2e-3, "atol": 2e-6}
        assert set(taken) == set(gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(taken[name], gradient, **near, msg=name)
        for name, gradient in (gradients if exact else taken).items():
            lr = values.last_layer_lr if "last_layer" in name else values.lr
            lr = values.backbone_lr if name.startswith("backbone.") else lr
            lr *= plain.rate_of(name, DEPTH, rate.layer_decay, rate.patch_embed_multiplier)
            decay = values.weight_decay if plain.decays(name) else 0.0
            student[name] = plain.adamw(
                student[name].detach(), gradient, moments[name], number, lr, decay, rate.betas
            )
        for name in teacher:
            momentum = values.teacher_momentum
            teacher[name] = momentum * teacher[name] + (1 - momentum) * student[name].detach()
        state = _state(method)
        near = {"rtol": 1e-7, "atol": 1e-9} if exact else {"rtol": 1e-4, "atol": 2e-6}
        for name in student:
            torch.testing.assert_close(state[0][name], student[name].detach(), **near, msg=name)
            torch.testing.assert_close(state[1][name], teacher[name], **near, msg=name)
        for now, center in zip(state[2], centers, strict=True):
            torch.testing.assert_close(now, center, **near)


def _state(method: SelfDistillation) -> tuple[plain.Parameters, plain.Parameters, list[Tensor]]:
    centers = [center.center.double().clone() for center in (method.dino_center, method.ibot_center)]
    return doubled(method.student), doubled(method.teacher), centers


def _reference_gradients(
    recipe: Recipe, student: plain.Parameters, teacher: plain.Parameters, batch: Batch,
    centers: list[Tensor], values: StepValues,
) -> tuple[dict[str, Tensor], plain.Parameters, list[Tensor]]:  # fmt: skip
    """Losses, gradients by name, and the centres after the step."""
    for name in student:
        student[name] = student[name].detach().requires_grad_()
    losses, logits = reference_losses(
        recipe, student, teacher, batch, (centers[0], centers[1]), values.teacher_temperature
    )
    weights = {"dino": recipe.loss.dino, "ibot": recipe.loss.ibot, "koleo": recipe.loss.koleo}
    losses = {name: value for name, value in losses.items() if weights[name]}
    total = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
    total.backward()
    gradients = {name: value.grad for name, value in student.items() if value.grad is not None}
    if recipe.loss.targets == "centering":
        centers = [
            0.9 * center + 0.1 * torch.stack(rows).mean(0) if rows else center
            for center, rows in zip(centers, logits, strict=True)
        ]
    return {name: value.detach() for name, value in (losses | {"loss": total}).items()}, gradients, centers


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_a_step_that_is_not_finite_changes_nothing(targets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = made(recipe_of(loss__targets=targets, head__shared=False))
    optimizer = make_optimizer(method)
    apply_schedule(optimizer, VALUES)
    assert method.train_step(batch, optimizer, VALUES)["finite"]
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    before = {name: value.clone() for name, value in method.state_dict().items()}
    real = method.backward

    def broken(batch: Batch, targets: Targets) -> dict[str, Tensor]:
        losses = real(batch, targets)
        next(method.student.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
        return losses

    monkeypatch.setattr(method, "backward", broken)
    assert not method.train_step(batch, optimizer, VALUES)["finite"]
    for name, value in method.state_dict().items():
        assert torch.equal(value, before[name]), name
    after = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(*pair) for pair in zip(after, moments, strict=True))


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_of_a_batch_add_up(parts: int) -> None:
    """Accumulation gives the gradients of the whole; KoLeo is left out, its neighbours are searched within a part."""
    gradients = []
    for accumulation in (1, parts):
        method, batch = made(recipe_of(run__accumulation=accumulation, loss__koleo=0.0, head__shared=False))
        losses = method.backward(batch, method.teacher_targets(batch, 0.06))
        gradients.append((losses["loss"], {name: p.grad for name, p in method.student.named_parameters()}))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    drop_path=st.sampled_from([0.0, 0.1, 0.4]),
    ffn=st.sampled_from(["mlp", "swiglu"]),
    registers=st.sampled_from([0, 4]),
    shared=st.booleans(),
    ibot=st.booleans(),
    locals_of=st.sampled_from([(0, 8), (1, 4), (2, 8), (5, 12), (2, 16)]),
    accumulation=st.sampled_from([1, 2]),
    again=st.booleans(),
)
def test_packed_is_two_passes(
    drop_path: float, ffn: str, registers: int, shared: bool, ibot: bool,
    locals_of: tuple[int, int], accumulation: int, again: bool,
) -> None:  # fmt: skip
    """All losses and all gradients, in float64, with the same random numbers for drop path."""
    num_locals, size = locals_of
    images = torch.randint(256, (num_locals * IMAGES, 3, size, size), dtype=torch.uint8)
    found = []
    for packed in (False, True):
        recipe = recipe_of(
            model__drop_path=drop_path, model__ffn=ffn, model__num_registers=registers, head__shared=shared,
            loss__ibot=float(ibot), crops__num_locals=num_locals, crops__local_size=size,
            run__accumulation=accumulation, run__checkpoint_blocks=again, run__packed=packed,
        )  # fmt: skip
        with in_float64():
            method, batch = made(recipe)
            batch = Batch(batch.globals_VB3HW, images, batch.masks, IMAGES)
            targets, calls = method.teacher_targets(batch, 0.06), []
            method.student.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            torch.manual_seed(5)
            losses = method.backward(batch, targets)
        assert len(calls) == accumulation * (1 if packed or not num_locals else 2)
        found.append((losses, {name: p.grad for name, p in method.student.named_parameters()}))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_bf16_is_near_float32() -> None:
    found = []
    for precision in ("float32", "bf16"):
        method, batch = made(recipe_of(run__precision=precision))
        found.append(method.backward(batch, method.teacher_targets(batch, 0.06))["loss"])
        assert all(parameter.dtype == torch.float32 for parameter in method.parameters())
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_compile_once_and_whole(packed: bool) -> None:
    """No graph breaks (fullgraph), and after the first step no compilation, whatever the masks and the drop path."""
    recipe = recipe_of(model__drop_path=0.3, run__packed=packed)
    (plain, batch), (compiled, _) = made(recipe), made(recipe)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(compiled.student, compiled.teacher, backend="aot_eager")
    graphs = []
    for seed in range(3):
        masks = torch.from_numpy(
            block_masks(2 * IMAGES, (4, 4), 0.5, (0.2, 0.6), np.random.default_rng(seed))
        )
        other = Batch(batch.globals_VB3HW.roll(seed, 0), batch.locals_VB3HW, Masks.of(masks), IMAGES)
        losses = []
        for method in (plain, compiled):
            torch.manual_seed(seed)
            losses.append(method.backward(other, method.teacher_targets(other, 0.06))["loss"])
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        graphs.append(counters["stats"]["unique_graphs"])
    # The teacher's global crops, the student's local and global ones, apart or packed: not one each for every block.
    assert graphs == ([2, 2, 2] if packed else [3, 3, 3])
    assert not counters["graph_break"]
