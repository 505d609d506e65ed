"""Weights that a run begins with: a released backbone, or a run with its heads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unlabeled.errors import UserError
from unlabeled.pretrain.checkpoint import all_checkpoints, load_part
from unlabeled.pretrain.method import Network
from unlabeled.pretrain.recipe import ModelRecipe, Recipe
from unlabeled.pretrain.recipes import read_recipe
from unlabeled.vit import SIZES, VisionTransformer, VitConfig
from unlabeled.weights.load import load_model


@dataclass(frozen=True)
class Start:
    """Some MODEL, and what else its folder holds.

    Attributes:
        name: the text it was read from.
        backbone: in evaluation mode, float32, on the CPU.
        recipe: of the run it comes from; None for weights without one.
        network: that run's whole teacher, heads included; None where there is no checkpoint.
        centers: its centres, (K,) each, by the name of their loss; empty where there is no checkpoint.
    """

    name: str
    backbone: VisionTransformer
    recipe: Recipe | None = None
    network: Network | None = None
    centers: dict[str, Tensor] = field(default_factory=dict)


def load_start(name: str) -> Start:
    """Read any MODEL; of a run folder with a checkpoint, the heads and centres too.

    Raises:
        UserError: there is no such model, or its checkpoint does not load.
    """
    folder = Path(name)
    if not (folder / "recipe.toml").exists():
        return Start(name, load_model(name))
    recipe = read_recipe(folder / "recipe.toml")
    saved = all_checkpoints(folder / "checkpoints")
    if not saved:
        return Start(name, load_model(name), recipe)
    network = Network(recipe, drop_path=0.0)
    state: dict[str, Any] = {"teacher": network.state_dict()}
    for loss, count in (("dino", recipe.head.num_prototypes), ("ibot", recipe.num_ibot_prototypes())):
        state[f"{loss}_center"] = {"center": torch.zeros(count)}
    load_part(saved[-1], state)
    network.load_state_dict(state["teacher"])
    network.requires_grad_(False).eval()
    centers = {loss: state[f"{loss}_center"]["center"] for loss in ("dino", "ibot")}
    return Start(name, network.backbone, recipe, network, centers)


def heads_fit(start: Start, recipe: Recipe) -> bool:
    """Whether the start has the heads that a recipe asks for."""
    if start.recipe is None or start.network is None:
        return False
    theirs, ours = start.recipe, recipe
    untied = (theirs.loss.ibot > 0 and not theirs.head.shared, ours.loss.ibot > 0 and not ours.head.shared)
    return theirs.head == ours.head and untied[0] == untied[1]


def begin(network: Network, start: Start, recipe: Recipe) -> None:
    """Give a network the weights of a start: the backbone, and the heads where `heads_fit`.

    The position embedding is resized to the recipe's grid as the model itself does at run time, so that features at
    the new size do not change.

    Raises:
        UserError: the recipe's backbone is another than the start's.
    """
    have, wanted = start.backbone.config, recipe.vit_config()
    for item in dataclasses.fields(VitConfig):
        pair = getattr(have, item.name), getattr(wanted, item.name)
        if item.name not in ("image_size", "layer_scale", "fit") and pair[0] != pair[1]:
            raise UserError(
                f"{start.name} has {item.name} {pair[0]!r}, and the recipe {pair[1]!r}: "
                f"leave model.{item.name} to the weights"
            )
    state = start.backbone.state_dict()
    side = wanted.grid_side
    state["pos_embed"] = start.backbone.position_embedding((side, side)).detach()
    network.backbone.load_state_dict(state)
    if start.network is not None and heads_fit(start, recipe):
        for name in ("dino_head", "ibot_head"):
            if getattr(network, name) is not None:
                getattr(network, name).load_state_dict(getattr(start.network, name).state_dict())


def model_fields(start: Start, recipe: Recipe) -> ModelRecipe:
    """A recipe's model section with the shape of a start's backbone; drop path stays the recipe's."""
    config = start.backbone.config
    known = {item.name for item in dataclasses.fields(ModelRecipe)} - {"image_size", "layer_scale"}
    values = {name: value for name, value in dataclasses.asdict(config).items() if name in known}
    shape = (config.width, config.depth, config.num_heads, config.ffn)
    for size, named in SIZES.items():
        if named == shape:
            values |= {"size": size, "width": 0, "depth": 0, "num_heads": 0, "ffn": ""}
    return dataclasses.replace(recipe.model, **values, start=start.name)


def with_grid(start: Start, recipe: Recipe) -> ModelRecipe:
    """The model section with the position embedding's grid: the start's own, unless the crops are larger."""
    size = max(start.backbone.config.image_size, recipe.crops.global_size)
    return dataclasses.replace(recipe.model, image_size=size)
