"""Folders in Hugging Face format: config.json and model.safetensors, as Dinov2Model and its kin read them.

The original DINO is a ViTModel there; it is read, and written as a Dinov2Model whose LayerScale is ones.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from unlabeled.errors import UserError
from unlabeled.images.transform import IMAGENET_MEAN, IMAGENET_STD
from unlabeled.vit import Interpolation, VisionTransformer, VitConfig
from unlabeled.weights.dino import MASK_NOTE, with_layer_scale
from unlabeled.weights.files import State, fill, read_json, read_tensors, renamer, replacing, write_tensors

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
# What differs in a ViTModel, which has no LayerScale.
VIT_TABLE = (
    ("blocks.{i}.norm1", "encoder.layer.{i}.layernorm_before"),
    ("blocks.{i}.norm2", "encoder.layer.{i}.layernorm_after"),
    ("blocks.{i}.mlp.fc1", "encoder.layer.{i}.intermediate.dense"),
    ("blocks.{i}.mlp.fc2", "encoder.layer.{i}.output.dense"),
    *(pair for pair in TABLE if not re.search(r"norm\d|mlp|ls\d|register", pair[0])),
)
# blocks.{i}.attn.qkv is encoder.layer.{i}.attention.attention.query, .key and .value, stacked in this order.
QKV = ("query", "key", "value")
OUR_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
THEIR_QKV = re.compile(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)")
PREFIX = re.compile(r"^(dinov2(_with_registers)?|vit)\.")  # of the backbone inside a classifier

KINDS = ("dinov2", "dinov2_with_registers", "vit")
LARGEST = 2**16  # of any size in a configuration
OWN_KEY = "unlabeled"  # what transformers' config has no field for


def load_huggingface(folder: str | Path, weights: Path | None = None) -> VisionTransformer:
    """Return the model of a folder in Hugging Face format, in evaluation mode.

    weights: a file to read in the place of the folder's own; one of those stands for all of them.
    A classifier on top of the backbone is left out.
    Raises UserError for another kind of model, or missing, unexpected or wrongly shaped keys.
    """
    folder = Path(folder)
    config = read_config(folder / "config.json")
    tensors: State = {}
    files = weight_files(folder)
    if weights and weights not in files:
        files = [weights]
    if not files:
        raise UserError(f"{folder} has a config.json but no weights; model.safetensors should lie beside it.")
    for path in files:
        tensors.update(read_tensors(path))
    is_vit = read_json(folder / "config.json")["model_type"] == "vit"
    state = from_huggingface(tensors, config, is_vit)
    notes = []
    if "mask_token" not in state:  # a ViTModel without use_mask_token has learned none
        state["mask_token"] = torch.zeros(1, config.width)
        notes.append(MASK_NOTE)
    return fill(config, state, str(folder), notes)


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


def from_huggingface(tensors: Mapping[str, torch.Tensor], config: VitConfig, is_vit: bool = False) -> State:
    """Return our state dict of a Hugging Face one; keys that are not known stay as they are.

    is_vit: the model is a ViTModel; its pooler, which the original DINO never trained, is left out.
    """
    rename = renamer((theirs, ours) for ours, theirs in (VIT_TABLE if is_vit else TABLE))
    classifier = any(PREFIX.match(key) for key in tensors)
    state: State = {}
    thirds: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        key = PREFIX.sub("", key)
        if match := THEIR_QKV.fullmatch(key):
            thirds.setdefault(f"blocks.{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = value
        elif not (classifier and key.startswith("classifier.")) and not (
            is_vit and key.startswith("pooler.dense.")
        ):
            state[rename(key)] = value
    for name, parts in thirds.items():
        if len(parts) == len(QKV):
            state[name] = torch.cat([parts[part] for part in QKV])
        else:
            state.update({f"{name} ({part})": value for part, value in parts.items()})
    if not config.num_registers:
        state.pop("register_tokens", None)  # of length zero
    if is_vit:
        state = with_layer_scale(state, config.width)
        if "mask_token" in state:
            state["mask_token"] = state["mask_token"].flatten(0, 1)  # (1, 1, D) in a ViTModel
    return state


def to_huggingface(model: VisionTransformer) -> State:
    """Return the Hugging Face state dict, as it lies on disk."""
    rename = renamer(TABLE)
    state: State = {}
    for name, value in model.state_dict().items():
        value = value.detach().cpu()
        if match := OUR_QKV.fullmatch(name):
            for part, third in zip(QKV, value.chunk(3), strict=True):
                state[f"encoder.layer.{match[1]}.attention.attention.{part}.{match[2]}"] = third.clone()
        else:
            state[rename(name)] = value.clone()
    if kind_of(model.config) == "dinov2_with_registers" and not model.config.num_registers:
        state["embeddings.register_tokens"] = torch.zeros(1, 0, model.config.width)
    return state


def kind_of(config: VitConfig) -> str:
    """Return the model_type under which transformers resizes the position embedding as this model does.

    Without registers and with antialiasing that is the kind with registers, of which there are none.
    """
    with_registers = config.num_registers or config.interpolation == "antialias"
    return "dinov2_with_registers" if with_registers else "dinov2"


def to_config(config: VitConfig) -> dict[str, Any]:
    """Return the contents of config.json."""
    kind = kind_of(config)
    held: dict[str, Any] = {
        "architectures": ["Dinov2Model" if kind == "dinov2" else "Dinov2WithRegistersModel"],
        "model_type": kind,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "layer_norm_eps": config.norm_eps,
        "layerscale_value": config.layer_scale,
        "use_swiglu_ffn": config.ffn == "swiglu",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "qkv_bias": config.qkv_bias,
        "torch_dtype": "float32",
        OWN_KEY: {"interpolation": config.interpolation, "fit": config.fit},
    }
    if kind == "dinov2_with_registers":
        held["num_register_tokens"] = config.num_registers
    return held


def to_preprocessor(config: VitConfig) -> dict[str, Any]:
    """Return the contents of preprocessor_config.json: the evaluation transform, as facebook/dinov2-* has it.

    Centre crops of 224 pixels out of a short side of 256, or as much less as the images the model was trained
    on are smaller.
    """
    side = min(224, config.image_size)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side + 2 * round(side / 14)},
        "resample": 3,  # Pillow's number of bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def save_huggingface(model: VisionTransformer, folder: str | Path) -> list[str]:
    """Write config.json, model.safetensors and preprocessor_config.json, each replaced only when complete.

    transformers.AutoModel.from_pretrained(folder) then gives this model's features, and AutoImageProcessor
    prepares images for it. Returns one line for each thing that transformers cannot carry.
    """
    folder = Path(folder)
    with (
        replacing(folder / "config.json") as config_path,
        replacing(folder / "preprocessor_config.json") as preprocessor_path,
        replacing(folder / "model.safetensors") as weights_path,
    ):
        write_tensors(to_huggingface(model), weights_path, metadata={"format": "pt"})
        _write_json(to_preprocessor(model.config), preprocessor_path)
        _write_json(to_config(model.config), config_path)
    theirs = "size" if kind_of(model.config) == "dinov2" else "antialias"
    if model.config.interpolation == theirs:
        return []
    return [
        "transformers resizes the position embedding in another way "
        f"({theirs!r}, here {model.config.interpolation!r}): "
        f"its features are the same at {model.config.image_size} pixels only."
    ]


def _write_json(held: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
