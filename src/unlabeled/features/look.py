"""What a model sees, as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from unlabeled.images.transform import normalize

if TYPE_CHECKING:
    from unlabeled.vit import VisionTransformer


@torch.no_grad()
def patch_pca(model: VisionTransformer, images: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    """The first three principal components of the patch tokens of some images, fitted over all of them.

    Args:
        model: a backbone in evaluation mode.
        images: uint8 (H, W, 3) each, of any size; sides are fitted to the patch as the model does.

    Returns:
        One float32 (h, w, 3) in [0, 1] an image; each component is scaled from its 1st to its 99th percentile over
        all images, and has the sign in which its largest loading is positive.
    """
    device = next(model.parameters()).device
    features, grids = [], []
    for image in images:
        planar = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].to(device)
        tokens = model(normalize(planar))
        features.append(tokens.patches[0].float().cpu().numpy())
        grids.append(tokens.grid)
    all_rows = np.concatenate(features)
    centred = all_rows - all_rows.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:3]
    largest = np.abs(directions).argmax(1)
    directions = directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]
    scores = centred @ directions.T
    low, high = np.percentile(scores, [1, 99], axis=0)
    scores = ((scores - low) / np.maximum(high - low, 1e-12)).clip(0, 1).astype(np.float32)
    parts = np.split(scores, np.cumsum([len(rows) for rows in features])[:-1])
    return [part.reshape(*grid, -1) for part, grid in zip(parts, grids, strict=True)]
