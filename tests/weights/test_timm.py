"""timm's files: against timm's own model where it can be imported, by the key table everywhere."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.weights.conftest import CONFIGS
from unlabeled.errors import UserError
from unlabeled.vit import VisionTransformer, VitConfig
from unlabeled.weights.load import load_model
from unlabeled.weights.timm import load_timm, save_timm, to_timm

Make = Callable[..., VisionTransformer]


def test_round_trip(config: VitConfig, random_model: Make, tmp_path: Path) -> None:
    model = random_model(replace(config, interpolation="antialias"))
    notes = save_timm(model, tmp_path / "model.safetensors")
    assert notes[0] == "timm has no mask token: it was left out."
    assert len(notes) == (2 if config.num_registers else 1)
    loaded = load_timm(tmp_path / "model.safetensors", num_heads=config.num_heads)
    assert loaded.config.interpolation == "antialias" and not loaded.mask_token.any()
    p = config.patch_size
    for H, W in ((5 * p, 3 * p), (config.image_size, config.image_size)):
        images = torch.randn(1, config.in_channels, H, W)
        for ours, theirs in zip(model(images)[:3], loaded(images)[:3], strict=True):
            if config.num_registers:  # CLS and its position were summed up
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
            else:
                assert torch.equal(ours, theirs)


def test_keys_are_timms(random_model: Make, configs) -> None:
    plain, _ = to_timm(random_model(configs["swiglu"]))
    assert plain["blocks.0.mlp.fc1.weight"].shape[0] == 2 * plain["blocks.0.mlp.fc2.weight"].shape[1]
    assert plain["pos_embed"].shape[1] == 14 * 14 + 1 and "mask_token" not in plain
    registers, notes = to_timm(random_model(replace(configs["registers"], interpolation="size")))
    assert registers["reg_token"].shape == (1, 4, 48) and registers["pos_embed"].shape[1] == 37 * 37
    assert "register_tokens" not in registers and len(notes) == 3 and "518 pixels" in notes[2]


def test_the_file_s_keys_tell_the_format(random_model: Make, configs, tmp_path: Path) -> None:
    for name in ("small images", "small with registers"):
        model = random_model(replace(configs[name], width=64, num_heads=1))
        save_timm(model, tmp_path / "model.safetensors")
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "model.bin")
        for file in ("model.safetensors", "model.bin"):
            loaded = load_model(tmp_path / file)
            assert loaded.config.interpolation == "antialias"
            assert loaded.config.num_registers == model.config.num_registers
    state = load_file(tmp_path / "model.safetensors") | {"head.weight": torch.ones(2)}
    torch.save(state, tmp_path / "model.bin")
    with pytest.raises(UserError, match=r"unexpected: head\.weight"):
        load_model(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("kind", "with_layer_scale"),
    [
        *((kind, True) for kind, config in CONFIGS.items() if config.qkv_bias),
        ("plain", False),  # the original DINO
        ("small images", False),
    ],
)
def test_timm_s_own_model(kind: str, with_layer_scale: bool, random_model: Make, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm needs torchvision", exc_type=ImportError)
    from timm.layers import SwiGLUPacked

    config = CONFIGS[kind]
    ratio = 2 * config.hidden_width / config.width
    swiglu = {"mlp_ratio": ratio, "mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=0,
        init_values=1.0 if with_layer_scale else None,
        reg_tokens=config.num_registers,
        no_embed_class=config.num_registers > 0,
        dynamic_img_size=True,
        **(swiglu if config.ffn == "swiglu" else {"mlp_ratio": config.mlp_ratio}),
    ).eval()
    model = random_model(replace(config, interpolation="antialias"))
    if not with_layer_scale:
        for block in model.blocks:
            block.ls1.gamma.data.fill_(1)
            block.ls2.gamma.data.fill_(1)
    theirs.load_state_dict(to_timm(model)[0])
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    read = load_timm(tmp_path / "model.safetensors", num_heads=config.num_heads)
    assert replace(read.config, layer_scale=config.layer_scale) == model.config
    for H, W in ((5 * config.patch_size, 3 * config.patch_size), (config.image_size, config.image_size)):
        images = torch.randn(1, 3, H, W)
        for ours in (model(images), read(images)):
            whole = torch.cat((ours.cls[:, None], ours.registers, ours.patches), 1)
            torch.testing.assert_close(whole, theirs.forward_features(images), atol=1e-5, rtol=0)
