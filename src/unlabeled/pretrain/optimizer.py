"""What AdamW is told: parameter groups, schedules, clipping; and how the teacher follows the student."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from unlabeled.layer_decay import is_decayed, layer_of
from unlabeled.pretrain.schedules import StepValues


def parameter_groups(
    student: nn.Module, depth: int, layer_decay: float, patch_embed_multiplier: float
) -> list[dict[str, Any]]:
    """The student's parameters in groups that share their multipliers (DINOv2 appendix B).

    Learning rate: layer_decay ** (depth + 1 - layer), embeddings being layer 0, block i layer i + 1, the last norm
    and the heads layer depth + 1; the patch embedding's is multiplied by patch_embed_multiplier too. Weight decay:
    none on biases, norms, LayerScale and everything else of one dimension.

    Returns:
        AdamW's groups, with lr_multiplier, weight_decay_multiplier and rate (the name of the learning rate among the
        schedules' values), which `apply_schedule` reads.
    """
    groups: dict[tuple[float, float, str], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        is_backbone = name.startswith("backbone.")
        layer = layer_of(name.removeprefix("backbone."), depth) if is_backbone else depth + 1
        multiplier = layer_decay ** (depth + 1 - layer)
        if "patch_embed" in name:
            multiplier *= patch_embed_multiplier
        decays = is_decayed(name, parameter)
        rate = "last_layer_lr" if "last_layer" in name else "lr"
        if is_backbone:
            rate = "backbone_lr"
        groups.setdefault((multiplier, float(decays), rate), []).append(parameter)
    return [
        {"params": members, "lr_multiplier": multiplier, "weight_decay_multiplier": decay, "rate": rate}
        for (multiplier, decay, rate), members in groups.items()
    ]


def apply_schedule(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Set each group's learning rate and weight decay for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = getattr(values, group["rate"]) * group["lr_multiplier"]
        group["weight_decay"] = values.weight_decay * group["weight_decay_multiplier"]


def clip_gradients(submodules: dict[str, nn.Module], max_norm: float) -> dict[str, Tensor]:
    """Scale each submodule's gradients to a norm of at most max_norm; 0 leaves them.

    Returns:
        Name -> norm before clipping, a scalar.
    """
    norms = {}
    for name, module in submodules.items():
        parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm > 0 and parameters:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        norms[name] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return norms


@torch.no_grad()
def guarded_update(
    optimizer: torch.optim.Optimizer, teacher: nn.Module, student: nn.Module, momentum: float, finite: Tensor
) -> None:
    """One step of the optimizer, then the teacher's, if `finite`; else all stays as it was, to the last bit.

    The device decides, so the host need not wait for it. Under FSDP both networks are sharded alike, and each rank
    moves its own shards.

    Args:
        optimizer: over the student's parameters, gradients in place.
        teacher: teacher <- momentum * teacher + (1 - momentum) * student.
        student: as the optimizer leaves it.
        momentum: of the teacher.
        finite: bool, a scalar on the device, the same on every rank.
    """
    teacher_weights, student_weights = _local(teacher.parameters()), _local(student.parameters())
    if not optimizer.defaults["fused"]:  # no kernel there can be told to leave everything as it is
        if finite:
            optimizer.step()
            torch._foreach_lerp_(teacher_weights, student_weights, 1 - momentum)
        return
    skipped = (~finite).to(torch.float32)
    optimizer.found_inf = skipped  # type: ignore[attr-defined]  # as torch.amp.GradScaler tells it
    optimizer.step()
    # teacher - (1 - momentum) * (teacher - student): a step of SGD, whose kernel also takes a flag and is one pass.
    torch._fused_sgd_(
        teacher_weights,
        student_weights,
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=1 - momentum,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=skipped,
    )


def _local(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
