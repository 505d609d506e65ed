"""What differs between the tasks: how DATA is opened, which head, which loss, which figures.

Shape suffixes: B images, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from unlabeled.dense.heads import DepthHead, SegmentationHead
from unlabeled.dense.labelled import DenseData, depth_images, labelled_images
from unlabeled.dense.losses import depth_loss, resized, segmentation_loss
from unlabeled.dense.metrics import DEPTH_METRICS, confusion_matrix, depth_scores, segmentation_scores
from unlabeled.errors import UserError
from unlabeled.features.preprocessing import Preprocessing, default_preprocessing
from unlabeled.finetune.examples import ClassExamples, DenseExamples, Examples, map_preprocessing
from unlabeled.finetune.heads import KnnHead, LinearHead
from unlabeled.finetune.recipe import TrainRecipe
from unlabeled.finetune.saved import Task
from unlabeled.finetune.train import Loss, Validation
from unlabeled.images.sources import Source, lasting, open_source
from unlabeled.vit import VitConfig

HEADS: dict[str, tuple[str, ...]] = {  # by task, the first by default
    "classify": ("linear", "linear4", "logreg", "knn"),
    "segment": ("linear4", "linear"),
    "depth": ("linear4", "linear", "dpt", "regression"),
}


@dataclass(frozen=True)
class TaskData:
    """Training and validation data of a task, opened.

    Attributes:
        train, validation: examples; validation is None where nothing is held out.
        classes: names; empty of depth.
        preprocessing: of an image at prediction.
        depth_range: least and largest depth in metres; zeros of other tasks.
        ignore: label that does not count.
        notes: one line for each thing a user should know.
        bad: (key, reason) of what is left out.
    """

    train: Examples
    validation: Examples | None
    classes: list[str]
    preprocessing: Preprocessing
    depth_range: tuple[float, float] = (0.0, 0.0)
    ignore: int = 255
    notes: tuple[str, ...] = ()
    bad: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DataOptions:
    """What decides which images are learned from, as they are in recipe.json."""

    data: str
    val: str = ""  # "": a part of data is held out
    held_out: float = 0.1  # share of data, where there is no val
    shots: int = 0  # images of each class that are learned from; 0: all
    size: int = 0  # pixels; 0: the model's own
    ignore: int = 255
    depth_scale: float = 1000.0  # what one metre is in an integer depth file
    seed: int = 0


def open_task(task: Task, options: DataOptions, config: VitConfig) -> TaskData:
    """Open DATA for a task.

    Raises UserError for data without labels, of one class, or validation labels that are no training class.
    """
    if task == "classify":
        return _open_classes(options, config)
    return _open_maps(task, options, config)


def _open_classes(options: DataOptions, config: VitConfig) -> TaskData:
    preprocessing = default_preprocessing(config, options.size or None)
    source, labels = labelled_source(options.data)
    names = list(source.class_names or [])
    counts = np.bincount(labels, minlength=len(names))
    if (counts > 0).sum() < 2:
        raise UserError(
            f"{options.data} has images of one class, {names[int(counts.argmax())]}; two are needed."
        )
    notes = [
        f"class {names[number]} has no image in {options.data} and cannot be learned"
        for number in np.flatnonzero(counts == 0)[:8]
    ]
    if empty := _empty_folders(options.data, names):
        notes.append(f"no image in {options.data} for {', '.join(empty[:8])}: learned without")
    chosen, held = split(labels, options)
    train = ClassExamples(source, chosen, labels[chosen], preprocessing)
    validation: ClassExamples | None = None
    if options.val:
        val_source, val_labels = labelled_source(options.val, names)
        validation = ClassExamples(val_source, np.arange(len(val_labels)), val_labels, preprocessing)
    elif len(held):
        validation = ClassExamples(source, held, labels[held], preprocessing)
    short = int(
        (np.bincount(labels[chosen], minlength=len(names)) < options.shots).sum() - (counts == 0).sum()
    )
    if short > 0:
        notes.append(f"{short} classes have fewer than {options.shots} images; all of theirs are used")
    return TaskData(train, validation, names, preprocessing, notes=tuple(notes))


def _empty_folders(data: str, names: list[str]) -> list[str]:
    """Return the class folders of a folder that hold no image; a source does not know of them."""
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return []
    inside = sorted(one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    return [name for name in inside if name not in names] if {*names} <= {*inside} else []


def labelled_source(data: str, names: list[str] | None = None) -> tuple[Source, NDArray[np.int64]]:
    """Return a source and its labels, as numbers of its own class names, or of those given.

    Raises UserError for a source without labels, and for labels that are not among the names.
    """
    source = open_source(data)
    labels = source.labels()
    if labels is None or source.class_names is None:
        raise UserError(f"{data} has no labels: class folders, a label column or .cls members are needed.")
    if names is None:
        return source, labels
    known = {name: number for number, name in enumerate(names)}
    present = np.unique(labels)
    strange = [source.class_names[one] for one in present if source.class_names[one] not in known]
    if strange:
        more = f" and {len(strange) - 4} more" if len(strange) > 4 else ""
        raise UserError(
            f"{data} has labels outside of the {len(names)} classes: {', '.join(strange[:4])}{more}; "
            f"they are {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}."
        )
    table = np.array([known.get(name, -1) for name in source.class_names], np.int64)
    return source, table[labels]


def split(labels_N: NDArray[np.int64], options: DataOptions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which images are learned from and which are held out, both increasing.

    Of each class the same share is held out, rounded down; with `shots` that many images of each are learned from, and
    nothing is held out: what is not among the shots has no label that counts.
    """
    rng = np.random.default_rng([options.seed, 1])
    chosen, held = [], []
    for number in np.unique(labels_N):
        places = rng.permutation(np.flatnonzero(labels_N == number))
        if options.shots:
            chosen.append(places[: options.shots])
            continue
        count = 0 if options.val else int(len(places) * options.held_out)
        held.append(places[:count])
        chosen.append(places[count:])
    none = np.empty(0, np.int64)
    return np.sort(np.concatenate([none, *chosen])), np.sort(np.concatenate([none, *held]))


