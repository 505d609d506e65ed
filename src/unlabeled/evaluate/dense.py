"""Quality of patch features without training: each patch's class by its nearest labelled patches.

Shape suffixes: N patches, D width, H W pixels, h w patches, C classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from unlabeled.dense.labelled import Pair, read_labels
from unlabeled.errors import UserError
from unlabeled.evaluate.knn import knn_predict
from unlabeled.images.decode import BadImage, decode
from unlabeled.images.transform import normalize

if TYPE_CHECKING:
    from unlabeled.vit import VisionTransformer


@torch.no_grad()
def patch_knn(
    model: VisionTransformer,
    pairs: list[Pair],
    side: int,
    ignore: int = 255,
    *,
    k: int = 20,
    max_patches: int = 20_000,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Mean intersection over union and accuracy of the patches of the second half of the images, found in the first's.

    Halves in order of names: neighbouring frames of a film are in one of them. A patch's class is that of most of its
    pixels; patches mostly of `ignore` are left out.

    Args:
        model: a backbone.
        pairs: two or more, see `dense.labelled.matched`; labels are class numbers in one channel.
        side: short side in pixels the images are resized to; the other keeps the aspect, to a whole patch.
        ignore: label that does not count.
        k: neighbours.
        max_patches: of the searched ones, drawn evenly at random; as many are classified.
        device: where the model is.

    Returns:
        patch_knn_miou over the classes that occur, patch_knn_accuracy; both in [0, 1].

    Raises:
        UserError: a file cannot be read.
    """
    was_training = model.training
    model.eval()
    halves: list[tuple[list[NDArray[np.float32]], list[NDArray[np.int64]]]] = [([], []), ([], [])]
    patch = model.config.patch_size
    for number, (_, image_path, label_path) in enumerate(pairs):
        try:
            pixels, labels_HW = decode(image_path.read_bytes()), read_labels(label_path)
        except (BadImage, OSError) as error:
            raise UserError(f"{image_path} or {label_path} cannot be read: {error}") from error
        height, width = pixels.shape[:2]
        scale = side / min(height, width)
        rows, columns = (max(1, round(scale * length / patch)) for length in (height, width))
        resized = cv2.resize(pixels, (columns * patch, rows * patch), interpolation=cv2.INTER_AREA)
        images = torch.from_numpy(resized).permute(2, 0, 1)[None].to(device)
        tokens = model(normalize(images)).patches[0].float().cpu().numpy()
        classes_N = _patch_classes(labels_HW, rows, columns)
        kept = classes_N != ignore
        halves[2 * number // len(pairs)][0].append(tokens[kept])
        halves[2 * number // len(pairs)][1].append(classes_N[kept])
    model.train(was_training)
    rng = np.random.default_rng(0)
    parts = []
    for features, classes in halves:
        features_ND, classes_N = np.concatenate(features), np.concatenate(classes)
        chosen = rng.permutation(len(classes_N))[:max_patches]
        parts.append((features_ND[chosen], classes_N[chosen]))
    (train, train_classes), (test, test_classes) = parts
    if not len(train_classes) or not len(test_classes):
        raise UserError(f"all pixels of {pairs[0].target.parent} have the label to ignore, {ignore}")
    predicted = knn_predict(train, train_classes, test, min(k, len(train)), device=device)
    ious = []
    for number in np.unique(test_classes):
        truth, said = test_classes == number, predicted == number
        ious.append((truth & said).sum() / (truth | said).sum())
    return {
        "patch_knn_miou": float(np.mean(ious)),
        "patch_knn_accuracy": float((predicted == test_classes).mean()),
    }


def _patch_classes(labels_HW: NDArray[np.integer], rows: int, columns: int) -> NDArray[np.int64]:
    """(rows * columns,) the class of most pixels of each patch; of equals the lower one."""
    labels = torch.from_numpy(labels_HW.astype(np.int64))
    one_hot = F.one_hot(labels).permute(2, 0, 1)[None].float()
    shares = F.interpolate(one_hot, size=(rows, columns), mode="area")[0]
    return shares.flatten(1).argmax(0).numpy()
