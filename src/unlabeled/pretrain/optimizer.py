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
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in one pass over all parameters.

    Both are sharded alike, if at all: each rank moves its own shards.
    """
    torch._foreach_lerp_(_local(teacher.parameters()), _local(student.parameters()), 1 - momentum)


def _local(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
