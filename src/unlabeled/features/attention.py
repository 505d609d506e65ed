"""Where the CLS token looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.features.fitting import check_layer, evaluating, finite, fitted
from unlabeled.features.inputs import ImageLike
from unlabeled.weights.load import as_model

if TYPE_CHECKING:
    from unlabeled.vit import VisionTransformer


class AttentionMaps(NamedTuple):
    """The CLS token's attention to the patches (h, w) of one image, which together cover the image."""

    heads: NDArray[
        np.float32
    ]  # (heads, h, w), weights as the softmax gives them: the rest goes to CLS and registers
    mean: NDArray[np.float32]  # (h, w), over the heads
    mask: NDArray[np.bool_]  # (h, w), the fewest patches that hold the wanted mass of the mean
    head_masks: NDArray[np.bool_]  # (heads, h, w), the same of each head


def attention(
    model: VisionTransformer | str | Path,
    image: ImageLike,
    layer: int = -1,
    mass: float = 0.6,
    size: int | None = None,
) -> AttentionMaps:
    """Return the attention of the CLS token to the patches, in one block.

    As in the original DINO: the weights are the softmax's own, with CLS and registers left out and nothing scaled
    up for it; for the masks, each map is taken as a share of its sum over the patches (arXiv 2104.14294, figure 4).
    The other blocks run as always; of this one, only the CLS token's row is computed.

    model: a backbone, or a MODEL's text, which is loaded each time.
    image: path, bytes, Pillow image, array or tensor. layer: index of the block, -1 is the last. mass: of the
        attention to the patches that a mask holds, in (0, 1]. size: short side in pixels; None is
        `default_size`.
    Raises UserError for a layer or a mass that does not exist, and for what is no image.
    """
    model = as_model(model)
    check_layer(model, layer)
    if not 0 < mass <= 1:
        raise UserError(f"A mask holds a mass above 0, up to 1, of the attention; not {mass:g}.")
    with evaluating(model):
        images_13HW, grid = fitted(model, image, size)
        weights = finite(model.cls_attention(images_13HW, layer)[0])
    heads = weights[:, 1 + model.config.num_registers :].reshape(-1, *grid)
    mean = heads.mean(0)
    return AttentionMaps(
        heads, mean, mass_mask(mean, mass), np.stack([mass_mask(head, mass) for head in heads])
    )


def mass_mask(weights: NDArray[np.float32], mass: float) -> NDArray[np.bool_]:
    """Return the smallest set that holds a share `mass` of the sum of the weights, as a mask of their shape.

    Among equal weights, the first ones are taken.
    """
    flat = weights.astype(np.float64).ravel()
    order = np.argsort(-flat, kind="stable")
    held = np.cumsum(flat[order])
    # The last bits of a sum are not to add a patch.
    count = int(np.searchsorted(held, held[-1] * mass * (1 - 1e-12))) + 1
    mask = np.zeros(flat.shape, bool)
    mask[order[:count]] = True
    return mask.reshape(weights.shape)
