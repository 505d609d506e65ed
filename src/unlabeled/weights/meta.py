"""Meta's .pth files: the flat release files, training exports with heads, and chunked blocks.

Our state-dict keys are those of the flat release files, so what is left to do is to unwrap the others.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unlabeled.errors import UserError
from unlabeled.vit import VisionTransformer, VitConfig
from unlabeled.weights.files import State, fill, read_tensors, replacing

HEADS = ("dino_head.", "ibot_head.")  # stand beside "backbone." in a training export; not part of a backbone
CHUNKED_BLOCK = re.compile(r"blocks\.\d+\.(\d+)\.(.*)")  # blocks.{chunk}.{absolute index}.{rest}
HEAD_WIDTH = 64  # of every released size; the files do not hold the number of heads


def load_meta(path: str | Path, num_heads: int | None = None) -> VisionTransformer:
    """Return the model of a Meta .pth file, in evaluation mode.

    num_heads: attention heads; by default width / 64, as in every released model.
    Raises UserError for a file of another kind, or with missing, unexpected or wrongly shaped keys.
    """
    return from_meta(read_tensors(Path(path)), str(path), num_heads)


def from_meta(held: Mapping[str, Any], source: str, num_heads: int | None = None) -> VisionTransformer:
    """Return the model of the contents of a Meta .pth file; `source` names the file in errors."""
    state = unwrap(held)
    has_registers = "register_tokens" in state
    interpolation = "antialias" if has_registers else "scale"
    return fill(config_of(state, source, interpolation, num_heads), state, source)


def unwrap(held: Mapping[str, Any]) -> State:
    """Return the flat state dict from any of the three shapes of file."""
    teacher = held.get("teacher", held)
    if any(key.startswith("backbone.") for key in teacher):
        teacher = {
            key.removeprefix("backbone."): value
            for key, value in teacher.items()
            if not key.startswith(HEADS)
        }
    return {CHUNKED_BLOCK.sub(r"blocks.\1.\2", key): value for key, value in teacher.items()}


def config_of(
    state: Mapping[str, Tensor], source: str, interpolation: str, num_heads: int | None = None
) -> VitConfig:
    """Read the configuration off the shapes of a flat state dict.

    Raises UserError if the file is no vision transformer of this kind.
    """
    try:
        width, in_channels, patch_size, _ = state["patch_embed.proj.weight"].shape
        num_positions = state["pos_embed"].shape[1] - 1
        ffn = "swiglu" if "blocks.0.mlp.w12.weight" in state else "mlp"
        hidden = state["blocks.0.mlp.w3.weight" if ffn == "swiglu" else "blocks.0.mlp.fc2.weight"].shape[1]
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{source} holds no DINOv2 backbone ({error} is missing or odd); expected the weights of a Meta "
            ".pth, a timm or a Hugging Face file."
        ) from error
    if num_heads is None and width % HEAD_WIDTH:
        raise UserError(
            f"{source} has width {width}, no multiple of {HEAD_WIDTH}, and does not say its number of "
            "attention heads; use its Hugging Face folder, or give num_heads to weights.meta.load_meta."
        )
    side = round(num_positions**0.5)
    config = VitConfig(
        width=width,
        depth=1 + max(int(key.split(".")[1]) for key in state if re.match(r"blocks\.\d+\.", key)),
        num_heads=num_heads or width // HEAD_WIDTH,
        patch_size=patch_size,
        num_registers=state["register_tokens"].shape[1] if "register_tokens" in state else 0,
        ffn=ffn,  # type: ignore[arg-type]
        image_size=side * patch_size,
        interpolation=interpolation,  # type: ignore[arg-type]
        in_channels=in_channels,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
    )
    return _with_hidden(config, hidden)


def _with_hidden(config: VitConfig, hidden: int) -> VitConfig:
    for mlp_ratio in range(1, 17):
        candidate = replace(config, mlp_ratio=mlp_ratio)
        if candidate.hidden_width == hidden:
            return candidate
    return config  # the check of the keys then names the FFN's weights as wrongly shaped


def save_meta(model: VisionTransformer, path: str | Path) -> None:
    """Write the weights as one flat .pth, as Meta's release files; replaces the file only when complete."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with replacing(Path(path)) as temporary:
        torch.save(state, temporary)
