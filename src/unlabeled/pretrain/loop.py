"""A pretraining run from start to end: data in, steps, checkpoints, figures, pictures."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from unlabeled.errors import UserError, writing
from unlabeled.images.bad_files import BadFiles, first_readable
from unlabeled.images.sources import Source, open_source
from unlabeled.pretrain import auto, checkpoint
from unlabeled.pretrain.data import batches
from unlabeled.pretrain.health import CollapseWatch, figures
from unlabeled.pretrain.method import SelfDistillation
from unlabeled.pretrain.metrics import Metrics
from unlabeled.pretrain.optimizer import apply_schedule, parameter_groups
from unlabeled.pretrain.parallel import Parallel, denormals_flushed
from unlabeled.pretrain.progress import TrainingProgress
from unlabeled.pretrain.recipe import Recipe, check, override
from unlabeled.pretrain.recipes import named_recipe, read_recipe, write_recipe
from unlabeled.pretrain.schedules import values_at
from unlabeled.vit import VisionTransformer
from unlabeled.weights.load import load_model

MAX_SKIPPED = 10  # steps in a row whose loss is not finite before a run stops

Evaluation = Callable[[VisionTransformer], dict[str, float]]


class StoppedBySignal(Exception):  # noqa: N818  (no error: the run is whole and can go on)
    """A run was asked to stop, has written a checkpoint, and can be resumed."""

    def __init__(self, number: int, run: Path, step: int) -> None:
        super().__init__(f"stopped after step {step}; go on with: unlabeled pretrain --resume {run}")
        self.number = number


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        path: the folder: recipe.toml, metrics.jsonl, checkpoints/, model/, pictures/, bad_files.jsonl.
    """

    path: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict a step."""
        with (self.path / "metrics.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    @property
    def recipe(self) -> Recipe:
        """The recipe, every field resolved."""
        return read_recipe(self.path / "recipe.toml")

    def model(self, device: str = "cpu") -> VisionTransformer:
        """The teacher's backbone."""
        return load_model(str(self.path), device=device)


def pretrain(
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    recipe: str | Path | Recipe = "auto",
    steps: int | None = None,
    eval: str | Path | None = None,
    seed: int | None = None,
    device: str = "auto",
    resume: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    evaluation: Evaluation | None = None,
    console: Console | None = None,
) -> Run:
    """Learn a backbone from unlabelled images by self-distillation.

    Args:
        data: DATA: a folder, tar shards, Parquet, a list of paths, hf:NAME.
        out: the run folder to make.
        recipe: a name (see `unlabeled info recipes`), a TOML file, or a Recipe; "auto" reads the data and the machine.
        steps: optimizer steps, over the recipe's.
        eval: labelled DATA for a k-NN figure on the way: half of it is searched for the other half's labels.
        seed: of everything random, over the recipe's.
        device: auto, cpu, cuda, cuda:1, mps.
        resume: a run folder to go on with; it has its own data and recipe.
        overrides: dotted recipe fields, as {"optimizer.lr": 1e-3}.
        evaluation: called with the teacher's backbone every run.eval_every steps; its figures join the metrics.
        console: where progress goes; standard error by default.

    Returns:
        The run; its model is in Hugging Face format in RUN/model.

    Raises:
        UserError: bad data, recipe or folder; a full disk; a loss that stays non-finite.
        StoppedBySignal: SIGTERM or SIGINT came; a checkpoint is written.
    """
    parallel = Parallel.start(device)
    console = console or Console(stderr=True)
    if parallel.rank:
        console = Console(quiet=True)
    if resume is not None:
        folder, plan, source = _resumed(Path(resume), data, overrides)
    else:
        folder, plan, source = _prepared(data, out, recipe, steps, eval, seed, overrides, parallel, console)
    with denormals_flushed():
        return _train(folder, plan, source, parallel, evaluation or _knn_evaluation(plan, parallel), console)


