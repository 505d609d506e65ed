"""timm's weight files (.safetensors or .bin) of its DINOv2 and DINO vision transformers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unlabeled.vit import VisionTransformer
from unlabeled.weights.dino import MASK_NOTE, lacks_layer_scale, with_layer_scale, without_ones
from unlabeled.weights.files import State, fill, read_tensors, replacing, write_tensors
from unlabeled.weights.meta import NORM_EPS, config_of
from unlabeled.weights.renaming import renamer

# ours, timm's; what is not listed is the same
TABLE = (
    ("register_tokens", "reg_token"),
    ("blocks.{i}.mlp.w12", "blocks.{i}.mlp.fc1"),  # SwiGLU only
    ("blocks.{i}.mlp.w3", "blocks.{i}.mlp.fc2"),  # SwiGLU only
)
# timm has no mask token, and with registers no position for CLS: it is added to the CLS token.


def load_timm(path: str | Path, num_heads: int | None = None) -> VisionTransformer:
    """Return the model of a timm weight file, in evaluation mode; its mask token is zero.

    num_heads: attention heads; by default width / 64, as in every released model.
    Raises UserError for a file of another kind, or with missing, unexpected or wrongly shaped keys.
    """
    return from_timm(read_tensors(Path(path)), str(path), num_heads)


def from_timm(held: Mapping[str, Any], source: str, num_heads: int | None = None) -> VisionTransformer:
    """Return the model of the contents of a timm weight file; `source` names the file in errors."""
    rename = renamer((theirs, ours) for ours, theirs in TABLE if "mlp" not in ours or _is_swiglu(held))
    state: State = {rename(key): value for key, value in held.items()}
    if "reg_token" in held and "pos_embed" in state:
        cls_row = torch.zeros_like(state["pos_embed"][:, :1])
        state["pos_embed"] = torch.cat((cls_row, state["pos_embed"]), dim=1)
    config = config_of(state, source, "antialias", num_heads)
    if lacks_layer_scale(state):  # the original DINO's
        config = replace(config, layer_scale=1.0)
        state = with_layer_scale(state, config.width)
    state["mask_token"] = torch.zeros(1, config.width)
    return fill(config, state, source, [MASK_NOTE])


def _is_swiglu(held: Mapping[str, Tensor]) -> bool:
    fc1, fc2 = held.get("blocks.0.mlp.fc1.weight"), held.get("blocks.0.mlp.fc2.weight")
    return fc1 is not None and fc2 is not None and fc1.shape[0] == 2 * fc2.shape[1]


def to_timm(model: VisionTransformer) -> tuple[State, list[str]]:
    """Return timm's state dict of a model, and one line for each thing that it leaves out or cannot carry."""
    rename = renamer(TABLE)
    state, notes = without_ones(
        {rename(name): value.detach().cpu().clone() for name, value in model.state_dict().items()}
    )
    if state.pop("mask_token").any():
        notes.append("timm has no mask token: it was left out.")
    if "reg_token" in state:
        if state["pos_embed"][:, :1].any():
            notes.append("timm has no position for CLS beside registers: it was added to the CLS token.")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    if model.config.interpolation != "antialias":
        size = model.config.image_size
        notes.append(
            "timm resizes the position embedding with antialiasing: "
            f"its features are the same at {size} pixels only."
        )
    if model.config.norm_eps != NORM_EPS:
        notes.append(f"timm's layer norms have an epsilon of {NORM_EPS}, here {model.config.norm_eps}.")
    if model.config.fit != "crop":
        notes.append(f"timm's file does not hold fit ({model.config.fit!r}); read back it is 'crop'.")
    return state, notes


def save_timm(model: VisionTransformer, path: str | Path) -> list[str]:
    """Write a timm .safetensors file; return one line for each thing that timm leaves out or cannot carry."""
    state, notes = to_timm(model)
    with replacing(Path(path)) as temporary:
        write_tensors(state, temporary, metadata={"format": "pt"})
    return notes
