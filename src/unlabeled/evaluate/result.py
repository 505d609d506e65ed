"""What every protocol returns: one model's outcome on one task, and how sure it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.evaluate import bootstrap

LOWER_IS_BETTER = ("rmse", "abs_rel", "log10", "silog", "sq_rel")


class Figure(NamedTuple):
    """What a metric is computed from.

    values_M: one entry a test item, (M,) or (M, ...): 0 or 1 where it is right, a confusion matrix of its pixels, ...
    statistic: which function of their mean the metric is: mean, root, ratio, over_draws, miou, pixel_accuracy.
    """

    values_M: NDArray[Any]
    statistic: str = "mean"


class Picture(NamedTuple):
    """An example for the report."""

    title: str
    image: bytes  # JPEG or PNG
    is_hit: bool | None = None  # right, wrong, or neither


@dataclass(frozen=True)
class Result:
    """One model's outcome on one task; `result_of` makes one.

    Attributes:
        task: knn, linear, logreg, fewshot, retrieval, segmentation, depth.
        model: what was given, as text.
        metrics: by name; shares are in [0, 1]. The first is the one that models are compared by.
        intervals: (low, high), 95%, by bootstrap over test items; of the metrics that have items.
        settings: what was chosen and how, as JSON types.
        counts: of images and classes: train, test, classes, ...
        bad_files: (file, reason) of what could not be read.
        notes: one line for each thing a reader of the metrics should know: images left out, values capped.
        keys: names of the test items, in the order of the figures' values.
        figures: what metrics with intervals are computed from, by name.
        predictions: of each test item as text (a class name), where the task has such; truths likewise.
        pictures: examples.
    """

    task: str
    model: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    settings: dict[str, Any]
    counts: dict[str, int]
    bad_files: list[tuple[str, str]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    keys: list[str] = field(default_factory=list, repr=False)
    figures: dict[str, Figure] = field(default_factory=dict, repr=False)
    predictions: list[str] = field(default_factory=list, repr=False)
    truths: list[str] = field(default_factory=list, repr=False)
    pictures: list[Picture] = field(default_factory=list, repr=False)

    @property
    def main(self) -> str:
        """Name of the metric that models are compared by."""
        return next(iter(self.metrics))

    @property
    def score(self) -> float:
        """The main metric."""
        return self.metrics[self.main]

    @property
    def interval(self) -> tuple[float, float]:
        """The main metric's 95% interval."""
        return self.intervals[self.main]

    @property
    def accuracy(self) -> float:
        """Share of right answers in [0, 1]: of test images, of pixels in segmentation.

        Raises:
            UserError: the task has no such thing.
        """
        for name, value in self.metrics.items():
            if name.startswith(("accuracy", "pixel_accuracy")):
                return value
        raise UserError(f"{self.task} has no accuracy; it has {', '.join(self.metrics)}.")


def result_of(
    task: str,
    model: str,
    figures: Mapping[str, Figure],
    keys: Sequence[str],
    *,
    settings: Mapping[str, Any],
    counts: Mapping[str, int],
    metrics: Mapping[str, float] | None = None,
    bad_files: Iterable[tuple[str, str]] = (),
    notes: Iterable[str] = (),
    predictions: Sequence[str] = (),
    truths: Sequence[str] = (),
    pictures: Iterable[Picture] = (),
    seed: int = 0,
) -> Result:
    """Compute metrics and their intervals from what each test item gave.

    metrics: others, without intervals (the IoU of each class, ...); they follow the figures'.
    Other arguments as `Result`'s attributes.
    """
    values = {name: bootstrap.figure(*one) for name, one in figures.items()}
    intervals = {name: bootstrap.interval(*one, seed=seed) for name, one in figures.items()}
    return Result(
        task, model, {**values, **(metrics or {})}, intervals, dict(settings), dict(counts), list(bad_files),
        tuple(notes), list(keys), dict(figures), list(predictions), list(truths), list(pictures),
    )  # fmt: skip


def edge_notes(name: str, best: float, scores: Mapping[float, float]) -> list[str]:
    """Return what to say where the best of several values lies at an end of what was tried; nothing elsewhere.

    scores: of each value that was tried. Nothing is said where a value between the ends is as good.
    """
    low, high = min(scores), max(scores)
    inside = any(score == scores[best] for value, score in scores.items() if low < value < high)
    if low == high or low < best < high or inside:
        return []
    end, way = ("largest", "larger") if best == high else ("smallest", "smaller")
    return [f"the best {name}, {best:g}, is the {end} of those tried; a {way} one may be better still"]


def compared(a: Result, b: Result, metric: str | None = None) -> bootstrap.Difference:
    """By how much b's metric exceeds a's, by paired bootstrap over the test items that both have.

    metric: the main one by default.

    Raises:
        UserError: the two are of different tasks, or have no test item in common.
    """
    name = metric or a.main
    if a.task != b.task or name not in a.figures or name not in b.figures:
        raise UserError(f"{a.task} of {a.model} and {b.task} of {b.model} have no {name} to compare.")
    (values_a, statistic), (values_b, _) = a.figures[name], b.figures[name]
    if a.keys != b.keys:  # an image that only one of them could read
        places = {key: place for place, key in enumerate(b.keys)}
        both = [(place, places[key]) for place, key in enumerate(a.keys) if key in places]
        if not both:
            raise UserError(f"{a.model} and {b.model} have no test image in common.")
        values_a, values_b = values_a[[i for i, _ in both]], values_b[[j for _, j in both]]
    return bootstrap.compare(values_a, values_b, statistic)


def column(task: str, metric: str) -> str:
    """A metric's name in a table of several tasks: knn, knn_20, fewshot_5, segmentation_miou."""
    return f"{task}{metric.removeprefix('accuracy')}" if metric.startswith("accuracy") else f"{task}_{metric}"
