"""How a folder in Hugging Face format is laid out: its config.json, and the names and shapes of its weights.

It needs no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from unlabeled.errors import UserError
from unlabeled.json_file import read_json
from unlabeled.vit_config import Interpolation, VitConfig, parameter_shapes
from unlabeled.weights.renaming import renamer

# ours, theirs on disk (transformers 5 renames modules in memory, not on disk)
TABLE = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("mask_token", "embeddings.mask_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("blocks.{i}.norm1", "encoder.layer.{i}.norm1"),
    ("blocks.{i}.norm2", "encoder.layer.{i}.norm2"),
    ("blocks.{i}.attn.proj", "encoder.layer.{i}.attention.output.dense"),
    ("blocks.{i}.ls1.gamma", "encoder.layer.{i}.layer_scale1.lambda1"),
    ("blocks.{i}.ls2.gamma", "encoder.layer.{i}.layer_scale2.lambda1"),
    ("blocks.{i}.mlp.fc1", "encoder.layer.{i}.mlp.fc1"),
    ("blocks.{i}.mlp.fc2", "encoder.layer.{i}.mlp.fc2"),
    ("blocks.{i}.mlp.w12", "encoder.layer.{i}.mlp.weights_in"),
    ("blocks.{i}.mlp.w3", "encoder.layer.{i}.mlp.weights_out"),
    ("norm", "layernorm"),
)
# blocks.{i}.attn.qkv is encoder.layer.{i}.attention.attention.query, .key and .value, stacked in this order.
QKV = ("query", "key", "value")
OUR_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")

KINDS = ("dinov2", "dinov2_with_registers", "vit")
LARGEST = 2**16  # of any size in a configuration
OWN_KEY = "unlabeled"  # what transformers' config has no field for


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        names = shards.values() if isinstance(shards, dict) else [None]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise UserError(f"{index} names no weight files; fetch or export the model anew.")
        return [folder / name for name in sorted(set(names))]
    single = (folder / name for name in ("model.safetensors", "pytorch_model.bin"))
    return [path for path in single if path.exists()][:1]


def read_config(path: Path) -> VitConfig:
    """Return the configuration in a Hugging Face config.json.

    Raises UserError for another model than DINOv2 or DINO, or a variant that this backbone does not have.
    """
    held = read_json(path)
    kind = held.get("model_type")
    if kind not in KINDS:
        raise UserError(f"{path} is of model_type {kind!r}; a backbone here is one of {', '.join(KINDS)}.")
    if held.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path} has hidden_act {held['hidden_act']!r}; only 'gelu' can be loaded.")
    with_registers, is_vit = kind == "dinov2_with_registers", kind == "vit"
    width = _count(held, "hidden_size", 768, path)
    num_heads = _count(held, "num_attention_heads", 12, path)
    if width % num_heads:
        raise UserError(f"{path} has hidden_size {width}, which {num_heads} attention heads do not divide.")
    hidden = _count(held, "intermediate_size", 3072, path)
    if is_vit and hidden % width:
        raise UserError(f"{path} has intermediate_size {hidden}; only multiples of {width} can be loaded.")
    own = held.get(OWN_KEY)
    own = own if isinstance(own, dict) else {}
    interpolation = own.get("interpolation", "antialias" if with_registers else "size")
    return VitConfig(
        width=width,
        depth=_count(held, "num_hidden_layers", 12, path),
        num_heads=num_heads,
        patch_size=_side(held.get("patch_size", 14 if kind == "dinov2" else 16), "patch_size", path),
        num_registers=_count(held, "num_register_tokens", 4, path, least=0) if with_registers else 0,
        ffn="swiglu"
        if _choice(held.get("use_swiglu_ffn", False), (False, True), "use_swiglu_ffn", path)
        else "mlp",
        mlp_ratio=hidden // width if is_vit else _count(held, "mlp_ratio", 4, path),
        image_size=_side(held.get("image_size", 224), "image_size", path),
        interpolation=_choice(interpolation, get_args(Interpolation), "interpolation", path),
        fit=_choice(own.get("fit", "crop"), ("crop", "pad"), "fit", path),
        layer_scale=1.0 if is_vit else _number(held, "layerscale_value", 1.0, path),
        in_channels=_count(held, "num_channels", 3, path),
        qkv_bias=_choice(held.get("qkv_bias", True), (False, True), "qkv_bias", path),
        norm_eps=_number(held, "layer_norm_eps", 1e-12 if is_vit else 1e-6, path),
    )


def _count(held: Mapping[str, Any], field: str, default: int, path: Path, least: int = 1) -> int:
    value = held.get(field, default)
    if not isinstance(value, int | float) or value % 1 or not least <= value <= LARGEST:
        raise UserError(f"{path} has {field} {value!r}; expected a whole number from {least} to {LARGEST}.")
    return int(value)


def _number(held: Mapping[str, Any], field: str, default: float, path: Path) -> float:
    value = held.get(field, default)
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"{path} has {field} {value!r}; expected a number of 0 or more.")
    return float(value)


def _choice(value: Any, choices: tuple[Any, ...], field: str, path: Path) -> Any:
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices if choice != "")
        raise UserError(f"{path} has {field} {value!r}; expected one of {known}.")
    return value


def _side(value: Any, field: str, path: Path) -> int:
    sides = value if isinstance(value, list) else [value]
    if not sides or any(side != sides[0] for side in sides):
        raise UserError(f"{path} has {field} {value}; only square ones can be loaded.")
    return _count({field: sides[0]}, field, 0, path)


def kind_of(config: VitConfig) -> str:
    """Return the model_type under which transformers resizes the position embedding as this model does.

    Without registers and with antialiasing that is the kind with registers, of which there are none.
    """
    with_registers = config.num_registers or config.interpolation == "antialias"
    return "dinov2_with_registers" if with_registers else "dinov2"


def their_shapes(config: VitConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each weight as they lie on disk, in a model that has what the configuration says."""
    rename = renamer(TABLE)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(config).items():
        if match := OUR_QKV.fullmatch(name):
            third = (shape[0] // len(QKV), *shape[1:])
            for part in QKV:
                shapes[f"encoder.layer.{match[1]}.attention.attention.{part}.{match[2]}"] = third
        else:
            shapes[rename(name)] = shape
    if kind_of(config) == "dinov2_with_registers" and not config.num_registers:
        shapes["embeddings.register_tokens"] = (1, 0, config.width)
    return shapes
