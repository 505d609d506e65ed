"""Linear classification by the papers' protocol: a grid of heads on frozen features, all trained at once.

Shape suffixes: N images, B of a batch, D width of a view, L learning rates, C classes, X = 1 + D: the bias is a weight
of a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unlabeled.devices import choose_device
from unlabeled.errors import UserError
from unlabeled.evaluate.examples import examples
from unlabeled.evaluate.labelled import Data, Extraction, Labelled, Model, Vectors, held_out, labelled
from unlabeled.evaluate.result import Figure, Result, edge_notes, result_of

# Of the release, for batches of 256; in proportion for others.
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
MOMENTUM = 0.9
BATCH = 1024
EPOCHS, LEAST_STEPS = 10, 500
INIT_STD = 0.01
CHUNK = 4096  # images classified at once
RESIDENT_BYTES = 2**30  # training features up to this are held in memory


class Head(NamedTuple):
    """A point of the grid: columns of the features, and a learning rate at batches of 256."""

    view: str
    learning_rate: float


def linear(
    model: Model | None = None,
    train: Data = "",
    test: Data = "",
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    steps: int | None = None,
    batch: int = BATCH,
    seed: int = 0,
    **extraction: Unpack[Extraction],
) -> Result:
    """Accuracy of a linear head on frozen features: SGD with momentum .9, no weight decay, cosine to 0.

    (DINOv2 section 7.1 and appendix B.3.) The grid is learning rates x {1, 4} layers x with and without the mean
    patch. The head that is best on a tenth of train is trained again on all of it, and tested once. Features are
    those of the evaluation crop: there is no augmentation.

    Args:
        model: a MODEL; none where both sides are feature tables (of kind layers for the whole grid).
        train, test: labelled DATA, or feature tables.
        learning_rates: for batches of 256; scaled in proportion.
        steps: of SGD; None: 10 passes, 500 steps at least.
        batch: images.
        seed: of the split, the order of images and the heads' first weights.
        extraction: see `Extraction`.

    Raises:
        UserError: as `labelled` does, or a class has too few images to hold one out.
    """
    task = labelled(model, train, test, kind="layers", **extraction)
    device = choose_device(extraction.get("device", "auto"))
    fit, chosen_on = held_out(task.train.labels_N, seed)
    if not len(chosen_on):
        raise UserError(
            f"{task.train.name} has one image a class: a linear probe needs others to choose on; use fewshot."
        )
    batch_size = min(batch, len(fit))
    steps = steps or max(LEAST_STEPS, EPOCHS * len(task.train) // batch_size)
    grid = [Head(view, rate) for view in task.views for rate in learning_rates]
    heads = _trained(task, grid, fit, steps, batch_size, seed, device)
    accuracies: dict[Head, float] = {}
    for view, weights in heads.items():
        predicted = _predicted(task.vectors(task.train, view), weights, device, chosen_on)
        right = predicted == task.train.labels_N[chosen_on][:, None]
        accuracies |= zip([head for head in grid if head.view == view], right.mean(0).tolist(), strict=True)
    best = max(grid, key=lambda head: accuracies[head])
    final = _trained(task, [best], None, steps, batch_size, seed, device)
    predicted = _predicted(task.vectors(task.test, best.view), final[best.view], device)[:, 0]
    figures = {"accuracy": Figure(predicted == task.test.labels_N)}
    settings = {
        "learning_rate": best.learning_rate,
        "features": best.view,
        "steps": steps,
        "batch_size": batch_size,
        "held_out_accuracy": round(accuracies[best], 4),
        "held_out_images": len(chosen_on),
        "grid": [
            {"features": head.view, "learning_rate": head.learning_rate, "held_out_accuracy": round(value, 4)}
            for head, value in accuracies.items()
        ],
    }
    same_view = {head.learning_rate: value for head, value in accuracies.items() if head.view == best.view}
    at_edge = edge_notes("learning rate of linear", best.learning_rate, same_view)
    return result_of(
        "linear", task.model, figures, task.test.keys, settings=settings, counts=task.counts,
        bad_files=task.bad_files, notes=[*task.notes, *at_edge], **examples(task, predicted, seed),
    )  # fmt: skip


def train_heads(
    batches: Iterator[tuple[dict[str, Tensor], Tensor]],
    weights: dict[str, Tensor],
    rates: dict[str, Tensor],
    steps: int,
) -> None:
    """Train many softmax heads by SGD, in place; each view's heads are one product a step.

    The gradient is written out: of the mean cross-entropy with respect to the logits it is (softmax - one-hot) / B.

    Args:
        batches: `steps` times features of each view (B, X), the last column 1, and labels (B,).
        weights: of each view (X, L, C).
        rates: of each view (L,), the learning rates at the start; they fall to 0 as half a cosine.
        steps: of the whole schedule.
    """
    velocity = {view: torch.zeros_like(one) for view, one in weights.items()}
    for step, (features, labels_B) in enumerate(batches):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        rows_B = torch.arange(len(labels_B), device=labels_B.device)
        for view, weight_XLC in weights.items():
            x_BX = features[view]
            gradient_BLC = (x_BX @ weight_XLC.flatten(1)).unflatten(1, weight_XLC.shape[1:]).softmax(2)
            gradient_BLC[rows_B, :, labels_B] -= 1
            product = x_BX.T @ gradient_BLC.flatten(1)
            velocity[view].mul_(MOMENTUM).add_(product.view_as(weight_XLC), alpha=1 / len(labels_B))
            weight_XLC.sub_(velocity[view] * (decay * rates[view])[None, :, None])


@torch.inference_mode()
def _trained(
    task: Labelled,
    grid: Sequence[Head],
    rows: NDArray[np.int64] | None,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Weights (X, L, C) of each view's heads, trained on some rows of train, or on all."""
    rates: dict[str, list[float]] = {}
    for head in grid:
        rates.setdefault(head.view, []).append(head.learning_rate * batch_size / 256)
    weights = {}
    for view, some in rates.items():
        width = task.vectors(task.train, view).shape[1]
        generator = torch.Generator().manual_seed(seed)
        first_DC = torch.empty(width, len(task.classes)).normal_(0, INIT_STD, generator=generator)
        first_XC = torch.cat((first_DC, torch.zeros(1, len(task.classes))))
        weights[view] = first_XC[:, None].repeat(1, len(some), 1).to(device)
    batches = _batches(task, list(rates), rows, steps, batch_size, seed, device)
    tensors = {view: torch.tensor(some, device=device) for view, some in rates.items()}
    train_heads(batches, weights, tensors, steps)
    return weights


