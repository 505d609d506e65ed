"""Heads that turn patch features into a map: classes of a segmentation, or depth in metres.

A head reads the tokens after some blocks, as `VisionTransformer.intermediate_layers` gives them:
`head(model.intermediate_layers(images, head.layers(depth), norm=head.norm))`.

Shape suffixes: B images, N patches, D width, L layers read, h w patches, C classes, K bins of depth.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from unlabeled.dense.dpt import DPT
from unlabeled.errors import UserError
from unlabeled.vit import Tokens

DepthKind = Literal["linear", "linear4", "dpt", "regression"]
UPSAMPLE = 4  # of the patch grid, before depth's bins are read
BIN_FLOOR = 0.1  # added to each bin, so that none is ever without a gradient
HIDDEN = 256  # of the regression head


def head_layers(depth: int, num_layers: int) -> list[int]:
    """Return the blocks that a head of `num_layers` reads: the last one, or evenly spread ones.

    The released choices for depths of 12, 24 and 40: 2 5 8 11, 4 11 17 23 and 9 19 29 39 (24 has one that is not
    even). A backbone with fewer blocks gives some of them more than once.
    """
    if depth == 24 and num_layers == 4:
        return [4, 11, 17, 23]
    return [-(-depth * part // num_layers) - 1 for part in range(1, num_layers + 1)]


class SegmentationHead(nn.Module):
    """Batch norm and one 1x1 convolution on patch features, of the last block or the last four, side by side.

    norm: whether it reads tokens after the backbone's last norm.
    """

    def __init__(self, width: int, num_classes: int, num_layers: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {
            "width": width, "num_classes": num_classes, "num_layers": num_layers, "norm": norm,
        }  # fmt: skip
        self.num_layers, self.norm = num_layers, norm
        self.bn = nn.BatchNorm2d(width * num_layers)
        self.conv_seg = small_conv(width * num_layers, num_classes)

    def layers(self, depth: int) -> list[int]:
        """Return the blocks whose tokens it reads, of a backbone with this many: the last ones."""
        if depth < self.num_layers:
            return head_layers(depth, self.num_layers)
        return list(range(depth - self.num_layers, depth))

    def forward(self, layers: list[Tokens]) -> Tensor:
        """Return logits (B, C, h, w), one for each patch."""
        features_BLDhw = torch.cat([patch_map(tokens) for tokens in layers], dim=1)
        return cast(Tensor, self.conv_seg(self.bn(features_BLDhw)))


class DepthHead(nn.Module):
    """Depth in metres.

    kind: linear: one layer, 256 uniform bins; linear4: four layers; dpt: four layers, see `dpt.DPT`; regression: the
        last layer, two convolutions and a sigmoid between min_depth and max_depth.
    min_depth, max_depth: metres; of the bins; in evaluation mode depth is clamped to them.
    norm: whether it reads tokens after the backbone's last norm; Meta's released heads read them before it.
    channels: of dpt.
    """

    def __init__(
        self,
        width: int,
        kind: DepthKind = "linear",
        min_depth: float = 0.001,
        max_depth: float = 10.0,
        num_bins: int = 256,
        norm: bool = True,
        channels: int = 256,
    ) -> None:
        super().__init__()
        if kind not in get_args(DepthKind):
            raise UserError(
                f"There is no depth head {kind!r}; choose one of {', '.join(get_args(DepthKind))}."
            )
        if not 0 < min_depth < max_depth:
            raise UserError(f"Depth from {min_depth} to {max_depth} m is no range; both are above 0.")
        self.arguments: dict[str, Any] = {
            "width": width, "kind": kind, "min_depth": min_depth, "max_depth": max_depth, "num_bins": num_bins,
            "norm": norm, "channels": channels,
        }  # fmt: skip
        self.num_layers = 4 if kind in ("linear4", "dpt") else 1
        self.norm, self.min_depth, self.max_depth = norm, min_depth, max_depth
        self.decoder: nn.Module
        if kind == "dpt":
            self.decoder = DPT(width, channels, min_depth, start=(max_depth - min_depth) / 4)
        elif kind == "regression":
            self.decoder = DepthRegression(width, min_depth, max_depth)
        else:
            self.decoder = DepthBins(width, self.num_layers, min_depth, max_depth, num_bins)

    def layers(self, depth: int) -> list[int]:
        """Return the blocks whose tokens it reads, of a backbone with this many."""
        return head_layers(depth, self.num_layers)

    def forward(self, layers: list[Tokens]) -> Tensor:
        """Return depth (B, 1, h', w') in metres: 4 (linear), 16 (dpt) or 1 (regression) values along a patch."""
        depth_B1hw: Tensor = self.decoder(layers)
        # A clamped value has no gradient.
        return depth_B1hw if self.training else depth_B1hw.clamp(self.min_depth, self.max_depth)


class DepthBins(nn.Module):
    """Depth as an expectation over uniform bins, each bin a linear function of [patch ; CLS] (2304.07193, section 7.4).

    depth = sum_k p_k bin_k with p_k = (relu(logit_k) + 0.1) / sum_j (relu(logit_j) + 0.1), on a grid four times as
    fine, as AdaBins (2011.14141) normalises them.
    """

    bins_K: Tensor

    def __init__(
        self, width: int, num_layers: int, min_depth: float, max_depth: float, num_bins: int
    ) -> None:
        super().__init__()
        self.conv_depth = small_conv(2 * width * num_layers, num_bins)
        self.register_buffer("bins_K", torch.linspace(min_depth, max_depth, num_bins), persistent=False)

    def forward(self, layers: list[Tokens]) -> Tensor:
        """Return depth (B, 1, 4h, 4w)."""
        # A 1x1 convolution and bilinear upsampling commute, and so do the convolution and the copying of CLS to each
        # patch. Bins come first: 256 channels are upsampled, not 2 D L, and CLS is multiplied once an image.
        weight_KLxD = self.conv_depth.weight.view(self.bins_K.numel(), len(layers), 2, -1)
        patches_BNK = functional.linear(
            torch.cat([tokens.patches for tokens in layers], dim=-1), weight_KLxD[:, :, 0].flatten(1)
        )
        cls_BK = functional.linear(
            torch.cat([tokens.cls for tokens in layers], dim=-1),
            weight_KLxD[:, :, 1].flatten(1),
            self.conv_depth.bias,
        )
        logits_BhwK = (patches_BNK + cls_BK[:, None]).unflatten(1, layers[0].grid)
        return torch.stack([self._depth(logits_hwK) for logits_hwK in logits_BhwK])[:, None]

    def _depth(self, logits_hwK: Tensor) -> Tensor:
        """Return one image's depth (4h, 4w).

        Upsampling and the expectation are products with the bins innermost, and an image's weights stay near the
        caches: on a CPU 2.5 times as fast, forwards and backwards, as interpolating (B, K, h, w).
        """
        h, w, K = logits_hwK.shape
        down, across = (linear_upsampling(length, logits_hwK) for length in (h, w))
        finer_HwK = (down @ logits_hwK.flatten(1)).unflatten(1, (w, K))
        weights_HWK = functional.relu(across @ finer_HwK, inplace=True)
        sums_HW2 = weights_HWK @ torch.stack((self.bins_K, torch.ones_like(self.bins_K)), dim=1)
        floor = BIN_FLOOR * self.bins_K.sum(), BIN_FLOOR * K
        return (sums_HW2[..., 0] + floor[0]) / (sums_HW2[..., 1] + floor[1])


def linear_upsampling(length: int, like: Tensor) -> Tensor:
    """Return the matrix (4 length, length) that upsamples a column linearly, corners not aligned."""
    identity = torch.eye(length, device=like.device, dtype=like.dtype)
    return functional.interpolate(identity[None], scale_factor=UPSAMPLE, mode="linear")[0].T


class DepthRegression(nn.Module):
    """Two convolutions with a ReLU between them, and a sigmoid that spans the range of depth."""

    def __init__(self, width: int, min_depth: float, max_depth: float) -> None:
        super().__init__()
        self.min_depth, self.max_depth = min_depth, max_depth
        self.conv1 = nn.Conv2d(width, HIDDEN, 3, padding=1)
        self.conv2 = nn.Conv2d(HIDDEN, 1, 1)

    def forward(self, layers: list[Tokens]) -> Tensor:
        """Return depth (B, 1, h, w)."""
        share: Tensor = torch.sigmoid(self.conv2(functional.relu(self.conv1(patch_map(layers[-1])))))
        return self.min_depth + (self.max_depth - self.min_depth) * share


def small_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 1x1 convolution with weights of standard deviation 0.01 and no bias to start with."""
    conv = nn.Conv2d(inputs, outputs, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(cast(Tensor, conv.bias))
    return conv


def patch_map(tokens: Tokens) -> Tensor:
    """Return the patches as (B, D, h, w), without a copy."""
    patches_BhwD: Tensor = tokens.patches.unflatten(1, tokens.grid)
    return patches_BhwD.permute(0, 3, 1, 2)
