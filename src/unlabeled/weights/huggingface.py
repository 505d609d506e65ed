"""Folders in Hugging Face format: config.json and model.safetensors, as Dinov2Model and its kin read them.

The original DINO is a ViTModel there; it is read, and written as a Dinov2Model whose LayerScale is ones.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unlabeled.errors import UserError
from unlabeled.images.transform import IMAGENET_MEAN, IMAGENET_STD
from unlabeled.json_file import read_json
from unlabeled.vit import VisionTransformer, VitConfig
from unlabeled.weights.dino import MASK_NOTE, with_layer_scale
from unlabeled.weights.files import State, fill, read_tensors, replacing, write_tensors
from unlabeled.weights.layout import OUR_QKV, OWN_KEY, QKV, TABLE, kind_of, read_config, weight_files
from unlabeled.weights.renaming import renamer

# What differs in a ViTModel, which has no LayerScale.
VIT_TABLE = (
    ("blocks.{i}.norm1", "encoder.layer.{i}.layernorm_before"),
    ("blocks.{i}.norm2", "encoder.layer.{i}.layernorm_after"),
    ("blocks.{i}.mlp.fc1", "encoder.layer.{i}.intermediate.dense"),
    ("blocks.{i}.mlp.fc2", "encoder.layer.{i}.output.dense"),
    *(pair for pair in TABLE if not re.search(r"norm\d|mlp|ls\d|register", pair[0])),
)
THEIR_QKV = re.compile(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)")
PREFIX = re.compile(r"^(dinov2(_with_registers)?|vit)\.")  # of the backbone inside a classifier


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
