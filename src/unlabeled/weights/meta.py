"""Meta's .pth files: DINOv2's flat releases, training exports with heads, chunked blocks; the original DINO's.

Our state-dict keys are those of DINOv2's flat release files, so what is left to do is to unwrap the others.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unlabeled.errors import UserError
from unlabeled.vit import Interpolation, VisionTransformer, VitConfig
from unlabeled.weights.dino import MASK_NOTE, lacks_layer_scale, with_layer_scale, without_ones
from unlabeled.weights.files import State, fill, read_tensors, replacing

# Stand beside "backbone." in a training checkpoint, of DINOv2 and of DINO; not part of a backbone.
HEADS = ("dino_head.", "ibot_head.", "head.")
CHUNKED_BLOCK = re.compile(r"blocks\.\d+\.(\d+)\.(.*)")  # blocks.{chunk}.{absolute index}.{rest}
HEAD_WIDTH = 64  # of every released size; the files do not hold the number of heads
NORM_EPS = 1e-6  # in Meta's code and timm's, for all of these models


def load_meta(path: str | Path, num_heads: int | None = None) -> VisionTransformer:
    """Return the model of a Meta .pth file, in evaluation mode.

    num_heads: attention heads; by default width / 64, as in every released model.
    Raises UserError for a file of another kind, or with missing, unexpected or wrongly shaped keys.
    """
    return from_meta(read_tensors(Path(path)), str(path), num_heads)


def from_meta(held: Mapping[str, Any], source: str, num_heads: int | None = None) -> VisionTransformer:
    """Return the model of the contents of a Meta .pth file; `source` names the file in errors.

    The original DINO has no LayerScale (here: ones) and no mask token (here: zeros, and a note).
    """
    state = unwrap(held)
    interpolation: Interpolation = "antialias" if "register_tokens" in state else "scale"
    config = config_of(state, source, interpolation, num_heads)
    if not is_original_dino(state):
        return fill(config, state, source)
    state = with_layer_scale(state, config.width) | {"mask_token": torch.zeros(1, config.width)}
    return fill(replace(config, layer_scale=1.0), state, source, [MASK_NOTE])


def is_original_dino(state: Mapping[str, Tensor]) -> bool:
    """Whether a flat state dict has neither LayerScale nor what came with DINOv2."""
    return lacks_layer_scale(state) and not {"mask_token", "register_tokens"} & state.keys()


def unwrap(held: Mapping[str, Any]) -> State:
    """Return the flat state dict from any of the shapes of file; of a training checkpoint, the teacher's."""
    teacher = held["teacher"] if isinstance(held.get("teacher"), Mapping) else held
    state = {str(key).removeprefix("module."): value for key, value in teacher.items()}
    if any(key.startswith("backbone.") for key in state):
        state = {
            key.removeprefix("backbone."): value for key, value in state.items() if not key.startswith(HEADS)
        }
    return {CHUNKED_BLOCK.sub(r"blocks.\1.\2", key): value for key, value in state.items()}


def config_of(
    state: Mapping[str, Tensor], source: str, interpolation: Interpolation, num_heads: int | None = None
) -> VitConfig:
    """Read the configuration off the shapes of a flat state dict.

    Raises UserError if the file is no vision transformer of this kind.
    """

    def shape(key: str, dims: int) -> tuple[int, ...]:
        found = tuple(getattr(state.get(key), "shape", ()))
        if len(found) != dims or 0 in found:
            raise UserError(
                f"{source} holds no DINOv2 backbone ({key} is missing or odd); expected the weights of a Meta "
                ".pth, a timm or a Hugging Face file."
            )
        return found

    width, in_channels, patch_size, _ = shape("patch_embed.proj.weight", 4)
    num_positions = shape("pos_embed", 3)[1] - 1
    ffn: Literal["swiglu", "mlp"] = "swiglu" if "blocks.0.mlp.w12.weight" in state else "mlp"
    hidden = shape("blocks.0.mlp.w3.weight" if ffn == "swiglu" else "blocks.0.mlp.fc2.weight", 2)[1]
    if num_heads is None and width % HEAD_WIDTH:
        raise UserError(
            f"{source} has width {width}, no multiple of {HEAD_WIDTH}, and does not say its number of "
            "attention heads; use its Hugging Face folder, or give num_heads to weights.meta.load_meta."
        )
    side = round(max(num_positions, 1) ** 0.5)
    config = VitConfig(
        width=width,
        depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        num_heads=num_heads or width // HEAD_WIDTH,
        patch_size=patch_size,
        num_registers=shape("register_tokens", 3)[1] if "register_tokens" in state else 0,
        ffn=ffn,
        image_size=side * patch_size,
        interpolation=interpolation,
        in_channels=in_channels,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        norm_eps=NORM_EPS,
    )
    return _with_hidden(config, hidden)


def _with_hidden(config: VitConfig, hidden: int) -> VitConfig:
    for mlp_ratio in range(1, 17):
        candidate = replace(config, mlp_ratio=mlp_ratio)
        if candidate.hidden_width == hidden:
            return candidate
    return config  # the check of the keys then names the FFN's weights as wrongly shaped


def save_meta(model: VisionTransformer, path: str | Path) -> list[str]:
    """Write the weights as one flat .pth, as Meta's release files; replaces the file only when complete.

    A model that the original DINO's code can hold is written as that code expects it. Returns one line for
    each thing that the file leaves out or cannot carry; it holds no configuration.
    """
    config = model.config
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    notes: list[str] = []
    if not config.num_registers and config.ffn == "mlp" and not state["mask_token"].any():
        bare, notes = without_ones(state)
        if notes:
            bare.pop("mask_token")
            state = bare
    with replacing(Path(path)) as temporary:
        torch.save(state, temporary)
    theirs = "antialias" if config.num_registers else "scale"
    if config.interpolation != theirs:
        notes.append(
            f"Meta's code resizes the position embedding in another way ({theirs!r}, here "
            f"{config.interpolation!r}): its features are the same at {config.image_size} pixels only."
        )
    if config.norm_eps != NORM_EPS:
        notes.append(f"Meta's code has a layer norm epsilon of {NORM_EPS}, here {config.norm_eps}.")
    if config.fit != "crop":
        notes.append(f"a Meta .pth does not hold fit ({config.fit!r}); read back it is 'crop'.")
    return notes
