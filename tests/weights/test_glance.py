"""What is told of a model without torch is what torch tells."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from unlabeled.errors import UserError
from unlabeled.vit import VisionTransformer, VitConfig
from unlabeled.vit_config import parameter_shapes
from unlabeled.weights import glance
from unlabeled.weights.files import read_tensors, write_tensors
from unlabeled.weights.huggingface import save_huggingface
from unlabeled.weights.load import load_model

PLAIN = VitConfig(width=32, depth=2, num_heads=2, image_size=70)
CONFIGS = {
    "plain": PLAIN,
    "registers": dataclasses.replace(PLAIN, num_registers=4, interpolation="antialias"),
    "no registers, antialiased": dataclasses.replace(PLAIN, interpolation="antialias"),
    "swiglu": dataclasses.replace(PLAIN, ffn="swiglu", fit="pad"),
    "no bias": dataclasses.replace(PLAIN, qkv_bias=False, patch_size=7, in_channels=1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_the_models(name: str) -> None:
    with torch.device("meta"):
        model = VisionTransformer(CONFIGS[name])
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert parameter_shapes(CONFIGS[name]) == shapes
    assert shapes.keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("place", [".", "model"], ids=["folder", "run"])
def test_a_folder_is_told_without_loading_it(name: str, place: str, tmp_path: Path) -> None:
    save_huggingface(VisionTransformer(CONFIGS[name]), tmp_path / place)
    model = load_model(tmp_path)
    seen = glance._plain(str(tmp_path))
    assert seen is not None
    assert seen.config == model.config
    assert seen.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert seen.notes == model.notes


def test_what_is_not_float32_is_loaded(tmp_path: Path) -> None:
    save_huggingface(VisionTransformer(PLAIN), tmp_path)
    path = tmp_path / "model.safetensors"
    write_tensors({name: value.bfloat16() for name, value in read_tensors(path).items()}, path)
    assert glance._plain(str(tmp_path)) is None
    assert glance.glance(str(tmp_path)).config == PLAIN


@pytest.mark.parametrize(
    "damage", ["not finite", "missing", "shape", "cut off", "configuration", "no weights"]
)
def test_damage_is_told_as_in_loading(damage: str, tmp_path: Path) -> None:
    save_huggingface(VisionTransformer(PLAIN), tmp_path)
    path, key = tmp_path / "model.safetensors", "encoder.layer.1.norm1.bias"
    tensors = {name: value.clone() for name, value in read_tensors(path).items()}
    if damage == "not finite":
        tensors[key][3] = torch.nan
    elif damage == "missing":
        del tensors[key]
    elif damage == "shape":
        tensors[key] = torch.zeros(5)
    write_tensors(tensors, path)
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "no weights":
        path.unlink()
    elif damage == "configuration":
        held = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 60000}
        (tmp_path / "config.json").write_text(json.dumps(held))
    with pytest.raises(UserError) as told:
        glance.glance(str(tmp_path))
    with pytest.raises(UserError) as loading:
        load_model(str(tmp_path))
    assert str(told.value) == str(loading.value)
