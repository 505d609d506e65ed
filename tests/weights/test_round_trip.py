"""Ours -> Hugging Face -> ours -> Meta -> ours -> timm -> ours, over configurations: bit for bit, or said."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.weights.conftest import random_backbone
from unlabeled.vit import VisionTransformer, VitConfig
from unlabeled.weights.export import lost_heads
from unlabeled.weights.huggingface import save_huggingface
from unlabeled.weights.load import load_model
from unlabeled.weights.meta import load_meta, save_meta
from unlabeled.weights.timm import load_timm, save_timm

# field: how the note on it begins to be known
WORDS = {
    "interpolation": "position embedding",
    "norm_eps": "epsilon",
    "fit": "hold fit",
    "mask_token": "mask",
}


@st.composite
def vit_configs(draw: st.DrawFn) -> VitConfig:
    num_heads, head_width, patch = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from((4, 64))),
        draw(st.integers(1, 5)),
    )
    return VitConfig(
        width=num_heads * head_width,
        depth=draw(st.integers(1, 3)),
        num_heads=num_heads,
        patch_size=patch,
        num_registers=draw(st.integers(0, 5)),
        ffn=draw(st.sampled_from(("mlp", "swiglu"))),
        mlp_ratio=draw(st.integers(1, 4)),
        image_size=patch * draw(st.integers(1, 5)),
        interpolation=draw(st.sampled_from(("size", "antialias", "scale"))),
        fit=draw(st.sampled_from(("crop", "pad"))),
        in_channels=draw(st.integers(1, 4)),
        qkv_bias=draw(st.booleans()),
        norm_eps=draw(st.sampled_from((1e-6, 1e-12))),
    )


def without_layer_scale(model: VisionTransformer) -> VisionTransformer:
    """As the original DINO is read: LayerScale of ones, and no mask token."""
    with torch.no_grad():
        model.mask_token.zero_()
        for name, value in model.named_parameters():
            if name.endswith("gamma"):
                value.fill_(1)
    return model


def differing(a: VisionTransformer, b: VisionTransformer) -> set[str]:
    """Names of weights that are not the same bit for bit; both models have the same names."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return {name for name, value in ours.items() if not torch.equal(value, theirs[name])}


def said(notes: list[str]) -> set[str]:
    return {field for field, words in WORDS.items() if any(words in note for note in notes)}


def lost(before: VitConfig, after: VitConfig) -> set[str]:
    """Fields that a bare state dict has not brought along; all others are the same."""
    fields = {name for name in WORDS if getattr(before, name, 0) != getattr(after, name, 0)}
    brought = {name: getattr(after, name) for name in (*fields, "layer_scale", "mlp_ratio")}
    assert replace(before, **brought) == after and before.hidden_width == after.hidden_width
    return fields


@settings(max_examples=25, deadline=None)
@given(config=vit_configs(), is_dino=st.booleans())
@example(config=VitConfig(64, 2, 1, patch_size=4, image_size=16, norm_eps=1e-12), is_dino=True)
@example(config=VitConfig(64, 2, 1, patch_size=4, image_size=16, num_registers=4), is_dino=False)
def test_every_format_in_turn(config: VitConfig, is_dino: bool) -> None:
    first = random_backbone(config)
    if is_dino:
        first = without_layer_scale(first)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save_huggingface(first, path / "hf")
        second = load_model(path / "hf")
        assert second.config == config and not differing(first, second)

        notes = save_meta(second, path / "model.pth")
        third = load_meta(path / "model.pth", num_heads=config.num_heads)
        assert not differing(first, third)
        assert said(notes) == lost(config, third.config)
        third.config = second.config  # by hand, what was said to be lost

        notes = save_timm(third, path / "model.safetensors")
        last = load_timm(path / "model.safetensors", num_heads=config.num_heads)
        assert said(notes) == lost(config, last.config) | (
            {"mask_token"} if first.mask_token.any() else set()
        )
        folded = {"cls_token", "pos_embed"} if config.num_registers else set()
        assert differing(first, last) <= {"mask_token"} | folded
        assert torch.equal(
            last.cls_token + last.pos_embed[:, :1], first.cls_token + first.pos_embed[:, :1]
        ) and torch.equal(last.pos_embed[:, 1:], first.pos_embed[:, 1:])
        assert bool(folded) == any("added to the CLS token" in note for note in notes)

        if not lost_heads(config):  # then nothing has to be given
            assert load_model(path / "model.pth").config.num_heads == config.num_heads
            assert not differing(last, load_model(path / "model.safetensors"))