def _prepared(
    data: str | Path | None,
    out: str | Path | None,
    recipe: str | Path | Recipe,
    steps: int | None,
    evaluation: str | Path | None,
    seed: int | None,
    overrides: dict[str, Any] | None,
    parallel: Parallel,
    console: Console,
) -> tuple[Path, Recipe, Source]:
    if out is None:
        raise UserError("no run folder was given: unlabeled pretrain DATA --out RUN")
    folder = Path(out)
    if checkpoint.all_checkpoints(folder / "checkpoints"):
        raise UserError(
            f"{folder} holds a run already: resume it with --resume {folder}, or choose another --out"
        )
    values = dict(overrides or {})
    named = {"run.steps": steps, "run.seed": seed, "data.train": data, "data.evaluation": evaluation}
    values |= {name: _resolved(value) for name, value in named.items() if value is not None}
    if recipe == "auto" or isinstance(recipe, Recipe):
        plan = recipe if isinstance(recipe, Recipe) else None
    else:
        is_file = str(recipe).endswith(".toml")
        plan = read_recipe(Path(recipe)) if is_file else named_recipe(str(recipe))
    train = values.get("data.train") or (plan.data.train if plan else "")
    if not train:
        raise UserError("no images were given: unlabeled pretrain DATA --out RUN")
    source = open_source(train)
    first_readable(source)
    if plan is None:
        plan, reasons = auto.choose(source, parallel, values)
        for reason in reasons:
            console.print(reason, highlight=False)
    plan = override(plan, values, "the command line")
    plan = auto.filled(plan)
    check(plan, "the recipe")
    if parallel.rank == 0:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_recipe(plan, folder / "recipe.toml")
    parallel.barrier()
    return folder, plan, source


def _resolved(value: Any) -> Any:
    """Paths are kept absolute, so that a run resumes from any folder."""
    if isinstance(value, (str, Path)) and not str(value).startswith("hf:"):
        return os.path.abspath(os.path.expanduser(value))  # noqa: PTH100, PTH111  (a glob is no path)
    return value


def _resumed(
    folder: Path, data: str | Path | None, overrides: dict[str, Any] | None
) -> tuple[Path, Recipe, Source]:
    if not (folder / "recipe.toml").exists():
        raise UserError(f"{folder} is no run folder: it has no recipe.toml")
    plan = read_recipe(folder / "recipe.toml")
    if data is not None:
        plan = override(plan, {"data.train": _resolved(data)}, "the command line")
    harmless = {name: value for name, value in (overrides or {}).items() if name.startswith("run.")}
    if overrides and len(harmless) < len(overrides):
        other = next(name for name in overrides if name not in harmless)
        raise UserError(
            f"--{other} cannot change in a resumed run: start a new one, or edit {folder}/recipe.toml"
        )
    return folder, override(plan, harmless, "the command line"), open_source(plan.data.train)


