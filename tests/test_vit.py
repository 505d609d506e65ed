"""The backbone against plain formulas; against transformers: tests/weights/test_huggingface.py."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unlabeled.errors import UserError
from unlabeled.vit import (
    SIZES,
    Tokens,
    VisionTransformer,
    VitConfig,
    fit_to_patches,
    vit_config,
)

TINY = VitConfig(
    width=24, depth=3, num_heads=2, patch_size=4, image_size=32, num_registers=2, layer_scale=0.5
)


def randomised(config: VitConfig, seed: int = 0, **kwargs: float) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(config, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


# The whole backbone once more, in float64, from the formulas; only the weights are shared.


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def reference_blocks(model: VisionTransformer, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    w = {name: value.double() for name, value in model.state_dict().items()}
    heads, hidden_states, attentions = model.config.num_heads, [x], []
    for i in range(model.config.depth):
        b = f"blocks.{i}."
        normed = layer_norm(x, w[b + "norm1.weight"], w[b + "norm1.bias"])
        mixed, weights = [], []
        qkv = normed @ w[b + "attn.qkv.weight"].T + w[b + "attn.qkv.bias"]
        query, key, value = qkv.split(model.config.width, dim=-1)
        for h in range(heads):
            head = slice(h * model.config.width // heads, (h + 1) * model.config.width // heads)
            logits = query[..., head] @ key[..., head].transpose(1, 2) / math.sqrt(model.config.width / heads)
            exp = (logits - logits.amax(-1, keepdim=True)).exp()
            weights.append(exp / exp.sum(-1, keepdim=True))
            mixed.append(weights[-1] @ value[..., head])
        out = torch.cat(mixed, -1) @ w[b + "attn.proj.weight"].T + w[b + "attn.proj.bias"]
        x = x + w[b + "ls1.gamma"] * out
        normed = layer_norm(x, w[b + "norm2.weight"], w[b + "norm2.bias"])
        if model.config.ffn == "mlp":
            hidden = normed @ w[b + "mlp.fc1.weight"].T + w[b + "mlp.fc1.bias"]
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            out = hidden @ w[b + "mlp.fc2.weight"].T + w[b + "mlp.fc2.bias"]
        else:
            both = normed @ w[b + "mlp.w12.weight"].T + w[b + "mlp.w12.bias"]
            gate, value = both[..., : both.shape[-1] // 2], both[..., both.shape[-1] // 2 :]
            hidden = gate * torch.sigmoid(gate) * value
            out = hidden @ w[b + "mlp.w3.weight"].T + w[b + "mlp.w3.bias"]
        x = x + w[b + "ls2.gamma"] * out
        hidden_states.append(x)
        attentions.append(torch.stack(weights, 1))
    return hidden_states, attentions


def reference_embed(model: VisionTransformer, images: Tensor, masks: Tensor | None = None) -> Tensor:
    """At the learned size only: the position embedding is added as it is."""
    w = {name: value.double() for name, value in model.state_dict().items()}
    p, rows = model.config.patch_size, []
    for b, image in enumerate(images.double()):
        patches = []
        for top in range(0, image.shape[1], p):
            for left in range(0, image.shape[2], p):
                pixels = image[:, top : top + p, left : left + p]
                patches.append(
                    (w["patch_embed.proj.weight"] * pixels).sum((1, 2, 3)) + w["patch_embed.proj.bias"]
                )
                if masks is not None and masks[b, len(patches) - 1]:
                    patches[-1] = w["mask_token"][0]
        tokens = torch.cat((w["cls_token"][0], torch.stack(patches))) + w["pos_embed"][0]
        registers = w["register_tokens"][0] if model.config.num_registers else tokens[:0]
        rows.append(torch.cat((tokens[:1], registers, tokens[1:])))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "config",
    [TINY, replace(TINY, num_registers=0), replace(TINY, ffn="swiglu"), replace(TINY, depth=1, num_heads=3)],
    ids=["registers", "no registers", "swiglu", "shallow"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_forward_is_the_formula(config: VitConfig, masked: bool) -> None:
    model = randomised(config)
    images = torch.randn(2, 3, 32, 32)
    masks = torch.rand(2, 64) < 0.3 if masked else None
    hidden, attentions = reference_blocks(model, reference_embed(model, images, masks))
    last = layer_norm(hidden[-1], model.norm.weight.double(), model.norm.bias.double())
    tokens = model(images, masks)
    assert isinstance(tokens, Tokens) and tokens.grid == (8, 8)
    R = config.num_registers
    torch.testing.assert_close(tokens.cls.double(), last[:, 0], atol=2e-5, rtol=0)
    torch.testing.assert_close(tokens.registers.double(), last[:, 1 : 1 + R], atol=2e-5, rtol=0)
    torch.testing.assert_close(tokens.patches.double(), last[:, 1 + R :], atol=2e-5, rtol=0)
    if not masked:
        for layer in range(config.depth):
            weights = model.attention(images, layer)
            torch.testing.assert_close(weights.double(), attentions[layer], atol=1e-5, rtol=0)
        raw = model.intermediate_layers(images, range(config.depth), norm=False)
        for layer, tokens in enumerate(raw):
            whole = torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), 1)
            torch.testing.assert_close(whole.double(), hidden[layer + 1], atol=5e-5, rtol=1e-5)


def test_gradients_are_the_formula_s() -> None:
    model = randomised(TINY)
    images = torch.randn(2, 3, 32, 32)
    masks = torch.rand(2, 64) < 0.3
    weights = torch.randn(2, 67, 24)
    tokens = model(images, masks)
    (torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), 1) * weights).sum().backward()
    ours = {name: parameter.grad.double() for name, parameter in model.named_parameters()}

    copy = randomised(TINY).double()
    state = dict(copy.named_parameters())
    copy.state_dict = lambda: state  # type: ignore[method-assign,assignment]
    hidden, _ = reference_blocks(copy, reference_embed(copy, images, masks))
    (layer_norm(hidden[-1], copy.norm.weight, copy.norm.bias) * weights).sum().backward()
    for name, parameter in state.items():
        scale = parameter.grad.abs().max().clamp(min=1)
        assert (ours[name] - parameter.grad).abs().max() < 2e-5 * scale, name


@pytest.mark.parametrize("layer_scale", [1e-5, 1.0])
def test_autocast_is_near_float32(layer_scale: float) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(replace(TINY, width=64, layer_scale=layer_scale)).eval()
    images = torch.randn(2, 3, 40, 24)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        near = model(images)
        weights = model.attention(images)
    assert near.cls.dtype == torch.float32 and weights.dtype == torch.float32
    torch.testing.assert_close(near.patches, exact.patches, atol=0.08, rtol=0)
    torch.testing.assert_close(weights, model.attention(images), atol=0.02, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: str) -> None:
    with torch.device("meta"):
        model = VisionTransformer(vit_config(size))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    published = {"vit_small": 22.06, "vit_base": 86.58, "vit_large": 304.37, "vit_giant2": 1136.48}
    assert millions == pytest.approx(published.get(size, 5.72), abs=0.006)
    config = vit_config(size, patch_size=16, num_registers=4)
    assert config.interpolation == "antialias" and vit_config(size).interpolation == "size"
    assert vit_config(size, num_registers=4, interpolation="size").interpolation == "size"
    assert config.width // config.num_heads == 64
    if size == "vit_giant2":
        assert model.blocks[0].mlp.w12.weight.shape == (8192, 1536)


def test_unknown_size() -> None:
    with pytest.raises(UserError, match="vit_small"):
        vit_config("vit_smal")


def test_fresh_weights() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(vit_config("vit_small", depth=2, num_registers=4, image_size=224))
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.15)
    assert 0 < model.cls_token.abs().max() < 1e-5 and 0 < model.register_tokens.abs().max() < 1e-5
    assert not model.mask_token.any()
    for block in model.blocks:
        assert torch.equal(block.ls1.gamma, torch.full((384,), 1e-5))
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and not linear.bias.any()
    bound = 1 / math.sqrt(3 * 14 * 14)
    assert 0.95 * bound < model.patch_embed.proj.weight.abs().max() <= bound


# Position interpolation


def cubic(distance: float, a: float) -> float:
    x = abs(distance)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def formula_matrix(side: int, size: int, mode: str) -> Tensor:
    """Bicubic resizing of one axis as a (size, side) matrix, from the formula (Keys 1981), edges clamped.

    Antialiasing widens the kernel by the factor of shrinking, takes a = -0.5 as Pillow does, and leaves
    out what lies beyond the edge.
    """
    matrix = torch.zeros(size, side, dtype=torch.float64)
    step = side / (size + 0.1) if mode == "scale" else side / size
    for i in range(size):
        centre = (i + 0.5) * step - 0.5
        if mode == "antialias":
            wide = max(step, 1.0)
            weights = [cubic((j - centre) / wide, -0.5) for j in range(side)]
            matrix[i] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        else:
            for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
                matrix[i, min(max(j, 0), side - 1)] += cubic(j - centre, -0.75)
    return matrix


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 12),
    st.integers(1, 16),
    st.integers(1, 16),
    st.sampled_from(["size", "antialias", "scale"]),
)
def test_position_interpolation_is_the_formula(side: int, h: int, w: int, mode: str) -> None:
    model = randomised(replace(TINY, depth=1, image_size=4 * side, interpolation=mode))
    embedding = model.position_embedding((h, w))[0].double()
    learned = model.pos_embed[0].double()
    square = learned[1:].reshape(side, side, -1)
    if (h, w) != (side, side):
        rows, columns = formula_matrix(side, h, mode), formula_matrix(side, w, mode)
        square = torch.einsum("ha,wb,abd->hwd", rows, columns, square)
    torch.testing.assert_close(embedding[0], learned[0])
    torch.testing.assert_close(embedding[1:], square.reshape(h * w, -1), atol=3e-6, rtol=0)


def test_position_interpolation_stays_in_float32_and_learns() -> None:
    model = randomised(TINY)
    exact = model.position_embedding((5, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.position_embedding((5, 7)), exact)
    exact.square().sum().backward()
    assert model.pos_embed.grad.abs().amax(-1).min() > 0


def test_position_interpolation_of_a_model_in_half_precision() -> None:
    model = randomised(TINY).bfloat16()
    assert model(torch.randn(1, 3, 40, 24).bfloat16()).cls.dtype == torch.bfloat16


# Sides that are no multiple of the patch


def test_fit() -> None:
    images = torch.randn(1, 3, 35, 29)
    cropped = fit_to_patches(images, 4, "crop")
    assert torch.equal(cropped, images[..., 1:33, 0:28])
    padded = fit_to_patches(images, 4, "pad")
    assert padded.shape[-2:] == (36, 32)
    assert torch.equal(padded[..., 0:35, 1:30], images) and padded.abs().sum() == images.abs().sum()
    assert fit_to_patches(images, 1, "crop") is images
    assert fit_to_patches(images[..., :3, :3], 4, "pad").shape[-2:] == (4, 4)
    with pytest.raises(UserError, match="smaller than"):
        fit_to_patches(images[..., :3, :], 4, "crop")


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_any_size_runs(fit: str) -> None:
    model = randomised(replace(TINY, fit=fit))
    for H, W in ((32, 32), (33, 47), (4, 50), (61, 7)):
        h, w = (H // 4, W // 4) if fit == "crop" else (-(-H // 4), -(-W // 4))
        tokens = model(torch.randn(1, 3, H, W))
        assert tokens.grid == (h, w) and tokens.patches.shape == (1, h * w, 24)


# Intermediate layers, attention, checkpointing, compiling


def test_intermediate_layers() -> None:
    model = randomised(TINY)
    images = torch.randn(2, 3, 32, 24)
    last = model(images)
    one, two = model.intermediate_layers(images, 2)
    assert torch.equal(two.patches, last.patches) and two.grid == (8, 6)
    back, first, minus = model.intermediate_layers(images, [1, 0, -2])
    assert torch.equal(back.cls, one.cls) and torch.equal(minus.cls, one.cls)
    assert not torch.equal(first.cls, one.cls)
    (raw,) = model.intermediate_layers(images, 1, norm=False)
    torch.testing.assert_close(model.norm(raw.cls), last.cls)


def test_attention_runs_only_what_it_needs() -> None:
    model = randomised(TINY)
    ran = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    weights = model.attention(torch.randn(2, 3, 16, 24), layer=1)
    assert ran == [0] and weights.shape == (2, 2, 27, 27)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 27))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_checkpointed_blocks_give_the_same_gradients(rate: float) -> None:
    images = torch.randn(4, 3, 32, 32)
    gradients = []
    for checkpointed in (False, True):
        model = randomised(TINY, drop_path=rate).train()
        model.checkpoint_blocks = checkpointed
        torch.manual_seed(1)
        model(images).patches.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_every_parameter_gets_a_gradient() -> None:
    model = randomised(TINY, drop_path=0.3).train()
    tokens = model(torch.randn(4, 3, 20, 20), torch.rand(4, 25) < 0.5)
    sum(part.square().sum() for part in tokens[:3]).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_in_one_graph(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    model = randomised(replace(TINY, depth=1, num_registers=2), drop_path=0.3).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for side in (32, 20):
        masks = torch.rand(4, (side // 4) ** 2) < 0.3
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            tokens = compiled(torch.randn(4, 3, side, side), masks)
        tokens.cls.sum().backward()


def test_blocks_is_a_module_list() -> None:
    assert isinstance(VisionTransformer(TINY).blocks, nn.ModuleList)
