"""From labelled DATA and a MODEL to a trained head beside its backbone."""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from rich.console import Console

from unlabeled.errors import UserError, writing
from unlabeled.features.engines import weights_hash
from unlabeled.finetune.backbone import released
from unlabeled.finetune.batches import report_to
from unlabeled.finetune.examples import ClassExamples
from unlabeled.finetune.fitted import Fitting, fit_knn, fit_logreg
from unlabeled.finetune.heads import KnnHead, LinearHead
from unlabeled.finetune.lora import merge_adapters
from unlabeled.finetune.recipe import Backbone, default_recipe
from unlabeled.finetune.saved import HeadInfo, Task, TrainedHead, load_head, palette, save_head
from unlabeled.finetune.tasks import (
    HEADS,
    DataOptions,
    as_json,
    loss_of,
    make_head,
    open_task,
    validation_of,
)
from unlabeled.finetune.train import TrainableHead, train_head
from unlabeled.images.bad_files import BadFiles
from unlabeled.json_file import read_json
from unlabeled.weights.files import replacing
from unlabeled.weights.load import load_model

NOTHING_LOST = {"recipe.json", "bad_files.jsonl"}  # what a training that failed before it began leaves
FITTED = ("logreg", "knn")  # heads that are computed, not trained step by step


@dataclass(frozen=True)
class Finetuned:
    """A finished training.

    Attributes:
        path: the folder: head.json, head.safetensors, model/, recipe.json, metrics.jsonl.
        figures: of validation, of the weights that were kept; empty where nothing was held out.
        steps: of the optimizer; step: after which the weights that were kept were.
        seconds: of this call's training.
        bad_files: number of images that could not be used.
        saved: a sentence on what cached tokens saved; "" without.
    """

    path: Path
    figures: dict[str, float]
    steps: int
    step: int
    seconds: float
    bad_files: int
    saved: str

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict a step; none of heads that are not trained in steps."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def head(self, device: str = "auto") -> TrainedHead:
        """Return the head, ready to predict."""
        return load_head(self.path, device=device)


