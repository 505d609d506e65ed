"""Adapters: what they change, and that merging changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.finetune.conftest import small_model
from unlabeled.errors import UserError
from unlabeled.finetune.backbone import learning
from unlabeled.finetune.lora import add_adapters, merge_adapters
from unlabeled.vit import VisionTransformer, VitConfig


@settings(max_examples=8, deadline=None)
@given(rank=st.integers(1, 16), mlp=st.booleans(), ffn=st.sampled_from(["mlp", "swiglu"]))
def test_merged_is_unmerged(rank: int, mlp: bool, ffn: str) -> None:
    torch.manual_seed(rank)
    config = VitConfig(width=32, depth=2, num_heads=2, patch_size=8, image_size=32, ffn=ffn, layer_scale=0.5)
    model = VisionTransformer(config).eval()
    images = torch.randn(2, 3, 32, 40)
    keys = model.state_dict().keys()
    with torch.no_grad():
        before = model(images)
        add_adapters(model, rank, mlp)
        torch.testing.assert_close(model(images).patches, before.patches, rtol=0, atol=0)
        for parameter in learning(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        unmerged = model(images)
        merge_adapters(model)
        merged = model(images)
    assert (unmerged.patches - before.patches).abs().max() > 1e-3
    assert (merged.patches - unmerged.patches).abs().max() < 1e-6
    assert (merged.cls - unmerged.cls).abs().max() < 1e-6
    assert model.state_dict().keys() == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapted_product_is_the_papers() -> None:
    model = small_model()
    qkv = model.blocks[0].attn.qkv
    plain = qkv.weight.detach().clone()
    add_adapters(model, 3)
    adapter = qkv.parametrizations.weight[0]
    torch.nn.init.normal_(adapter.up_OR)
    x = torch.randn(5, 32, dtype=torch.float64)
    wanted = x @ plain.double().T + (x @ adapter.down_RI.double().T) @ adapter.up_OR.double().T
    torch.testing.assert_close(x @ qkv.weight.double().T, wanted, rtol=0, atol=1e-5)


def test_only_adapters_learn() -> None:
    model = small_model(depth=2)
    add_adapters(model, 4)
    names = learning(model)
    assert len(names) == 2 * 2 * 2
    assert all("parametrizations" in name and "attn" in name for name in names)
    model = small_model(depth=2)
    add_adapters(model, 4, mlp=True)
    assert len(learning(model)) == 2 * 4 * 2


def test_a_rank_that_no_matrix_has() -> None:
    with pytest.raises(UserError, match="--lora 33 is no rank of 96 x 32"):
        add_adapters(small_model(), 33)