def _train(
    folder: Path,
    recipe: Recipe,
    source: Source,
    parallel: Parallel,
    evaluate: Evaluation | None,
    console: Console,
) -> Run:
    run, saved = recipe.run, checkpoint.all_checkpoints(folder / "checkpoints")
    torch.manual_seed(run.seed)
    method = SelfDistillation(recipe, parallel)
    optimizer = make_optimizer(method)
    start = checkpoint.load(saved[-1], method, optimizer) if saved else 0
    metrics = Metrics(folder, start, writes=parallel.rank == 0)
    report = BadFiles(folder / "bad_files.jsonl")
    watch, skipped, begun = CollapseWatch(recipe.head.num_prototypes), 0, time.perf_counter()
    with _signals() as received, TrainingProgress(console, start, run.steps) as progress, metrics:
        if start:
            progress.say(f"resumed from step {start}")
        if start >= run.steps:  # killed between its last checkpoint and its model
            checkpoint.export(method, folder / "model")
        waited_since = time.perf_counter()
        for step, batch in batches(source, recipe, parallel, start, report):
            waited, begun_step = time.perf_counter() - waited_since, time.perf_counter()
            done = step + 1
            values = values_at(recipe, step)
            apply_schedule(optimizer, values.lr, values.weight_decay, values.last_layer_lr)
            torch.manual_seed(step_seed(run.seed, step, parallel.rank))
            result = method.train_step(batch, optimizer, values)
            finite, targets, cls = (result.pop(name) for name in ("finite", "targets", "teacher_cls"))
            row = {"step": step} | {name: value.item() for name, value in result.items()} | values._asdict()
            spent = time.perf_counter() - begun_step
            row["images_per_second"] = run.batch_size / (spent + waited)
            row["data_wait"] = waited / (spent + waited)
            skipped = 0 if finite else skipped + 1
            if skipped:
                row["skipped"] = 1.0
                progress.say(f"step {step}: the loss or a gradient is not finite; the step is skipped")
            if skipped == MAX_SKIPPED:
                metrics.add(row)
                raise UserError(
                    f"{MAX_SKIPPED} steps in a row had a non-finite loss (last: {step}); the last checkpoint in "
                    f"{folder / 'checkpoints'} is good. Try a lower optimizer.lr, or run.precision float32"
                )
            if step % run.health_every == 0 or done == run.steps:
                row |= figures(targets, cls, parallel)
                if step > run.steps // 10:
                    for warning in watch.check(row):
                        progress.say(f"step {step}: {warning}")
            if evaluate and (done % run.eval_every == 0 or done == run.steps):
                row |= _evaluated(method, evaluate)
                progress.say(
                    f"step {done}: " + ", ".join(f"{k} {v:.4f}" for k, v in row.items() if "knn" in k)
                )
            metrics.add(row)
            progress.update(done, row)
            stopping = parallel.any(bool(received))
            if done % run.checkpoint_every == 0 or done == run.steps or stopping:
                metrics.flush()
                checkpoint.save(folder / "checkpoints", method, optimizer, done, run.keep_checkpoints)
                checkpoint.export(method, folder / "model")
            if stopping and done < run.steps:
                raise StoppedBySignal(received[0] if received else signal.SIGTERM, folder, done)
            waited_since = time.perf_counter()
    if report.count:
        console.print(
            f"{report.count} images could not be read: {folder / 'bad_files.jsonl'}", highlight=False
        )
    console.print(f"{run.steps} steps in {time.perf_counter() - begun:.0f} s: {folder}", highlight=False)
    return Run(folder)


def make_optimizer(method: SelfDistillation) -> torch.optim.AdamW:
    """AdamW over the student, in the groups that the schedules need."""
    recipe = method.recipe.optimizer
    groups = parameter_groups(
        method.parallel.unwrap(method.student),
        method.recipe.vit_config().depth,
        recipe.layer_decay,
        recipe.patch_embed_multiplier,
    )
    return torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, fused=method.parallel.device.type != "mps")


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of drop path in one step on one rank: no random state has to outlive a step."""
    return (seed * 1_000_003 + step) * 65_537 + rank


def _evaluated(method: SelfDistillation, evaluate: Evaluation) -> dict[str, float]:
    """Rank 0 evaluates while the others wait."""
    network = checkpoint.full_teacher(method)
    result = {}
    if method.parallel.rank == 0:
        with torch.no_grad():
            result = evaluate(network)
    method.parallel.barrier()
    return result


def _knn_evaluation(recipe: Recipe, parallel: Parallel) -> Evaluation | None:
    if not recipe.data.evaluation:
        return None
    from unlabeled.evaluate.knn import split_knn

    source = open_source(recipe.data.evaluation)
    if source.labels() is None:
        raise UserError(
            f"--eval {recipe.data.evaluation} has no labels: class folders or a label column are needed"
        )
    side = recipe.data.eval_crop or recipe.crops.global_size
    return lambda model: {"knn": split_knn(model, source, crop=side, device=parallel.device)}


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are noted, and acted on when the step is done; a second one stops at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread (a notebook server, a test): signals stay with their owner
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
