"""The projection head: an MLP to a normalised bottleneck, and weight-normalised prototypes (DINO section 3.1)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WeightNormLinear(nn.Module):
    """Prototypes: a bias-free linear layer whose rows have norm 1; the gain is fixed and kept for Meta's format."""

    weight_g: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("weight_g", torch.ones(out_features, 1))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self) -> Tensor:
        """The prototypes, (K, C) float32 with rows of norm 1."""
        with torch.autocast(self.weight_v.device.type, enabled=False):
            return F.normalize(self.weight_v, dim=-1)


class ProjectionHead(nn.Module):
    """in_dim -> hidden -> ... -> bottleneck, L2-normalised, then num_prototypes cosines.

    Args:
        in_dim: width of the tokens it takes.
        num_prototypes: K.
        bottleneck_dim: C.
        hidden_dim: width of the hidden layers.
        num_layers: linear layers before the prototypes.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        bottleneck_dim: int = 256,
        hidden_dim: int = 2048,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (num_layers - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(widths)):
            linear = nn.Linear(before, after)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers += [linear] if index == num_layers - 1 else [linear, nn.GELU()]
        self.mlp = nn.Sequential(*layers)
        self.last_layer = WeightNormLinear(bottleneck_dim, num_prototypes)

    def bottleneck(self, tokens_ND: Tensor) -> Tensor:
        """(N, D) tokens -> (N, C) rows of norm 1, in the compute dtype."""
        out_NC = self.mlp(tokens_ND)
        eps = 1e-6 if out_NC.dtype in (torch.float16, torch.bfloat16) else 1e-12
        return F.normalize(out_NC, dim=-1, eps=eps).to(out_NC.dtype)

    def prototypes(self) -> Tensor:
        """(K, C) float32 rows of norm 1."""
        weight: Tensor = self.last_layer()
        return weight

    def forward(self, tokens_ND: Tensor) -> Tensor:
        """(N, D) tokens -> (N, K) cosines with the prototypes."""
        out_NC = self.bottleneck(tokens_ND)
        return out_NC @ self.prototypes().to(out_NC.dtype).T