def _open_maps(task: Task, options: DataOptions, config: VitConfig) -> TaskData:
    preprocessing = map_preprocessing(config, options.size)
    size = preprocessing.size
    if options.shots:
        raise UserError("--shots is for classes; segmentation and depth learn from all images of DATA.")
    whole = open_maps(task, options.data, options)
    if task == "segment" and whole.num_classes < 2:
        raise UserError(f"{options.data} has one class; segmentation needs two.")
    notes, bad = whole.notes, whole.bad
    if options.val:
        train, held = whole, open_maps(task, options.val, options, whole.class_names)
        notes, bad = notes + held.notes, bad + held.bad
    else:
        order = np.random.default_rng([options.seed, 1]).permutation(len(whole))
        count = int(len(whole) * options.held_out)
        train, held = whole.subset(np.sort(order[count:])), whole.subset(np.sort(order[:count]))
    validation = DenseExamples(held, size, config.patch_size) if len(held) else None
    return TaskData(
        DenseExamples(train, size, config.patch_size), validation, list(whole.class_names), preprocessing,
        whole.depth_range, options.ignore, notes, bad,
    )  # fmt: skip


def open_maps(task: Task, data: str, options: DataOptions, class_names: Iterable[str] = ()) -> DenseData:
    """Open a folder of images/ and labels/ or depth/."""
    if task == "segment":
        return labelled_images(data, ignore=options.ignore, class_names=list(class_names))
    return depth_images(data, depth_scale=options.depth_scale)


