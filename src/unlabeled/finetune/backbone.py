"""How a backbone takes part: frozen, by adapters, or with all of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unlabeled.dense.inference import Head
from unlabeled.features.engines import exact_engine
from unlabeled.finetune.lora import add_adapters
from unlabeled.finetune.recipe import TrainRecipe
from unlabeled.images.transform import normalize
from unlabeled.layer_decay import is_decayed, layer_of
from unlabeled.vit import Tokens, VisionTransformer


def prepare(model: VisionTransformer, recipe: TrainRecipe) -> None:
    """Choose what of a backbone learns, add adapters, and set drop path."""
    if recipe.backbone == "lora":
        add_adapters(model, recipe.lora_rank, recipe.lora_mlp)
    else:
        model.requires_grad_(recipe.backbone == "full")
    model.mask_token.requires_grad_(False)  # nothing is masked
    model.train(recipe.backbone != "freeze")
    model.drop_path = recipe.drop_path


def released(model: VisionTransformer) -> VisionTransformer:
    """Return the backbone as everybody else wants it: evaluation mode, no drop path, every weight free to learn."""
    model.drop_path = 0.0
    return model.requires_grad_(True).eval()


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: VisionTransformer, head: nn.Module, recipe: TrainRecipe) -> list[dict[str, Any]]:
    """Return AdamW's groups, each with the peak of its learning rate.

    The head's is recipe.lr, that of adapters recipe.backbone_lr; a backbone's weights have
    backbone_lr * layer_decay ** (depth + 1 - layer), see `layer_of`. Adapters, biases and norms do not decay.
    """
    depth = len(model.blocks)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in learning(head).items():
        decay = recipe.weight_decay if is_decayed(name, parameter) else 0.0
        groups.setdefault((recipe.lr, decay), []).append(parameter)
    for name, parameter in learning(model).items():
        full = recipe.backbone == "full"
        multiplier = recipe.layer_decay ** (depth + 1 - layer_of(name, depth)) if full else 1.0
        decay = recipe.weight_decay if full and is_decayed(name, parameter) else 0.0
        groups.setdefault((recipe.backbone_lr * multiplier, decay), []).append(parameter)
    return [
        {"params": members, "peak_lr": lr, "lr": 0.0, "weight_decay": decay}
        for (lr, decay), members in groups.items()
    ]


def reader(
    model: VisionTransformer, head: Head, device: torch.device, bf16: bool = False
) -> Callable[[Tensor], list[Tokens]]:
    """Return what turns uint8 images into the tokens that a head reads, without gradients, as fast as is exact.

    bf16: it is called under autocast, which weights packed in float32 cannot follow.
    """
    layers = head.layers(len(model.blocks))
    if len(layers) == 1 and head.norm and not bf16:
        engine = exact_engine(model, layers[0], device)

        @torch.no_grad()
        def one(images_B3HW: Tensor) -> list[Tokens]:
            return [engine(normalize(images_B3HW.to(device)))]

        return one

    @torch.no_grad()
    def several(images_B3HW: Tensor) -> list[Tokens]:
        return model.intermediate_layers(normalize(images_B3HW.to(device)), layers, norm=head.norm)

    return several
