"""Heads that tell classes apart, on the same footing as the dense ones: tokens after some blocks in, logits out.

Shape suffixes: B images, D width, F features read (D times what is read), C classes, N stored images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from unlabeled.vit import Tokens

SMALLEST_STD = 1e-6  # of a feature; constant ones are not scaled up


def pooled(layers: list[Tokens], mean_patch: bool) -> Tensor:
    """Return (B, F): CLS of each layer, then the last layer's mean patch; the order of Meta's released heads."""
    parts = [tokens.cls for tokens in layers]
    if mean_patch:
        parts.append(layers[-1].patches.mean(1))
    return torch.cat(parts, dim=1)


class ClassifierHead(nn.Module, ABC):
    """What classifiers share: which tokens they read.

    num_layers: the last blocks whose CLS is read. mean_patch: the last block's mean patch is read too.
    """

    norm = True  # tokens after the backbone's last norm
    pooled_only = True  # of the patches the mean is enough

    def __init__(self, width: int, num_classes: int, num_layers: int = 1, mean_patch: bool = True) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {
            "width": width, "num_classes": num_classes, "num_layers": num_layers, "mean_patch": mean_patch,
        }  # fmt: skip
        self.num_layers, self.mean_patch = num_layers, mean_patch
        self.num_features = width * (num_layers + mean_patch)

    def layers(self, depth: int) -> list[int]:
        """Return the blocks whose tokens it reads, of a backbone with this many; the last ones."""
        return [max(0, index) for index in range(depth - self.num_layers, depth)]

    def features(self, layers: list[Tokens]) -> Tensor:
        """Return what it reads, float32 (B, F)."""
        return pooled(layers, self.mean_patch).float()

    @abstractmethod
    def logits(self, features_BF: Tensor) -> Tensor:
        """Return logits (B, C)."""

    def forward(self, layers: list[Tokens]) -> Tensor:
        """Return logits (B, C)."""
        return self.logits(self.features(layers))


class LinearHead(ClassifierHead):
    """One linear layer on standardised features.

    The mean and standard deviation are those of the training features before the first step; `folded` makes them
    part of the layer, whose weight and bias are then laid out as in Meta's released heads.
    """

    mean_F: Tensor
    std_F: Tensor

    def __init__(self, width: int, num_classes: int, num_layers: int = 1, mean_patch: bool = True) -> None:
        super().__init__(width, num_classes, num_layers, mean_patch)
        self.linear = nn.Linear(self.num_features, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean_F", torch.zeros(self.num_features))
        self.register_buffer("std_F", torch.ones(self.num_features))

    def logits(self, features_BF: Tensor) -> Tensor:
        """Return logits (B, C)."""
        return cast(Tensor, self.linear((features_BF - self.mean_F) / self.std_F))

    @torch.no_grad()
    def standardise(self, features_NF: Tensor) -> None:
        """Take the mean and standard deviation of some features."""
        features = features_NF.double().cpu()
        std = features.std(0, correction=0)
        self.mean_F.copy_(features.mean(0))
        self.std_F.copy_(torch.where(std > SMALLEST_STD, std, 1.0))

    @torch.no_grad()
    def folded(self) -> LinearHead:
        """Return the same function as a plain linear layer: W / std and b - W (mean / std)."""
        plain = LinearHead(**self.arguments)
        weight = self.linear.weight.double() / self.std_F.double()
        plain.linear.weight.copy_(weight)
        plain.linear.bias.copy_(self.linear.bias.double() - weight @ self.mean_F.double())
        return plain.eval()


class KnnHead(ClassifierHead):
    """Votes of the k most similar stored images, weighing exp(cosine / temperature) (1805.01978, section 3.4)."""

    features_NF: Tensor
    labels_N: Tensor

    def __init__(
        self,
        width: int,
        num_classes: int,
        num_layers: int = 1,
        mean_patch: bool = False,
        num_stored: int = 0,
        k: int = 20,
        temperature: float = 0.07,
    ) -> None:
        super().__init__(width, num_classes, num_layers, mean_patch)
        self.arguments |= {"num_stored": num_stored, "k": k, "temperature": temperature}
        self.k, self.temperature, self.num_classes = k, temperature, num_classes
        self.register_buffer("features_NF", torch.zeros(num_stored, self.num_features))
        self.register_buffer("labels_N", torch.zeros(num_stored, dtype=torch.int64))

    def logits(self, features_BF: Tensor) -> Tensor:
        """Return the logarithm of each class's share of the votes (B, C); at least -30."""
        features = functional.normalize(features_BF, dim=1)
        similarity, nearest = (features @ self.features_NF.T).topk(min(self.k, len(self.labels_N)))
        votes = torch.zeros(len(features), self.num_classes, device=features.device)
        votes.scatter_add_(1, self.labels_N[nearest], ((similarity - 1) / self.temperature).exp())
        return (votes / votes.sum(1, keepdim=True)).log().clamp_min(-30)