def make_head(task: Task, kind: str, config: VitConfig, data: TaskData) -> nn.Module:
    """Return a fresh head; of depth its range is that of the data, and a tenth more.

    Raises UserError for a kind that the task does not have.
    """
    if kind not in HEADS[task]:
        raise UserError(f"There is no {task} head {kind!r}; choose one of {', '.join(HEADS[task])}.")
    if task == "classify":
        num_layers = 4 if kind == "linear4" else 1
        if kind == "knn":
            return KnnHead(config.width, len(data.classes))
        return LinearHead(config.width, len(data.classes), num_layers)
    if task == "segment":
        return SegmentationHead(config.width, len(data.classes), 4 if kind == "linear4" else 1)
    return DepthHead(config.width, kind, max_depth=float(f"{1.1 * data.depth_range[1]:.3g}"))  # type: ignore[arg-type]


def loss_of(task: Task, recipe: TrainRecipe, data: TaskData) -> Loss:
    """Return a task's loss, as a function of what the head returns and the targets."""
    if task == "classify":
        return partial(functional.cross_entropy, label_smoothing=recipe.label_smoothing)
    return partial(segmentation_loss, ignore=data.ignore) if task == "segment" else depth_loss


def validation_of(task: Task, data: TaskData) -> Validation | None:
    """Return what weights are chosen by: accuracy, mean IoU or RMSE."""
    if data.validation is None:
        return None
    if task == "classify":
        return Validation(data.validation, class_figures, "accuracy")
    if task == "segment":
        score = partial(map_figures, num_classes=len(data.classes), ignore=data.ignore)
        return Validation(data.validation, score, "miou")
    return Validation(
        data.validation, partial(depth_figures, max_depth=data.depth_range[1]), "rmse", larger=False
    )


def class_figures(batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return accuracy and mean cross-entropy of logits (B, C) and labels (B,)."""
    right = count = total = 0.0
    for logits_BC, labels_B in batches:
        right += float((logits_BC.argmax(1) == labels_B).sum())
        total += float(functional.cross_entropy(logits_BC, labels_B, reduction="sum"))
        count += len(labels_B)
    return {"accuracy": right / max(count, 1), "validation_loss": total / max(count, 1)}


def map_figures(batches: Iterable[tuple[Tensor, Tensor]], num_classes: int, ignore: int) -> dict[str, float]:
    """Return mean IoU and pixel accuracy of logits (B, C, h, w) and labels (B, H, W), over all pixels together."""
    confusion: NDArray[np.int64] = np.zeros((num_classes, num_classes), np.int64)
    for logits_BChw, labels_BHW in batches:
        predicted = resized(logits_BChw, labels_BHW.shape[1:]).argmax(1).cpu().numpy()
        confusion += confusion_matrix(predicted, labels_BHW.cpu().numpy(), num_classes, ignore)
    scores = segmentation_scores(confusion)
    return {"miou": float(scores.miou), "pixel_accuracy": float(scores.accuracy)}


def depth_figures(batches: Iterable[tuple[Tensor, Tensor]], max_depth: float) -> dict[str, float]:
    """Return the means over images of the depth metrics, of metres (B, 1, h, w) and (B, 1, H, W)."""
    rows = []
    for metres_B1hw, depth_B1HW in batches:
        predicted = resized(metres_B1hw, depth_B1HW.shape[2:]).cpu().numpy()
        for said, truth in zip(predicted, depth_B1HW.cpu().numpy(), strict=True):
            scores = depth_scores(said[0], truth[0], max_depth=max_depth * 1.001)
            if scores is not None:
                rows.append(scores)
    if not rows:
        return {"rmse": float("nan")}
    return dict(zip(DEPTH_METRICS, np.mean(rows, axis=0).tolist(), strict=True))


def as_json(options: DataOptions) -> dict[str, Any]:
    """Return the options with paths that mean the same from every folder."""
    places = {"data": lasting(options.data), "val": options.val and lasting(options.val)}
    return asdict(options) | places
