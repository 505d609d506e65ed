"""Segmentation by a linear head on frozen patch features, as the papers measure it (2304.07193, section 7.4).

Shape suffixes: C classes, H W pixels, I images.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack, get_args

import numpy as np
from numpy.typing import NDArray

from unlabeled.dense.labelled import labelled_images
from unlabeled.dense.metrics import confusion_matrix, segmentation_scores
from unlabeled.errors import UserError
from unlabeled.evaluate.dense_heads import ChosenHead, HeadTraining, chosen_head, maps_of
from unlabeled.evaluate.labelled import name_of
from unlabeled.evaluate.result import Figure, Result, result_of
from unlabeled.finetune.tasks import DataOptions
from unlabeled.vit import VisionTransformer

if TYPE_CHECKING:
    from rich.console import Console

Head = Literal["linear4", "linear"]


def segmentation(
    model: str | Path | VisionTransformer,
    *,
    train: str | Path,
    test: str | Path,
    head: Head = "linear4",
    ignore: int = 255,
    window: int = 0,
    **training: Unpack[HeadTraining],
) -> Result:
    """Train a head on frozen features of train's images and measure it on test's, at every pixel of their own size.

    The learning rate, and the step whose weights are kept, are those with the best mIoU on a tenth of train.

    Args:
        model: a MODEL, or a backbone.
        train, test: folders of images/ and labels/, see `dense.labelled.labelled_images`.
        head: linear: batch norm and a 1x1 convolution on the last block's patches; linear4: of four blocks.
        ignore: label of pixels that do not count.
        window: pixels; test images are seen through a sliding window of this side; 0: whole.
        training: see `HeadTraining`.

    Returns:
        metrics: miou (over the classes that occur in truth or prediction), pixel_accuracy, iou_<class>; intervals of
        the first two by bootstrap over test images.

    Raises:
        UserError: data that cannot be used, or a head that does not exist.
    """
    if head not in get_args(Head):
        raise UserError(f"There is no segmentation head {head!r}; choose one of {', '.join(get_args(Head))}.")
    chosen = chosen_head("segment", head, model, DataOptions(str(train), ignore=ignore), **training)
    return measured(chosen, name_of(model), test, window, training.get("console"))


def measured(
    chosen: ChosenHead, model: str, test: str | Path, window: int = 0, console: Console | None = None
) -> Result:
    """Return how a trained head does on test images; arguments and metrics as in `segmentation`.

    Raises:
        UserError: no image can be measured.
    """
    ignore = chosen.ignore
    data = labelled_images(test, ignore=ignore, class_names=chosen.classes)
    keys: list[str] = []
    confusions: list[NDArray[np.int64]] = []
    bad = [*chosen.bad_files, *data.bad]
    for key, logits_CHW, labels_HW in maps_of(chosen, data, window, bad.append, console):
        keys.append(key)
        predicted_HW = logits_CHW.argmax(0).numpy()
        confusions.append(confusion_matrix(predicted_HW, labels_HW, len(chosen.classes), ignore))
    if not keys:
        raise UserError(f"No image of {test} can be read (first: {': '.join(bad[-1])}).")
    confusions_ICC = np.stack(confusions)
    ious_C = segmentation_scores(confusions_ICC.sum(0)).iou
    return result_of(
        "segmentation",
        model,
        {"miou": Figure(confusions_ICC, "miou"), "pixel_accuracy": Figure(confusions_ICC, "pixel_accuracy")},
        keys,
        metrics={
            f"iou_{name}": float(iou)
            for name, iou in zip(chosen.classes, ious_C, strict=True)
            if not np.isnan(iou)
        },
        settings=chosen.settings | {"window": window, "ignore": ignore},
        counts={
            "train": chosen.num_train,
            "test": len(keys),
            "classes": len(chosen.classes),
            "bad_files": len(bad),
        },
        bad_files=bad,
        notes=(*chosen.notes, *data.notes),
        seed=chosen.settings["seed"],
    )
