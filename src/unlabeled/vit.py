"""The backbone: a vision transformer as DINOv2 trains it (arXiv 2304.07193; registers: 2309.16588).

Shape suffixes: B images, T tokens (1 + R + N), R registers, N patches, D width, H W pixels, h w patches.
Tokens of one group of images are (B, T, D); of several, packed into one sequence (packing.py), (P, D).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from unlabeled.drop_path import Kept, add_branch, draw
from unlabeled.errors import UserError
from unlabeled.lean import gelu_linear, packed_attention
from unlabeled.packing import Shapes, cut, joined
from unlabeled.vit_config import SIZES as SIZES
from unlabeled.vit_config import Interpolation as Interpolation
from unlabeled.vit_config import VitConfig as VitConfig
from unlabeled.vit_config import vit_config as vit_config


class Tokens(NamedTuple):
    """What the backbone returns for a batch of images."""

    cls: Tensor  # (B, D)
    registers: Tensor  # (B, R, D)
    patches: Tensor  # (B, N, D), row by row
    grid: tuple[int, int]  # (h, w), N = h * w


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each: (B, C, H, W) -> (B, N, D)."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch_size, config.patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the patch embeddings, row by row."""
        return cast(Tensor, self.proj(images_BCHW)).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention within each image, tokens to tokens."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def packed(self, x_BTD: Tensor) -> Tensor:
        """Return queries, keys and values, (B, T, 3, heads, D / heads)."""
        qkv = cast(Tensor, self.qkv(x_BTD))
        return cast(Tensor, qkv.unflatten(-1, (3, self.num_heads, -1)))

    def forward(self, x_PD: Tensor, gamma_D: Tensor, shapes: Shapes) -> Tensor:
        """Return the mixed tokens, scaled by gamma."""
        mixed = joined([mix(qkv) for qkv in cut(self.packed(x_PD), shapes)])
        return scaled_linear(self.proj, gamma_D, mixed)

    def weights(self, x_BTD: Tensor, num_queries: int | None = None) -> Tensor:
        """Return the softmax weights (B, heads, T, T), rows sum to 1; or the first num_queries rows alone."""
        query, key, _ = self.packed(x_BTD).permute(2, 0, 3, 1, 4).unbind(0)
        query = query[:, :, :num_queries]
        logits: Tensor = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def mix(qkv_BT3Hd: Tensor) -> Tensor:
    """Return softmax(query key^T / sqrt(d)) value of each image, (B, T, H * d)."""
    if qkv_BT3Hd.dtype == torch.bfloat16 and qkv_BT3Hd.device.type == "cpu":
        # torch's fused kernel takes 2 to 3 times as long there, and 5 times for small crops' gradient.
        return packed_attention(qkv_BT3Hd)
    query, key, value = qkv_BT3Hd.permute(2, 0, 3, 1, 4).unbind(0)
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden_width)
        self.fc2 = nn.Linear(config.hidden_width, config.width)

    def forward(self, x_BTD: Tensor, gamma_D: Tensor) -> Tensor:
        """Return the transformed tokens, scaled by gamma."""
        return gelu_linear(self.fc1(x_BTD), gamma_D[:, None] * self.fc2.weight, gamma_D * self.fc2.bias)


class SwiGlu(nn.Module):
    """Gated FFN: w3(silu(a) * b), where w12(x) = [a, b] (arXiv 2002.05202)."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.width, 2 * config.hidden_width)
        self.w3 = nn.Linear(config.hidden_width, config.width)

    def forward(self, x_BTD: Tensor, gamma_D: Tensor) -> Tensor:
        """Return the transformed tokens, scaled by gamma."""
        gate, value = self.w12(x_BTD).chunk(2, dim=-1)
        return scaled_linear(self.w3, gamma_D, functional.silu(gate) * value)


class LayerScale(nn.Module):
    """One learned factor a channel, (D,), on a residual branch; applied by scaled_linear."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((config.width,), config.layer_scale))


def scaled_linear(linear: nn.Linear, gamma_D: Tensor, x: Tensor) -> Tensor:
    """Return gamma * linear(x), computed as one product with the weights scaled.

    gamma (W x + b) = (gamma W) x + gamma b: the same numbers without a pass over the activations, and
    without keeping them for the gradient of gamma.
    """
    return functional.linear(x, gamma_D[:, None] * linear.weight, gamma_D * linear.bias)