def _batches(
    task: Labelled,
    views: list[str],
    rows: NDArray[np.int64] | None,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Features of each view with a column of ones, and labels: shuffled passes over the rows, without end."""
    rows = np.arange(len(task.train)) if rows is None else rows
    widest = max(views, key=lambda view: task.vectors(task.train, view).shape[1])
    origin = task.views[widest].start
    stored: Any = task.vectors(task.train, widest)
    if 4 * stored.shape[0] * stored.shape[1] <= RESIDENT_BYTES:
        stored = stored[:]
    labels_N, rng = torch.from_numpy(task.train.labels_N), np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        while len(order) < batch_size:
            order = np.concatenate((order, rng.permutation(rows)))
        chosen, order = np.sort(order[:batch_size]), order[batch_size:]
        whole = torch.from_numpy(stored[chosen]).to(device)
        ones = torch.ones(len(chosen), 1, device=device)
        yield (
            {
                view: torch.cat((whole[:, task.views[view].start - origin : task.views[view].stop - origin], ones), 1)
                for view in views
            },
            labels_N[chosen].to(device),
        )  # fmt: skip


@torch.inference_mode()
def _predicted(
    vectors: Vectors, weight_XLC: Tensor, device: torch.device, rows: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The class that each head gives to each row, or to some, (N, L)."""
    rows = np.arange(len(vectors)) if rows is None else rows
    predicted = []
    for start in range(0, len(rows), CHUNK):
        part_ND = torch.from_numpy(vectors[rows[start : start + CHUNK]]).to(device)
        logits = (part_ND @ weight_XLC[:-1].flatten(1)).unflatten(1, weight_XLC.shape[1:]) + weight_XLC[-1]
        predicted.append(logits.argmax(2).cpu().numpy())
    return np.concatenate(predicted)