def finetune(
    data: str | Path | None = None,
    model: str | Path | None = None,
    out: str | Path | None = None,
    *,
    task: Task = "classify",
    backbone: Backbone = "freeze",
    head: str = "",
    val: str | Path = "",
    held_out: float = 0.1,
    shots: int = 0,
    size: int = 0,
    seed: int = 0,
    ignore: int = 255,
    depth_scale: float = 1000.0,
    train: dict[str, Any] | None = None,
    copy_backbone: bool = True,
    resume: str | Path | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> Finetuned:
    """Train a head on labelled images, and as much of its backbone as wanted.

    Args:
        data: labelled DATA: class folders, a label column; or a folder of images/ beside labels/ or depth/.
        model: MODEL.
        out: the folder to make.
        task: classify, segment or depth.
        backbone: freeze (the head alone), lora (low-rank adapters too, merged at the end) or full (all weights).
        head: classify: linear, linear4, logreg, knn; segment: linear4, linear; depth: linear4, linear, dpt,
            regression. The first of each by default.
        val: labelled DATA that the weights are chosen on; without it a share of data is held out for that.
        held_out: that share, of each class.
        shots: learn from so many images of each class; without val nothing is held out then.
        size: pixels, of the crop of classification, of the short side of maps; 0: the model's own.
        seed: of everything random.
        ignore: label of pixels that do not count. depth_scale: what one metre is in an integer depth file.
        train: fields of `TrainRecipe` by name, and `epochs`; the rest has defaults that fit the task and the data.
        copy_backbone: of a frozen backbone, write a copy into out/model; without it, its name and the hash of its
            weights alone.
        resume: a folder to go on with; it has its own data, model and recipe.
        device: auto, cpu, cuda, cuda:1, mps.
        console: where progress is shown; standard error by default.

    Raises:
        UserError: bad data, model or folder; a loss that stays non-finite; a full disk.
        StoppedBySignal: SIGTERM or SIGINT came; a checkpoint is written.
    """
    console = console or Console(stderr=True)
    if resume is not None:
        folder, plan = _resumed(Path(resume).expanduser(), [data, model, out])
    else:
        if data is None or model is None or out is None:
            raise UserError("finetune needs DATA, --model and --out, or --resume and a folder.")
        folder = Path(out).expanduser()
        options = DataOptions(str(data), str(val), held_out, shots, size, ignore, depth_scale, seed)
        plan = _planned(task, backbone, head, str(model), options, train or {}, copy_backbone)
        if folder.exists() and not (
            folder.is_dir() and {one.name for one in folder.iterdir()} <= NOTHING_LOST
        ):
            raise UserError(
                f"{folder} exists and is not empty; choose another --out, or go on with --resume."
            )
    network = load_model(plan["model"])
    weights = weights_hash(network)
    opened = open_task(plan["task"], DataOptions(**plan["data"]), network.config)
    recipe = default_recipe(plan["task"], plan["backbone"], len(opened.train), plan["train"])
    recipe = dataclasses.replace(recipe, seed=plan["data"]["seed"])
    _same_as_before(plan, weights, opened.classes, len(opened.train))
    plan |= {"weights": weights, "classes": opened.classes, "images": len(opened.train)}
    plan["resolved"] = dataclasses.asdict(recipe)
    with writing(folder), replacing(folder / "recipe.json") as part:
        part.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    last = (
        () if opened.validation else ("nothing is held out to choose the weights by; the last ones are kept",)
    )
    for note in opened.notes + last:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    bad = BadFiles(folder / "bad_files.jsonl")
    for key, reason in opened.bad:
        bad.add(key, reason)
    torch.manual_seed(recipe.seed)
    fresh = make_head(plan["task"], plan["head"], network.config, opened)
    report = report_to(bad)
    validation = validation_of(plan["task"], opened)
    if plan["head"] in FITTED:
        given = Fitting(
            network, cast(ClassExamples, opened.train), validation, recipe.seed, device, report, console
        )
        if isinstance(fresh, KnnHead):
            fresh, trained = fit_knn(fresh, given)
        else:
            fresh, trained = fit_logreg(cast(LinearHead, fresh), given)
    else:
        trained = train_head(
            network, cast(TrainableHead, fresh), opened.train, loss_of(plan["task"], recipe, opened), recipe,
            validation=validation, folder=folder, device=device, report=report, console=console,
            again=f"unlabeled finetune --resume {shlex.quote(str(folder))}", num_classes=len(opened.classes),
        )  # fmt: skip
    if plan["backbone"] == "lora":
        merge_adapters(network)
    network = released(network).cpu()
    reads = cast(TrainableHead, fresh)
    info = HeadInfo(
        plan["task"], type(fresh).__name__, reads.arguments, opened.classes,  # type: ignore[attr-defined]
        dataclasses.asdict(opened.preprocessing), reads.layers(network.config.depth),
        {
            "name": plan["model"] if plan["backbone"] == "freeze" else "",
            "weights": weights if plan["backbone"] == "freeze" else weights_hash(network),
            "tuned": plan["backbone"],
        },
        palette(len(opened.classes)) if plan["task"] == "segment" else [],
        trained.figures, plan["data"]["ignore"], plan["data"]["depth_scale"],
    )  # fmt: skip
    save_head(folder, info, network, fresh, plan["copy_backbone"] or plan["backbone"] != "freeze")
    steps = 0 if plan["head"] in FITTED else recipe.steps
    return Finetuned(folder, trained.figures, steps, trained.step, trained.seconds, bad.count, trained.saved)


def _planned(
    task: Task,
    backbone: Backbone,
    head: str,
    model: str,
    options: DataOptions,
    train: dict[str, Any],
    copy_backbone: bool,
) -> dict[str, Any]:
    """What recipe.json holds of a new training."""
    if task not in get_args(Task):
        raise UserError(f"There is no task {task!r}; choose one of {', '.join(get_args(Task))}.")
    head = head or HEADS[task][0]
    if head not in HEADS[task]:
        raise UserError(f"There is no {task} head {head!r}; choose one of {', '.join(HEADS[task])}.")
    if head in FITTED and (backbone != "freeze" or train):
        raise UserError(
            f"--head {head} is computed from the features of a frozen backbone: nothing is trained."
        )
    if not 0 <= options.held_out < 1:
        raise UserError(f"--held-out {options.held_out} is no share; it is in [0, 1).")
    if options.shots < 0:
        raise UserError(f"--shots {options.shots} is less than one image of each class.")
    place = Path(model).expanduser()
    return {
        "task": task, "backbone": backbone, "head": head, "model": str(place.absolute()) if place.exists() else model,
        "data": as_json(options), "train": train, "copy_backbone": copy_backbone,
    }  # fmt: skip


def _resumed(folder: Path, given: list[Any]) -> tuple[Path, dict[str, Any]]:
    if any(one is not None for one in given):
        raise UserError(f"--resume {folder} has its own DATA, model and folder; leave them out.")
    if not (folder / "recipe.json").exists():
        raise UserError(f"{folder} holds no training to go on with (no recipe.json).")
    if (folder / "head.json").exists():
        raise UserError(
            f"The training in {folder} is finished; unlabeled predict DATA --head {folder} uses it."
        )
    plan = read_json(folder / "recipe.json")
    if not {"task", "backbone", "head", "model", "data", "train", "copy_backbone"} <= plan.keys():
        raise UserError(f"{folder / 'recipe.json'} is of no training that this version knows.")
    return folder, plan


def _same_as_before(plan: dict[str, Any], weights: str, classes: list[str], images: int) -> None:
    """Raise UserError where a training that goes on would go on with something else."""
    if plan.get("weights", weights) != weights:
        raise UserError(f"{plan['model']} has other weights now than when this training began.")
    before = plan.get("classes", classes)
    if before != classes:
        raise UserError(
            f"{plan['data']['data']} has {len(classes)} classes now and had {len(before)} when this training began: "
            f"{', '.join(sorted({*before} ^ {*classes})[:4])} came or went."
        )
    if plan.get("images", images) != images:
        raise UserError(
            f"{plan['data']['data']} gives {images} training images now and gave {plan['images']} when this training "
            "began; begin anew with another --out."
        )
