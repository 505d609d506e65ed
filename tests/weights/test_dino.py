"""The original DINO: transformers' ViTModel, Meta's files and checkpoints, and the way back out."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.weights.conftest import random_backbone
from unlabeled.errors import UserError
from unlabeled.vit import VisionTransformer, VitConfig
from unlabeled.weights.huggingface import save_huggingface
from unlabeled.weights.load import load_model
from unlabeled.weights.meta import save_meta
from unlabeled.weights.timm import save_timm

transformers = pytest.importorskip("transformers")

# As Meta's code has it; one head of 64 channels, so that a file without its number of heads can be read.
META = VitConfig(
    64, 2, 1, patch_size=8, image_size=224, interpolation="scale", layer_scale=1.0, norm_eps=1e-6
)


def dino_model(config: VitConfig = META) -> VisionTransformer:
    model = random_backbone(config)
    with torch.no_grad():
        model.mask_token.zero_()
        for block in model.blocks:
            block.ls1.gamma.fill_(1)
            block.ls2.gamma.fill_(1)
    return model


def dino_state(model: VisionTransformer) -> dict[str, Tensor]:
    """The keys of Meta's dino_*_pretrain.pth."""
    return {
        key: value for key, value in model.state_dict().items() if ".ls" not in key and key != "mask_token"
    }


def assert_same(a: VisionTransformer, b: VisionTransformer) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def random_vit(folder: Path, pooler: bool = True, mask: bool = False, **fields: int):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**fields, attn_implementation="eager")
    model = transformers.ViTModel(config, add_pooling_layer=pooler, use_mask_token=mask).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_matrix = parameter.dim() == 2 and "token" not in name
            parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if is_matrix else 0.3))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("width", "num_heads", "patch", "sizes"),
    [
        (384, 6, 16, [(224, 224), (96, 160)]),
        (384, 6, 8, [(64, 104)]),
        (768, 12, 16, [(224, 224)]),
        (768, 12, 8, [(64, 104)]),
    ],
    ids=["vits16", "vits8", "vitb16", "vitb8"],
)
def test_transformers_vit(width: int, num_heads: int, patch: int, sizes: list, tmp_path: Path) -> None:
    theirs = random_vit(
        tmp_path,
        hidden_size=width,
        num_attention_heads=num_heads,
        intermediate_size=4 * width,
        patch_size=patch,
    )
    ours = load_model(tmp_path)
    assert ours.config == VitConfig(
        width, 12, num_heads, patch, image_size=224, interpolation="size", layer_scale=1.0, norm_eps=1e-12
    )
    assert ours.notes == ("the file has no mask token: it is zeros",) and not ours.mask_token.any()
    for H, W in sizes:
        images = torch.randn(1, 3, H, W)
        with torch.no_grad():
            out = theirs(
                images, interpolate_pos_encoding=True, output_hidden_states=True, output_attentions=True
            )
            assert_near(whole(ours(images)), out.last_hidden_state)
            assert_near(ours.embed(images)[0], out.hidden_states[0])
            assert_near(ours.attention(images), out.attentions[-1])
            layers = ours.intermediate_layers(images, range(11), norm=False)
            for layer, tokens in enumerate(layers):
                assert_near(whole(tokens), out.hidden_states[layer + 1])
                block = ours.blocks[layer + 1]
                assert_near(block.attn.weights(block.norm1(whole(tokens))), out.attentions[layer + 1])


def whole(tokens) -> Tensor:
    return torch.cat((tokens.cls[:, None], tokens.patches), dim=1)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 8,
}


def test_masks_no_pooler_no_bias(tmp_path: Path) -> None:
    theirs = random_vit(tmp_path, pooler=False, mask=True, **SMALL | {"qkv_bias": False})
    ours = load_model(tmp_path)
    assert ours.notes == () and ours.config.mlp_ratio == 2 and not ours.config.qkv_bias
    images, masks = torch.randn(2, 3, 64, 64), torch.rand(2, 64) < 0.4
    assert_near(whole(ours(images, masks)), theirs(images, bool_masked_pos=masks).last_hidden_state)


def test_the_layout_on_disk_is_the_hubs(tmp_path: Path) -> None:
    """transformers 5 renames modules in memory; what facebook/dino-vits16 serves has the older names."""
    from safetensors.torch import load_file

    random_vit(tmp_path, **SMALL)
    keys = load_file(tmp_path / "model.safetensors").keys()
    for rest in (
        "attention.attention.query.weight", "attention.output.dense.bias", "intermediate.dense.weight",
        "output.dense.weight", "layernorm_before.weight", "layernorm_after.bias",
    ):  # fmt: skip
        assert f"encoder.layer.0.{rest}" in keys
    assert {"embeddings.cls_token", "pooler.dense.weight", "layernorm.weight"} <= keys


