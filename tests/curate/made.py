"""Made for tests: vectors in clusters, some copies of others; a backbone of random weights."""

from pathlib import Path

import numpy as np
import torch

from unlabeled.vit import VisionTransformer, VitConfig
from unlabeled.weights.huggingface import save_huggingface


def clustered(count, width=32, seed=0, copies=0.1, noise=0.2):
    """Vectors of length 1, float32, and the numbers of copies and of what they are copies of."""
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(max(2, count // 100), width))
    vectors = 0.8 * centers[generator.integers(len(centers), size=count)] + generator.normal(
        size=(count, width)
    )
    number = int(copies * count)
    pick = generator.permutation(count)
    copy, original = pick[:number], pick[number : 2 * number]
    vectors[copy] = vectors[original] + noise * generator.normal(size=(number, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), copy, original


def parts_of(labels):
    """The sets of elements with the same label."""
    sets = {}
    for element, label in enumerate(np.asarray(labels).tolist()):
        sets.setdefault(label, set()).add(element)
    return sorted(map(sorted, sets.values()))


def random_model(folder: Path, width: int, depth: int, seed: int) -> str:
    """Write a backbone whose features differ from image to image, as those of fresh weights hardly do."""
    torch.manual_seed(seed)
    network = VisionTransformer(
        VitConfig(width=width, depth=depth, num_heads=2, patch_size=16, image_size=64)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    save_huggingface(network.eval(), folder)
    return str(folder)