class Block(nn.Module):
    """A pre-norm transformer block with LayerScale and drop path on both residual branches."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config) if config.ffn == "mlp" else SwiGlu(config)
        self.ls2 = LayerScale(config)

    def attention_branch(self, x_PD: Tensor, shapes: Shapes) -> Tensor:
        """Return what attention adds to the tokens."""
        return cast(Tensor, self.attn(self.norm1(x_PD), self.ls1.gamma, shapes))

    def mlp_branch(self, x_PD: Tensor, shapes: Shapes) -> Tensor:
        """Return what the FFN adds to the tokens."""
        return cast(Tensor, self.mlp(self.norm2(x_PD), self.ls2.gamma))

    def forward(
        self, x_PD: Tensor, shapes: Shapes | None = None, kept: tuple[Kept | None, Kept | None] = (None, None)
    ) -> Tensor:
        """Return the tokens after both branches.

        shapes: see packing.py; without them x is one group, (B, T, D). kept: what drop path leaves of each branch.
        """
        shapes = shapes or ((x_PD.shape[0], x_PD.shape[1]),)
        x_PD = add_branch(x_PD, self.attention_branch, shapes, kept[0])
        return add_branch(x_PD, self.mlp_branch, shapes, kept[1])


class VisionTransformer(nn.Module):
    """The DINOv2 backbone; its state-dict keys are those of Meta's released .pth files.

    drop_path: one rate for every block, active in training mode only.
    checkpoint_blocks: recompute each block's activations in the backward pass, for memory.
    notes: one line for each thing that the file it was read from does not hold.
    name: what it was loaded from, as `load_model` takes it; empty for a model that was made in memory.
    """

    notes: tuple[str, ...] = ()
    name: str = ""

    def __init__(self, config: VitConfig, drop_path: float = 0.0, checkpoint_blocks: bool = False) -> None:
        super().__init__()
        self.config = config
        self.drop_path = drop_path
        self.checkpoint_blocks = checkpoint_blocks
        D = config.width
        self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid_side**2, D))
        if config.num_registers:
            self.register_tokens = nn.Parameter(torch.empty(1, config.num_registers, D))
        self.mask_token = nn.Parameter(torch.empty(1, D))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, eps=config.norm_eps)
        if (
            not self.pos_embed.is_meta
        ):  # else weights come from a file; drawing none would import torch's compiler
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights (the patch embedding keeps torch's convolution default, as Meta's does)."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.config.num_registers:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, self.config.layer_scale)

    def forward(self, images_B3HW: Tensor, masks_BN: Tensor | None = None) -> Tokens:
        """Return the tokens after the last norm.

        images: float, normalised with the ImageNet mean and std; any sides, see VitConfig.fit.
        masks: bool, row by row; True patches are replaced by the mask token.
        Raises UserError for a side that is shorter than a patch.
        """
        return self.all_tokens([(images_B3HW, masks_BN)])[0]

    def all_tokens(self, groups: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tokens]:
        """Return what `forward` does for each group of images and masks, in one pass over all of them.

        The sides may differ from group to group. All tokens are one sequence to whatever acts on each by itself;
        drop path draws within each group.
        """
        embedded = [self.embed(images, masks) for images, masks in groups]
        shapes = tuple((len(x_BTD), x_BTD.shape[1]) for x_BTD, _ in embedded)
        x_PD = joined([x_BTD for x_BTD, _ in embedded])
        for block, kept in zip(self.blocks, self._kept(x_PD, shapes), strict=True):
            x_PD = self._run(block, x_PD, shapes, kept)
        outputs = cut(self.norm(x_PD), shapes)
        return [self._tokens(x_BTD, grid) for x_BTD, (_, grid) in zip(outputs, embedded, strict=True)]

    def intermediate_layers(
        self, images_B3HW: Tensor, layers: int | Sequence[int], norm: bool = True
    ) -> list[Tokens]:
        """Return the tokens after some blocks.

        layers: the last n blocks, or block indices in the order wanted (0 is the first, -1 the last).
        norm: apply the last norm to each.
        """
        depth = len(self.blocks)
        wanted = range(depth - layers, depth) if isinstance(layers, int) else [i % depth for i in layers]
        x_BTD, grid = self.embed(images_B3HW)
        shapes = ((x_BTD.shape[0], x_BTD.shape[1]),)
        kept = self._kept(x_BTD, shapes)
        outputs: dict[int, Tensor] = {}
        for index in range(max(wanted) + 1):
            x_BTD = self._run(self.blocks[index], x_BTD, shapes, kept[index])
            if index in wanted:
                outputs[index] = x_BTD
        return [self._tokens(self.norm(outputs[i]) if norm else outputs[i], grid) for i in wanted]

    def attention(self, images_B3HW: Tensor, layer: int = -1) -> Tensor:
        """Return one block's attention weights, (B, heads, T, T) with T = 1 + registers + patches.

        Each row is a query and sums to 1. layer: the block's index, -1 is the last.
        """
        block, x_BTD = self._before(images_B3HW, layer)
        return block.attn.weights(block.norm1(x_BTD))

    def cls_attention(self, images_B3HW: Tensor, layer: int = -1) -> Tensor:
        """Return the CLS token's row of `attention`, (B, heads, T), in memory that grows with T, not T * T."""
        block, x_BTD = self._before(images_B3HW, layer)
        return block.attn.weights(block.norm1(x_BTD), num_queries=1)[:, :, 0]

    def embed(self, images_B3HW: Tensor, masks_BN: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens that enter the first block, (B, T, D), and the patch grid (h, w)."""
        images = fit_to_patches(images_B3HW, self.config.patch_size, self.config.fit)
        B, _, H, W = images.shape
        grid = (H // self.config.patch_size, W // self.config.patch_size)
        patches = self.patch_embed(images)
        if masks_BN is not None:
            patches = torch.where(masks_BN[..., None], self.mask_token, patches)
        pos_1TD = self.position_embedding(grid)
        tokens = [(self.cls_token + pos_1TD[:, :1]).expand(B, -1, -1), patches + pos_1TD[:, 1:]]
        if self.config.num_registers:
            tokens.insert(1, self.register_tokens.expand(B, -1, -1))
        return torch.cat(tokens, dim=1), grid

    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """Return the position embedding of CLS and a grid of patches, (1, 1 + h * w, D).

        Bicubic, in float32; config.interpolation says which of the ways in use.
        """
        side, (h, w) = self.config.grid_side, grid
        if grid == (side, side):
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        rows_hs, columns_ws = (
            resize_matrix(side, size, self.config.interpolation, patches.device) for size in grid
        )
        with torch.autocast(patches.device.type, enabled=False):
            resized = (rows_hs @ patches.float().view(side, -1)).view(h, side, -1)
            resized = (columns_ws @ resized).view(1, h * w, -1)
        return torch.cat((cls, resized.to(patches.dtype)), dim=1)

    def _before(self, images_B3HW: Tensor, layer: int) -> tuple[Block, Tensor]:
        """Return a block and the tokens that enter it."""
        last = layer % len(self.blocks)
        x_BTD, _ = self.embed(images_B3HW)
        for index in range(last):
            x_BTD = self._run(self.blocks[index], x_BTD)
        return cast(Block, self.blocks[last]), x_BTD

    def _kept(self, x_PD: Tensor, shapes: Shapes) -> list[tuple[Kept | None, Kept | None]]:
        """Draw what drop path leaves of both branches of each block."""
        depth = len(self.blocks)
        if self.drop_path == 0 or not self.training:
            return [(None, None)] * depth
        kept = draw(self.drop_path, 2 * depth, shapes, x_PD)
        return list(zip(kept[::2], kept[1::2], strict=True))

    def _run(
        self,
        block: nn.Module,
        x_PD: Tensor,
        shapes: Shapes | None = None,
        kept: tuple[Kept | None, Kept | None] = (None, None),
    ) -> Tensor:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            # Nothing random is left to a block.
            again = checkpoint(block, x_PD, shapes, kept, use_reentrant=False, preserve_rng_state=False)
            return cast(Tensor, again)
        return cast(Tensor, block(x_PD, shapes, kept))

    def _tokens(self, x_BTD: Tensor, grid: tuple[int, int]) -> Tokens:
        first_patch = 1 + self.config.num_registers
        return Tokens(x_BTD[:, 0], x_BTD[:, 1:first_patch], x_BTD[:, first_patch:], grid)


def resize_matrix(side: int, size: int, mode: str, device: torch.device) -> Tensor:
    """Return bicubic resizing of one axis as a float32 matrix (size, side): each row weighs the old samples.

    A product with it, unlike torch's own resizing of the embedding, has a gradient that is the same from
    run to run on a GPU, that compiles, and that exists on every device. mode: see VitConfig.
    """
    here = torch.device("cpu") if device.type == "mps" else device  # where bicubic resizing is not complete
    identity = torch.eye(side, device=here)[None, None]
    if mode == "scale":
        factor = ((size + 0.1) / side, 1.0)
        matrix = functional.interpolate(identity, scale_factor=factor, mode="bicubic")
    else:
        matrix = functional.interpolate(
            identity, size=(size, side), mode="bicubic", antialias=mode == "antialias"
        )
    return matrix[0, 0].to(device)


def fit_to_patches(images_BCHW: Tensor, patch_size: int, fit: Literal["crop", "pad"]) -> Tensor:
    """Bring both sides to a multiple of the patch by a centre crop or a centre zero pad."""
    H, W = images_BCHW.shape[-2:]
    extra_H, extra_W = H % patch_size, W % patch_size
    if not extra_H and not extra_W:
        return images_BCHW
    if fit == "pad":
        add_H, add_W = -H % patch_size, -W % patch_size
        sides = (add_W // 2, add_W - add_W // 2, add_H // 2, add_H - add_H // 2)
        return functional.pad(images_BCHW, sides)
    if min(H, W) < patch_size:
        raise UserError(
            f"An image of {W} x {H} pixels is smaller than one patch of {patch_size}; enlarge it."
        )
    top, left = extra_H // 2, extra_W // 2
    return images_BCHW[..., top : top + H - extra_H, left : left + W - extra_W]