def test_what_does_not_fit_a_vit_is_named(tmp_path: Path) -> None:
    random_vit(tmp_path, **SMALL)
    path = tmp_path / "config.json"
    held = json.loads(path.read_text())
    for change, message in (
        ({"num_hidden_layers": 1}, r"unexpected: blocks\.1\."),
        ({"num_hidden_layers": 3}, r"missing: blocks\.2\.norm1\.weight"),
        ({"num_hidden_layers": 60_000}, r"missing: blocks\.2\.norm1\.weight"),
        ({"intermediate_size": 100}, "intermediate_size 100"),
        ({"num_attention_heads": 5}, "5 attention heads do not divide"),
        ({"image_size": 32}, r"wrong shape: pos_embed \(1, 65, 48\) instead of \(1, 17, 48\)"),
    ):
        path.write_text(json.dumps(held | change))
        with pytest.raises(UserError, match=message):
            load_model(tmp_path)


def test_a_classifier_s_backbone(tmp_path: Path) -> None:
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)).eval()
    theirs.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 64, 64)
    assert_near(whole(load_model(tmp_path)(images)), theirs.vit(images).last_hidden_state)


def test_meta_s_shapes_of_file(tmp_path: Path) -> None:
    model = dino_model()
    state = dino_state(model)
    heads = {f"head.mlp.{i}.weight": torch.ones(2) for i in (0, 2, 4)} | {
        "head.last_layer.weight_g": torch.ones(2)
    }
    inside = {f"backbone.{key}": value for key, value in state.items()} | heads
    other = {f"module.{key}": torch.zeros_like(value) for key, value in inside.items()}
    for held in (
        state,
        {"teacher": inside, "student": other},
        {
            "student": other,
            "teacher": {f"module.{key}": value for key, value in inside.items()},
            "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]},
            "epoch": 100,
            "args": argparse.Namespace(arch="vit_small", local_crops_scale=(0.05, 0.4)),
            "dino_loss": {"center": torch.zeros(1, 3)},
        },
    ):
        torch.save(held, tmp_path / "dino.pth")
        loaded = load_model(tmp_path / "dino.pth")
        assert_same(loaded, model)
        assert loaded.config == META and loaded.notes == ("the file has no mask token: it is zeros",)


def test_strict(tmp_path: Path) -> None:
    state = dino_state(dino_model())
    for change, without, message in (
        ({"head.weight": torch.ones(3)}, "", r"unexpected: head\.weight"),
        ({}, "blocks.1.norm2.bias", r"missing: blocks\.1\.norm2\.bias"),
        ({"blocks.0.ls1.gamma": torch.ones(64)}, "", "missing: .*ls"),
        ({"norm.bias": torch.ones(65)}, "", r"norm\.bias \(65,\) instead of \(64,\)"),
    ):
        held = {key: value for key, value in (state | change).items() if key != without}
        torch.save(held, tmp_path / "dino.pth")
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "dino.pth")


def test_exports_are_the_same_features(tmp_path: Path) -> None:
    """LayerScale of ones: Dinov2Model gives the features; Meta's and timm's files are without it again."""
    model = dino_model(replace(META, norm_eps=1e-12, interpolation="size"))
    assert save_huggingface(model, tmp_path / "hf") == []
    assert load_model(tmp_path / "hf").config == model.config
    assert_same(load_model(tmp_path / "hf"), model)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    assert type(theirs).__name__ == "Dinov2Model"
    images = torch.randn(1, 3, 64, 104)
    with torch.no_grad():
        assert_near(whole(model(images)), theirs(images).last_hidden_state)

    notes = save_meta(model, tmp_path / "dino.pth")
    assert torch.load(tmp_path / "dino.pth").keys() == dino_state(model).keys()
    assert [note.split()[0] for note in notes] == ["LayerScale", "Meta's", "Meta's"]
    assert "1e-12" in notes[2] and "'scale', here 'size'" in notes[1]
    back = load_model(tmp_path / "dino.pth", interpolation="size")
    assert_same(back, model)
    assert back.config == replace(model.config, norm_eps=1e-6)

    notes = save_timm(model, tmp_path / "model.safetensors")
    assert any("LayerScale" in note for note in notes) and any("1e-12" in note for note in notes)
    back = load_model(tmp_path / "model.safetensors")
    assert_same(back, model)
    assert back.config.interpolation == "antialias"


def test_layer_norm_epsilon_matters() -> None:
    model = dino_model()
    other = VisionTransformer(replace(META, norm_eps=1e-2)).eval()
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert (model(images).cls - other(images).cls).abs().max() > 1e-3
