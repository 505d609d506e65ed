"""Heads against the formulas as the papers and the release write them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.dense.conftest import random_tokens
from unlabeled.dense.heads import DepthHead, SegmentationHead, head_layers
from unlabeled.errors import UserError
from unlabeled.vit import Tokens, VisionTransformer

GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))


def as_map(tokens: Tokens) -> Tensor:
    return tokens.patches.transpose(1, 2).reshape(*tokens.cls.shape, *tokens.grid)


def with_cls(tokens: Tokens) -> Tensor:
    patches = as_map(tokens)
    return torch.cat((patches, tokens.cls[:, :, None, None].expand_as(patches)), 1)


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))


def test_the_released_blocks() -> None:
    assert head_layers(12, 4) == [2, 5, 8, 11]
    assert head_layers(24, 4) == [4, 11, 17, 23]
    assert head_layers(40, 4) == [9, 19, 29, 39]
    assert head_layers(4, 4) == [0, 1, 2, 3]
    assert head_layers(2, 4) == [0, 0, 1, 1]
    assert head_layers(12, 1) == [11]
    assert SegmentationHead(8, 3, num_layers=4).layers(12) == [8, 9, 10, 11]
    assert SegmentationHead(8, 3).layers(12) == [11]
    assert DepthHead(8, "dpt").layers(24) == [4, 11, 17, 23]


@settings(max_examples=20, deadline=None)
@given(GRIDS, st.sampled_from([1, 4]))
def test_segmentation_is_a_batch_norm_and_a_matrix(grid: tuple[int, int], num_layers: int) -> None:
    torch.manual_seed(0)
    head = SegmentationHead(6, 5, num_layers)
    randomise(head)
    layers = random_tokens(6, grid, num_layers, batch=3)
    features = torch.cat([as_map(tokens) for tokens in layers], 1).double()
    mean = features.mean((0, 2, 3), keepdim=True)
    variance = features.var((0, 2, 3), unbiased=False, keepdim=True)
    scale, shift = (value.double()[None, :, None, None] for value in (head.bn.weight, head.bn.bias))
    normed = (features - mean) / (variance + 1e-5).sqrt() * scale + shift
    expected = torch.einsum("bdhw,cd->bchw", normed, head.conv_seg.weight[:, :, 0, 0].double())
    expected += head.conv_seg.bias.double()[None, :, None, None]
    torch.testing.assert_close(head.train()(layers).double(), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(GRIDS, st.sampled_from(["linear", "linear4"]))
def test_depth_bins_as_the_release_computes_them(grid: tuple[int, int], kind: str) -> None:
    """Concatenate, upsample four times, convolve: the order that costs 2 D L channels at full size."""
    torch.manual_seed(0)
    head = DepthHead(8, kind, min_depth=0.1, max_depth=7.0, num_bins=16)
    randomise(head)
    layers = random_tokens(8, grid, head.num_layers)
    maps = torch.cat([F.interpolate(with_cls(one), scale_factor=4, mode="bilinear") for one in layers], 1)
    weights = torch.relu(head.decoder.conv_depth(maps)) + 0.1
    weights = weights / weights.sum(1, keepdim=True)
    expected = (weights * torch.linspace(0.1, 7.0, 16)[None, :, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(head(layers), expected, rtol=1e-4, atol=1e-5)


def test_fresh_bins_say_the_middle() -> None:
    head = DepthHead(8, "linear", min_depth=1, max_depth=9)
    (tokens,) = random_tokens(8, (2, 3))
    none = Tokens(tokens.cls * 0, tokens.registers, tokens.patches * 0, tokens.grid)
    torch.testing.assert_close(head([none]), torch.full((2, 1, 8, 12), 5.0))


def dpt_as_written(head: nn.Module, layers: list[Tokens]) -> Tensor:
    """DPT (2103.13413, section 3 and figure 1), each operation in the paper's order, by torch's own modules."""
    maps = []
    for index, tokens in enumerate(layers):
        both = torch.cat((tokens.patches, tokens.cls[:, None].expand_as(tokens.patches)), -1)
        mixed = F.gelu(head.reassemble_blocks.readout_projects[index](both))
        mixed = mixed.transpose(1, 2).reshape(*tokens.cls.shape, *tokens.grid)
        mixed = head.reassemble_blocks.projects[index](mixed)
        maps.append(head.convs[index](head.reassemble_blocks.resize_layers[index](mixed)))

    def unit(module: nn.Module, x: Tensor) -> Tensor:
        return x + module.conv2(F.relu(module.conv1(F.relu(x))))

    out = None
    for fusion, one in zip(head.fusion_blocks, reversed(maps), strict=True):
        if out is None:
            out = one
        else:
            one = F.interpolate(one, out.shape[2:], mode="bilinear") if one.shape != out.shape else one
            out = out + unit(fusion.res_conv_unit1, one)
        out = unit(fusion.res_conv_unit2, out)
        out = fusion.project(F.interpolate(out, scale_factor=2, mode="bilinear", align_corners=True))
    out = F.relu(head.project(out))
    return F.relu(head.conv_depth(out)) + head.min_depth


@pytest.mark.parametrize("grid", [(2, 3), (3, 3), (4, 2)])
def test_dpt_as_the_paper_writes_it(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    head = DepthHead(16, "dpt", channels=8)
    layers = random_tokens(16, grid, 4)
    found = head(layers)
    assert found.shape[2] >= 16 * grid[0]
    assert found.std() > 0
    torch.testing.assert_close(found, dpt_as_written(head.decoder, layers), rtol=1e-4, atol=1e-5)


def test_regression_stays_in_its_range() -> None:
    torch.manual_seed(0)
    head = DepthHead(8, "regression", min_depth=2, max_depth=3)
    randomise(head)
    depth = head(random_tokens(8, (4, 5)))
    assert depth.shape == (2, 1, 4, 5)
    assert 2 <= depth.min() < depth.max() <= 3


@pytest.mark.parametrize("kind", ["linear", "linear4", "dpt", "regression"])
def test_every_head_learns_a_depth(kind: str, backbone: VisionTransformer) -> None:
    """A head fits the depth of two images, through the loss of the protocol."""
    from unlabeled.dense.losses import depth_loss

    torch.manual_seed(0)
    head = DepthHead(32, kind, max_depth=4, num_bins=64, channels=8)
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        layers = backbone.intermediate_layers(images, head.layers(4), norm=head.norm)
    depth = F.interpolate(torch.rand(2, 1, 2, 3) * 3 + 0.5, size=(16, 24), mode="bilinear")
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = depth_loss(head(layers), depth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_no_head() -> None:
    with pytest.raises(UserError, match="no depth head 'cubic'"):
        DepthHead(8, "cubic")
    with pytest.raises(UserError, match="no range"):
        DepthHead(8, min_depth=2, max_depth=1)


def test_arguments_make_the_same_head_again() -> None:
    for head in (SegmentationHead(8, 3, 4, norm=False), DepthHead(8, "linear4", 0.2, 5, 16, norm=False)):
        again = type(head)(**head.arguments)
        again.load_state_dict(head.state_dict())
        assert again.norm is False
