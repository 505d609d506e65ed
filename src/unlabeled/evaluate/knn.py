"""Weighted k-nearest-neighbour classification, as in the papers.

Shape suffixes: N training rows, M test rows, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from unlabeled.errors import UserError
from unlabeled.features.extract import extract

if TYPE_CHECKING:
    from unlabeled.images.sources import Source
    from unlabeled.vit import VisionTransformer

CHUNK_BYTES = 256 * 2**20  # of similarities held at once


def knn_predict(
    train_ND: NDArray[np.float32],
    train_labels_N: NDArray[np.int64],
    test_MD: NDArray[np.float32],
    k: int = 20,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> NDArray[np.int64]:
    """The label that the k most similar training rows vote for, votes weighing exp(cosine / temperature).

    (Wu et al., 1805.01978, section 3.4; DINO section 4.1.) Of labels with the same votes the lower one wins.

    Args:
        train_ND: features, of any norm.
        train_labels_N: int64 from 0.
        test_MD: features.
        k: neighbours.
        temperature: of the votes.
        device: where to compute.

    Returns:
        int64 (M,).

    Raises:
        UserError: k is larger than N.
    """
    if k > len(train_ND):
        raise UserError(f"k-NN with k = {k} needs as many labelled images; there are {len(train_ND)}")
    train = F.normalize(torch.as_tensor(train_ND, device=device).float(), dim=1)
    labels = torch.as_tensor(train_labels_N, device=device)
    num_classes = int(labels.max()) + 1
    chunk = max(1, CHUNK_BYTES // (4 * len(train)))
    predicted = []
    for part in torch.as_tensor(test_MD).split(chunk):
        similarity, nearest = (F.normalize(part.to(device).float(), dim=1) @ train.T).topk(k)
        votes = torch.zeros(len(part), num_classes, device=device, dtype=torch.float64)
        votes.scatter_add_(1, labels[nearest], (similarity.double() / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted).cpu().numpy()


def knn_accuracy(
    train_ND: NDArray[np.float32],
    train_labels_N: NDArray[np.int64],
    test_MD: NDArray[np.float32],
    test_labels_M: NDArray[np.int64],
    k: int = 20,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> float:
    """Share of test rows whose label `knn_predict` finds, in [0, 1]."""
    predicted = knn_predict(train_ND, train_labels_N, test_MD, k, temperature, device)
    return float((predicted == np.asarray(test_labels_M)).mean())


def split_knn(
    model: VisionTransformer,
    source: Source,
    k: int = 20,
    crop: int = 224,
    device: str | torch.device = "cpu",
    max_images: int = 20_000,
) -> float:
    """k-NN accuracy within one labelled source: every other image is searched for the labels of the rest.

    Sources larger than max_images are thinned evenly; where half of the images are fewer than k, all of them vote.

    Raises:
        UserError: the source has no labels, or fewer than two images.
    """
    chosen = np.linspace(0, len(source) - 1, min(len(source), max_images)).astype(int)
    found = extract(model, source, indices=chosen, resize=crop, crop=crop, device=device)
    if found.labels is None:
        raise UserError(f"{source.name} has no labels: class folders or a label column are needed")
    # A permutation, so that neighbours in the source (of one class, of one film) fall into either half.
    order = np.random.default_rng(0).permutation(len(found.features))
    train, test = order[::2], order[1::2]
    if not len(test):
        raise UserError(f"{source.name} has {len(order)} images; k-NN needs two at least")
    features, labels = found.features, found.labels
    k = min(k, len(train))
    return knn_accuracy(features[train], labels[train], features[test], labels[test], k, device=device)
