"""What fixes a backbone's shape: sizes and configuration. It needs no torch, so recipes are read at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from unlabeled.errors import UserError

# name: (width, depth, num_heads, ffn)
SIZES: dict[str, tuple[int, int, int, Literal["mlp", "swiglu"]]] = {
    "vit_tiny": (192, 12, 3, "mlp"),
    "vit_small": (384, 12, 6, "mlp"),
    "vit_base": (768, 12, 12, "mlp"),
    "vit_large": (1024, 24, 16, "mlp"),
    "vit_giant2": (1536, 40, 24, "swiglu"),
}
Interpolation = Literal["", "size", "antialias", "scale"]


@dataclass(frozen=True)
class VitConfig:
    """Everything that fixes a backbone's shape and its features, but not its weights."""

    width: int
    depth: int
    num_heads: int
    patch_size: int = 14  # pixels
    num_registers: int = 0
    ffn: Literal["mlp", "swiglu"] = "mlp"
    mlp_ratio: int = 4  # hidden width of the MLP over width; SwiGLU takes two thirds of it
    image_size: int = 518  # pixels; the position embedding is learned at (image_size // patch_size)^2 patches
    # How the position embedding is resized: "size" and "antialias" resize to the wanted grid without and with
    # antialiasing; "scale" passes the factor (side + 0.1) / learned side, as Meta's models without registers.
    # "": as transformers does for the kind, "antialias" with registers and "size" without.
    interpolation: Interpolation = ""
    fit: Literal["crop", "pad"] = "crop"  # sides that are no multiple of the patch: centre crop or zero pad
    # Initial value. A model without LayerScale, as the original DINO's, is one with ones: x * 1 is x exactly.
    layer_scale: float = 1e-5
    in_channels: int = 3
    qkv_bias: bool = True
    norm_eps: float = 1e-6  # of every layer norm, added to the variance

    def __post_init__(self) -> None:
        if not self.interpolation:
            object.__setattr__(self, "interpolation", "antialias" if self.num_registers else "size")

    @property
    def grid_side(self) -> int:
        """Patches along one side of the grid the position embedding is learned on."""
        return self.image_size // self.patch_size

    @property
    def hidden_width(self) -> int:
        """Width inside the FFN; SwiGLU: 8 * ceil(int(2/3 * mlp_ratio * width) / 8)."""
        hidden = self.mlp_ratio * self.width
        return hidden if self.ffn == "mlp" else 8 * math.ceil(int(hidden * 2 / 3) / 8)


def vit_config(size: str, **overrides: Any) -> VitConfig:
    """Return the configuration of a named size.

    size: a key of SIZES. overrides: fields of VitConfig by name.
    Raises UserError for an unknown size.
    """
    if size not in SIZES:
        raise UserError(f"Unknown backbone size {size!r}; choose one of {', '.join(SIZES)}.")
    width, depth, num_heads, ffn = SIZES[size]
    # The default interpolation follows num_registers, so it is decided anew.
    return replace(VitConfig(width, depth, num_heads, ffn=ffn), **{"interpolation": "", **overrides})


def parameter_shapes(config: VitConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each parameter of a VisionTransformer, in no order that matters."""
    D, hidden = config.width, config.hidden_width
    qkv_bias = {"attn.qkv.bias": (3 * D,)} if config.qkv_bias else {}
    ffn: dict[str, tuple[int, ...]]
    if config.ffn == "mlp":
        ffn = {
            "mlp.fc1.weight": (hidden, D), "mlp.fc1.bias": (hidden,),
            "mlp.fc2.weight": (D, hidden), "mlp.fc2.bias": (D,),
        }  # fmt: skip
    else:
        ffn = {
            "mlp.w12.weight": (2 * hidden, D), "mlp.w12.bias": (2 * hidden,),
            "mlp.w3.weight": (D, hidden), "mlp.w3.bias": (D,),
        }  # fmt: skip
    block: dict[str, tuple[int, ...]] = {
        "norm1.weight": (D,), "norm1.bias": (D,),
        "attn.qkv.weight": (3 * D, D), **qkv_bias, "attn.proj.weight": (D, D), "attn.proj.bias": (D,),
        "ls1.gamma": (D,),
        "norm2.weight": (D,), "norm2.bias": (D,),
        **ffn,
        "ls2.gamma": (D,),
    }  # fmt: skip
    return {
        "cls_token": (1, 1, D),
        "pos_embed": (1, 1 + config.grid_side**2, D),
        **({"register_tokens": (1, config.num_registers, D)} if config.num_registers else {}),
        "mask_token": (1, D),
        "patch_embed.proj.weight": (D, config.in_channels, config.patch_size, config.patch_size),
        "patch_embed.proj.bias": (D,),
        **{f"blocks.{i}.{name}": shape for i in range(config.depth) for name, shape in block.items()},
        "norm.weight": (D,),
        "norm.bias": (D,),
    }
