"""Depth by a head on frozen features, as the papers measure it (2304.07193, section 7.4).

Shape suffixes: H W pixels, I images, M metrics.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack, get_args

import numpy as np

from unlabeled.dense.heads import DepthKind
from unlabeled.dense.labelled import depth_images
from unlabeled.dense.metrics import DEPTH_METRICS, Align, Crop, depth_scores
from unlabeled.errors import UserError
from unlabeled.evaluate.dense_heads import ChosenHead, HeadTraining, chosen_head, maps_of
from unlabeled.evaluate.labelled import name_of
from unlabeled.evaluate.result import Figure, Result, result_of
from unlabeled.finetune.tasks import DataOptions
from unlabeled.vit import VisionTransformer

if TYPE_CHECKING:
    from rich.console import Console


def depth(
    model: str | Path | VisionTransformer,
    *,
    train: str | Path,
    test: str | Path,
    head: DepthKind = "linear4",
    min_depth: float = 0.001,
    max_depth: float = 0.0,
    crop: Crop = "",
    align: Align = "",
    depth_scale: float = 1000.0,
    channels: int = 256,
    window: int = 0,
    **training: Unpack[HeadTraining],
) -> Result:
    """Train a head on frozen features of train's images and measure it on test's, at every pixel of their own size.

    The learning rate, and the step whose weights are kept, are those with the least RMSE on a tenth of train.

    Args:
        model: a MODEL, or a backbone.
        train, test: folders of images/ and depth/, see `dense.labelled.depth_images`.
        head: linear, linear4, dpt or regression, see `dense.heads.DepthHead`.
        min_depth, max_depth: metres; true depths between them count, and predictions are clamped to them. max_depth 0:
            the largest depth of train.
        crop: eigen (NYU) or garg (KITTI), the part of test images that counts; all by default.
        align: median or least squares, for depth that is known up to scale only, see `dense.metrics.depth_scores`.
        depth_scale: what one metre is in an integer depth file.
        channels: of the dpt head's maps; 256 is the papers', and slow on a CPU.
        window: as in `segmentation`.
        training: see `HeadTraining`.

    Returns:
        metrics: rmse (metres), abs_rel, log10, delta1, delta2, delta3: means over images, with intervals by bootstrap
        over them.

    Raises:
        UserError: data that cannot be used, or a head that does not exist.
    """
    if crop not in get_args(Crop) or align not in get_args(Align):
        ways = " and ".join(", ".join(filter(None, get_args(kind))) for kind in (Crop, Align))
        raise UserError(f"There is no crop {crop!r} or no alignment {align!r}; there are {ways}.")
    arguments = {"channels": channels} if head == "dpt" else None
    data = DataOptions(str(train), depth_scale=depth_scale)
    chosen = chosen_head("depth", head, model, data, arguments, **training)
    return measured(
        chosen, name_of(model), test, min_depth, max_depth, crop, align, depth_scale, window,
        training.get("console"),
    )  # fmt: skip


def measured(
    chosen: ChosenHead,
    model: str,
    test: str | Path,
    min_depth: float = 0.001,
    max_depth: float = 0.0,
    crop: Crop = "",
    align: Align = "",
    depth_scale: float = 1000.0,
    window: int = 0,
    console: Console | None = None,
) -> Result:
    """Return how a trained head does on test images; arguments and metrics as in `depth`.

    Raises:
        UserError: no image can be measured.
    """
    data = depth_images(test, depth_scale=depth_scale)
    # A little more, so that the largest depth itself counts.
    limit = max_depth or 1.001 * chosen.depth_range[1]
    keys, rows = list[str](), []
    bad = [*chosen.bad_files, *data.bad]
    for key, metres_1HW, depth_HW in maps_of(chosen, data, window, bad.append, console):
        scores_M = depth_scores(metres_1HW[0].numpy(), depth_HW, min_depth, limit, crop, align)
        if scores_M is None:
            bad.append((key, f"no depth between {min_depth:g} and {limit:g} m in the part that counts"))
            continue
        keys.append(key)
        rows.append(scores_M)
    if not keys:
        raise UserError(f"No image of {test} can be measured (first: {': '.join(bad[-1])}).")
    scores_IM = np.stack(rows)
    return result_of(
        "depth",
        model,
        {name: Figure(scores_IM[:, place]) for place, name in enumerate(DEPTH_METRICS)},
        keys,
        settings=chosen.settings
        | {"window": window, "min_depth": min_depth, "max_depth": limit, "crop": crop, "align": align},
        counts={"train": chosen.num_train, "test": len(keys), "bad_files": len(bad)},
        bad_files=bad,
        notes=(*chosen.notes, *data.notes),
        seed=chosen.settings["seed"],
    )
