"""Weighted k-nearest-neighbour classification, as in the papers.

Shape suffixes: N training rows, M test rows, D width, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from unlabeled.devices import choose_device
from unlabeled.errors import UserError
from unlabeled.evaluate.examples import examples
from unlabeled.evaluate.labelled import Data, Extraction, Model, labelled
from unlabeled.evaluate.nearest import Neighbours, nearest
from unlabeled.evaluate.result import Figure, Result, result_of
from unlabeled.features.extract import extract

if TYPE_CHECKING:
    from unlabeled.images.sources import Source
    from unlabeled.vit import VisionTransformer

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
HELD_OUT = 2000  # training images whose class is looked for among the others, to choose k
CHUNK_BYTES = 256 * 2**20  # of votes held at once


def knn(
    model: Model | None = None,
    train: Data = "",
    test: Data = "",
    *,
    k: int | Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    features: str = "cls",
    seed: int = 0,
    **extraction: Unpack[Extraction],
) -> Result:
    """k-NN accuracy of frozen features: L2-normalised, votes weighing exp(cosine / temperature).

    (DINO section 4.1; Wu et al., 1805.01978, section 3.4.) Of several k that one counts as the accuracy which is
    best for up to 2,000 training images searched among the other training images; test has no say.

    Args:
        model: a MODEL; none where both sides are feature tables.
        train, test: labelled DATA, or feature tables.
        k: neighbours, one number or several.
        temperature: of the votes.
        features: cls, or cls+mean for CLS and mean patch side by side.
        seed: of the choice of training images.
        extraction: see `Extraction`.

    Raises:
        UserError: as `labelled` does, or k is larger than the training set.
    """
    ks = sorted({k} if isinstance(k, int) else set(k))
    if not ks or ks[0] < 1:
        raise UserError(f"k-NN needs one neighbour at least, not k = {ks[0] if ks else ''}.")
    task = labelled(model, train, test, kind="cls+mean" if "mean" in features else "cls", **extraction)
    notes = list(task.notes)
    num_train = len(task.train)
    if isinstance(k, int):
        _check_k(k, num_train)
    if too_many := [one for one in ks if one > num_train]:
        ks = [one for one in ks if one <= num_train] or [num_train]
        notes.append(
            f"k = {', '.join(map(str, too_many))} left out: train has {num_train} labelled images; k = "
            f"{', '.join(map(str, ks))} used"
        )
    device = choose_device(extraction.get("device", "auto"))
    train_vectors, labels = task.vectors(task.train, features), task.train.labels_N
    found = nearest(train_vectors, task.vectors(task.test, features), ks[-1], device)
    predicted = {one: vote(found, labels, one, temperature) for one in ks}
    held_out = {}
    if len(ks) > 1:
        held_out = _held_out(train_vectors, labels, ks, temperature, device, seed)
    chosen = max(ks, key=lambda one: held_out.get(one, 0.0))
    right = {one: predicted[one] == task.test.labels_N for one in ks}
    figures = {"accuracy": Figure(right[chosen])}
    if len(ks) > 1:
        figures |= {f"accuracy_{one}": Figure(right[one]) for one in ks}
    settings = {"k": chosen, "temperature": temperature, "features": features}
    if held_out:
        settings["held_out_accuracy"] = {str(one): round(value, 4) for one, value in held_out.items()}
    return result_of(
        "knn", task.model, figures, task.test.keys, settings=settings, counts=task.counts,
        bad_files=task.bad_files, notes=notes, **examples(task, predicted[chosen], seed),
    )  # fmt: skip


def _held_out(
    train_ND: Any,
    labels_N: NDArray[np.int64],
    ks: list[int],
    temperature: float,
    device: torch.device,
    seed: int,
) -> dict[int, float]:
    """Accuracy of each k for training images that are searched among the others."""
    num = len(labels_N)
    chosen = np.sort(np.random.default_rng(seed).permutation(num)[:HELD_OUT])
    found = nearest(train_ND, train_ND[chosen], min(ks[-1] + 1, num), device)
    is_own = found.rows == chosen[:, None]
    is_own[~is_own.any(1), -1] = True  # its duplicates took its place
    others = Neighbours(*(part[~is_own].reshape(len(chosen), -1) for part in found))
    return {
        one: float((vote(others, labels_N, one, temperature) == labels_N[chosen]).mean())
        for one in ks
        if one <= num - 1
    }


def vote(found: Neighbours, labels_N: NDArray[np.int64], k: int, temperature: float) -> NDArray[np.int64]:
    """The label that the first k neighbours vote for, int64 (M,); of labels with the same votes the lower one."""
    num_classes = int(labels_N.max()) + 1
    weights_Mk = np.exp(found.similarities[:, :k].astype(np.float64) / temperature)
    labels_Mk = labels_N[found.rows[:, :k]]
    at_once = max(1, CHUNK_BYTES // (8 * num_classes))
    predicted = []
    for start in range(0, len(labels_Mk), at_once):
        labels, weights = labels_Mk[start : start + at_once], weights_Mk[start : start + at_once]
        cells = labels + num_classes * np.arange(len(labels))[:, None]
        votes = np.bincount(cells.ravel(), weights.ravel(), minlength=num_classes * len(labels))
        predicted.append(votes.reshape(len(labels), num_classes).argmax(1))
    return np.concatenate(predicted)


def knn_predict(
    train_ND: Any,
    train_labels_N: NDArray[np.int64],
    test_MD: Any,
    k: int = 20,
    temperature: float = TEMPERATURE,
    device: str | torch.device = "cpu",
) -> NDArray[np.int64]:
    """The label that the k most similar training rows vote for, see `knn` and `vote`.

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
    _check_k(k, len(train_ND))
    return vote(nearest(train_ND, test_MD, k, device), np.asarray(train_labels_N), k, temperature)


def _check_k(k: int, num_train: int) -> None:
    if k > num_train:
        raise UserError(f"k-NN with k = {k} needs as many labelled images; there are {num_train}.")


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
