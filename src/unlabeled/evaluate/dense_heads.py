"""What segmentation and depth share: a head whose learning rate is chosen within train, and its maps of test images.

Shape suffixes: B images, C channels (classes, or 1 of depth), H W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, Unpack, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unlabeled.ahead import ahead
from unlabeled.dense.inference import Head, predict
from unlabeled.dense.labelled import DenseData
from unlabeled.dense.losses import resized
from unlabeled.devices import choose_device
from unlabeled.errors import UserError
from unlabeled.evaluate.result import edge_notes
from unlabeled.features.preprocessing import Preprocessing
from unlabeled.finetune.backbone import released
from unlabeled.finetune.batches import num_threads, of_one_shape, report_to
from unlabeled.finetune.recipe import default_recipe
from unlabeled.finetune.saved import Task
from unlabeled.finetune.tasks import DataOptions, loss_of, make_head, open_task, validation_of
from unlabeled.finetune.train import TrainableHead, train_head
from unlabeled.images.decode import BadImage
from unlabeled.images.transform import normalize
from unlabeled.progress import Progress
from unlabeled.vit import VisionTransformer
from unlabeled.weights.load import load_model

if TYPE_CHECKING:
    from rich.console import Console

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
EVALUATIONS = 4  # on the part that is held out, of each training
BATCH = 8  # test images at once; a map of many classes at full size is large


@dataclass(frozen=True)
class ChosenHead:
    """A trained head and what it was chosen by.

    Attributes:
        model, head: in evaluation mode, on the device.
        preprocessing: of an image.
        classes: names; empty of depth.
        depth_range: of train in metres; zeros of segmentation.
        ignore: label that does not count.
        num_train: images that were learned from.
        settings: what was chosen and how, as JSON types.
        bad_files, notes: of train.
    """

    model: VisionTransformer
    head: nn.Module
    device: torch.device
    preprocessing: Preprocessing
    classes: list[str]
    depth_range: tuple[float, float]
    ignore: int
    num_train: int
    settings: dict[str, Any]
    bad_files: list[tuple[str, str]]
    notes: tuple[str, ...]


class HeadTraining(TypedDict, total=False):
    """How a head is trained; all have defaults.

    size: pixels, of the short side that the model sees; 0: as `finetune` takes it.
    learning_rates: of AdamW, to choose from.
    epochs: passes over train; 0: as `finetune` takes it.
    seed: of everything random.
    device: auto, cpu, cuda, cuda:1 or mps.
    cache: a folder where tokens are kept for other heads on the same data and model; a temporary one by default.
    console: where progress is shown; nowhere by default.
    """

    size: int
    learning_rates: Sequence[float]
    epochs: float
    seed: int
    device: str
    cache: str | Path | None
    console: Console | None


def chosen_head(
    task: Task,
    kind: str,
    model: str | Path | VisionTransformer,
    data: DataOptions,
    arguments: Mapping[str, Any] | None = None,
    **training: Unpack[HeadTraining],
) -> ChosenHead:
    """Train a head with each learning rate on nine tenths of train; return the best one on the last tenth.

    data: train; its size and seed are those of `training`. arguments: of the head, where others than `make_head`'s are
    wanted.

    Raises:
        UserError: train has fewer than ten usable images, or there is no learning rate.
    """
    learning_rates = training.get("learning_rates", LEARNING_RATES)
    if not learning_rates:
        raise UserError("There is no learning rate to choose from.")
    options = dataclasses.replace(data, size=training.get("size", 0), seed=training.get("seed", 0))
    epochs, device = training.get("epochs", 0), training.get("device", "auto")
    cache, console = training.get("cache"), training.get("console")
    network = load_model(model) if isinstance(model, str | Path) else model
    opened = open_task(task, options, network.config)
    validation = validation_of(task, opened)
    if validation is None:
        raise UserError(
            f"{options.data} has {len(opened.train)} usable images; ten are needed, one to choose by."
        )
    fields: dict[str, Any] = {"evaluations": EVALUATIONS} | ({"epochs": epochs} if epochs else {})
    recipe = default_recipe(task, "freeze", len(opened.train), fields)
    bad_files = [*opened.bad]
    tried: list[tuple[float, float, dict[str, float], nn.Module]] = []
    with ExitStack() as stack:
        folder = Path(cache or stack.enter_context(TemporaryDirectory(prefix="unlabeled-")))
        for lr in learning_rates:
            torch.manual_seed(options.seed)
            head = make_head(task, kind, network.config, opened)
            if arguments:
                head = type(head)(**{**head.arguments, **arguments})  # type: ignore[dict-item]
            if console:
                console.print(f"{task}, {kind} head, learning rate {lr:g}", highlight=False)
            trained = train_head(
                network, cast(TrainableHead, head), opened.train, loss_of(task, recipe, opened),
                dataclasses.replace(recipe, lr=lr, seed=options.seed), validation=validation,
                cache=folder / f"{_blocks(head, network)}-{cast(Head, head).norm}", device=device,
                report=report_to(None, bad_files), console=console,
            )  # fmt: skip
            found = trained.figures[validation.by]
            tried.append((found if validation.larger else -found, lr, trained.figures, head))
    best = max(tried, key=lambda one: one[0])
    settings = {
        "head": kind,
        "learning_rate": best[1],
        "held_out": {f"{lr:g}": figures[validation.by] for _, lr, figures, _ in tried},
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "size": opened.preprocessing.size,
        "seed": options.seed,
    }
    at_edge = edge_notes(f"learning rate of {kind}", best[1], {lr: found for found, lr, *_ in tried})
    return ChosenHead(
        released(network), best[3].eval(), choose_device(device), opened.preprocessing, opened.classes,
        opened.depth_range, opened.ignore, len(opened.train), settings, list(dict.fromkeys(bad_files)),
        (*opened.notes, *at_edge),
    )  # fmt: skip


class _Loaded(NamedTuple):
    key: str
    pixels_3hw: Tensor  # as the model sees them
    target_HW: NDArray[Any]


def _blocks(head: nn.Module, model: VisionTransformer) -> str:
    return "-".join(map(str, cast(Head, head).layers(len(model.blocks))))


@torch.no_grad()
def maps_of(
    chosen: ChosenHead,
    data: DenseData,
    window: int,
    report: Callable[[tuple[str, str]], None],
    console: Console | None,
) -> Iterator[tuple[str, Tensor, NDArray[Any]]]:
    """Give each image's key, its map (C, H, W) at its own size, on the CPU, and its target (H, W).

    Images that cannot be used are reported and left out.
    """

    def load(index: int) -> _Loaded | tuple[str, str]:
        try:
            key, pixels, target_HW = data.read(index)
            return _Loaded(key, torch.from_numpy(chosen.preprocessing(pixels)), target_HW)
        except (BadImage, UserError) as error:
            return data.pairs[index].key, str(error)

    def good(pool: ThreadPoolExecutor) -> Iterator[_Loaded]:
        for found in ahead(pool, load, range(len(data)), 2 * BATCH):
            if isinstance(found, _Loaded):
                yield found
            else:
                report(found)

    with ExitStack() as stack:
        bar = stack.enter_context(Progress(console, "test", "image", 0, len(data))) if console else None
        pool = stack.enter_context(ThreadPoolExecutor(num_threads()))
        done = 0
        for batch in of_one_shape(good(pool), lambda one: one.pixels_3hw.shape, BATCH):
            images_B3hw = normalize(torch.stack([one.pixels_3hw for one in batch]).to(chosen.device))
            maps_BCHW = predict(chosen.model, cast(Head, chosen.head), images_B3hw, window or None)
            for one, maps_CHW in zip(batch, maps_BCHW, strict=True):
                yield one.key, resized(maps_CHW[None], one.target_HW.shape)[0].cpu(), one.target_HW
            done += len(batch)
            if bar:
                bar.update(done, "")
