"""The DPT head (Ranftl et al. 2021, arXiv 2103.13413) in the form of DINOv2's depth heads.

Shape suffixes: B images, N patches, D width, C channels, h w patches.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from unlabeled.vit import Tokens


class DPT(nn.Module):
    """Four layers as maps of 4, 2, 1 and 1/2 of the patch grid, fused from the coarsest to the finest.

    depth = relu(output) + min_depth, on a grid 16 times as fine as the patches.

    width: of the tokens. channels: of the fused maps. min_depth: metres. start: metres, about what it predicts before
    training (a ReLU that starts at 0 everywhere has no gradient).
    """

    def __init__(self, width: int, channels: int, min_depth: float, start: float) -> None:
        super().__init__()
        self.min_depth = min_depth
        self.reassemble_blocks = Reassemble(width, widths := [width // 8, width // 4, width // 2, width])
        self.convs = nn.ModuleList(nn.Conv2d(one, channels, 3, padding=1, bias=False) for one in widths)
        self.fusion_blocks = nn.ModuleList(Fusion(channels, is_first=index == 0) for index in range(4))
        self.project = nn.Conv2d(channels, channels, 3, padding=1)
        last = nn.Conv2d(32, 1, 1)
        nn.init.constant_(cast(Tensor, last.bias), start)
        self.conv_depth = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(channels // 2, 32, 3, padding=1),
            nn.ReLU(),
            last,
        )

    def forward(self, layers: list[Tokens]) -> Tensor:
        """Return depth (B, 1, 16h, 16w) in metres; layers: four, the shallowest first."""
        maps = [conv(one) for conv, one in zip(self.convs, self.reassemble_blocks(layers), strict=True)]
        fused: Tensor = self.fusion_blocks[0](maps[-1])
        for fusion, finer in zip(self.fusion_blocks[1:], maps[-2::-1], strict=True):
            fused = fusion(fused, finer)
        return functional.relu(self.conv_depth(functional.relu(self.project(fused)))) + self.min_depth


class Reassemble(nn.Module):
    """Tokens to maps: CLS is projected into each patch, and each layer's map has its own resolution and width."""

    def __init__(self, width: int, widths: list[int]) -> None:
        super().__init__()
        self.projects = nn.ModuleList(nn.Conv2d(width, one, 1) for one in widths)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
            ]
        )
        self.readout_projects = nn.ModuleList(nn.Linear(2 * width, width) for _ in widths)

    def forward(self, layers: list[Tokens]) -> list[Tensor]:
        """Return four maps: (B, D/8, 4h, 4w), (B, D/4, 2h, 2w), (B, D/2, h, w), (B, D, ceil(h/2), ceil(w/2))."""
        maps = []
        for tokens, readout, project, resize in zip(
            layers, self.readout_projects, self.projects, self.resize_layers, strict=True
        ):
            # Of [patch ; CLS], CLS is multiplied once an image.
            for_patch, for_cls = cast(Tensor, readout.weight).chunk(2, dim=1)
            cls_BD = functional.linear(tokens.cls, for_cls, cast(Tensor, readout.bias))
            mixed_BND = functional.gelu(functional.linear(tokens.patches, for_patch) + cls_BD[:, None])
            maps.append(resize(project(mixed_BND.unflatten(1, tokens.grid).permute(0, 3, 1, 2))))
        return maps


class ResidualConv(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Return the map, of the same shape."""
        out: Tensor = self.conv2(functional.relu(self.conv1(functional.relu(x_BChw))))
        return x_BChw + out


class Fusion(nn.Module):
    """Add a finer map to what is fused so far, and double the resolution."""

    def __init__(self, channels: int, is_first: bool) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, channels, 1)
        self.res_conv_unit1 = None if is_first else ResidualConv(channels)
        self.res_conv_unit2 = ResidualConv(channels)

    def forward(self, fused_BChw: Tensor, finer_BChw: Tensor | None = None) -> Tensor:
        """Return (B, C, 2h, 2w)."""
        if finer_BChw is not None and self.res_conv_unit1 is not None:
            if finer_BChw.shape != fused_BChw.shape:  # of an odd number of patches, half was rounded up
                finer_BChw = functional.interpolate(finer_BChw, size=fused_BChw.shape[2:], mode="bilinear")
            fused_BChw = fused_BChw + self.res_conv_unit1(finer_BChw)
        fused_BChw = self.res_conv_unit2(fused_BChw)
        # The projection and the upsampling commute; the projection is on the quarter of the pixels.
        projected: Tensor = self.project(fused_BChw)
        return functional.interpolate(projected, scale_factor=2, mode="bilinear", align_corners=True)
