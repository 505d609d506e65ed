"""A backbone for inference in float32 on CPUs: linear layers by oneDNN, from weights packed once.

torch multiplies float32 matrices by MKL, which on processors that are not Intel's is half as fast as oneDNN, which
torch carries too and compiled graphs use (`benchmarks/embed.py` prints both). The numbers differ by rounding only.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from unlabeled.vit import Tokens, VisionTransformer
from unlabeled.weights.graph import Graph, Product

TYPICAL_ROWS = 16 * 257  # of a product, for which the packing is chosen; any number works


class PackedProduct(nn.Module):
    """x W + b by oneDNN."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        weight = product.weight.T.contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)
        self.bias = product.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the last axis multiplied."""
        return cast(
            Tensor, torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.packed, self.bias, "none", [], "")
        )


class PackedBackbone(nn.Module):
    """A backbone's tokens after a block and the last norm, on a CPU, in float32, without gradients.

    Args:
        model: a backbone; it is copied.
        layer: the block's index; later ones are left out.
    """

    def __init__(self, model: VisionTransformer, layer: int = -1) -> None:
        super().__init__()
        self.graph = Graph(model)
        del self.graph.vit.blocks[layer % len(self.graph.vit.blocks) + 1 :]
        for module in list(self.graph.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Product):
                    setattr(module, name, PackedProduct(child))

    def forward(self, images_B3HW: Tensor) -> Tokens:
        """Return the tokens of normalised float32 images, sides multiples of the patch size."""
        p = self.graph.config.patch_size
        found = self.graph(images_B3HW)
        grid = (images_B3HW.shape[-2] // p, images_B3HW.shape[-1] // p)
        registers = found.get("registers", found["cls"][:, None][:, :0])
        return Tokens(found["cls"], registers, found["patches"], grid)


def can_pack() -> bool:
    """Whether this build of torch has oneDNN and its packed products."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
