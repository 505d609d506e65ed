"""The one training loop with labels: classes, segmentation and depth; frozen, by adapters, or whole.

Shape suffixes: B images, H W pixels.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from unlabeled.devices import choose_device, tuned_for
from unlabeled.errors import UserError
from unlabeled.finetune.backbone import learning, parameter_groups, prepare
from unlabeled.finetune.batches import Group, Report, mixed_up
from unlabeled.finetune.checkpoint import read_checkpoint, write_checkpoint
from unlabeled.finetune.examples import Examples
from unlabeled.finetune.feed import Feed, Frozen, open_feed
from unlabeled.finetune.heads import LinearHead
from unlabeled.finetune.recipe import TrainRecipe
from unlabeled.images.transform import normalize
from unlabeled.metrics import Metrics
from unlabeled.progress import Progress
from unlabeled.schedules import cosine_warmup
from unlabeled.signals import StoppedBySignal, noted_signals
from unlabeled.vit import Tokens, VisionTransformer

MAX_SKIPPED = 10  # steps in a row whose loss is not finite before a training stops

Loss = Callable[[Tensor, Tensor], Tensor]  # what a head returns, the targets -> a scalar
Score = Callable[[Iterable[tuple[Tensor, Tensor]]], dict[str, float]]


class TrainableHead(Protocol):
    """An nn.Module with what `dense.inference.Head` asks for."""

    norm: bool

    def layers(self, depth: int) -> list[int]:
        """Return the blocks whose tokens it reads."""

    def __call__(self, layers: list[Tokens]) -> Tensor:
        """Return logits or a map."""


class Validation(NamedTuple):
    """What the weights that are kept are chosen on.

    score: (what the head returns, targets) of all batches, on the device, to figures. by: the one that decides.
    larger: whether more of it is better.
    """

    examples: Examples
    score: Score
    by: str
    larger: bool = True


@dataclass
class Trained:
    """What a training made; model and head are those that were given, in evaluation mode, with the weights chosen.

    Attributes:
        history: one row a step: loss, learning rates, and the figures of validation where there was one.
        figures: of validation, of the weights that were kept; empty without.
        step: steps after which these were.
        seconds: of this call, features included.
        saved: a sentence on what cached tokens saved; "" without.
    """

    history: list[dict[str, Any]]
    figures: dict[str, float] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    saved: str = ""


def train_head(
    model: VisionTransformer,
    head: TrainableHead,
    examples: Examples,
    loss: Loss,
    recipe: TrainRecipe,
    *,
    validation: Validation | None = None,
    folder: Path | None = None,
    cache: Path | None = None,
    device: str = "auto",
    report: Report | None = None,
    console: Console | None = None,
    again: str = "",
    num_classes: int = 0,
) -> Trained:
    """Train a head, and as much of the backbone as the recipe says.

    Args:
        model: a backbone; adapters, where the recipe has them, are still in it afterwards (`lora.merge_adapters`).
        head: an nn.Module as `dense.heads` and `finetune.heads` have them.
        examples: to learn from; validation: to choose the weights by, the last ones without it.
        loss: of what the head returns and the targets.
        folder: where metrics.jsonl, checkpoints/ and cache/ go; a training that was stopped there goes on. None: the
            cache lies in a temporary folder, and nothing else is written.
        cache: where tokens are kept for the next training on the same examples, which finds them there.
        report: is told the key of each image that cannot be used, and the reason.
        console: where progress is shown; nowhere by default.
        again: the command that goes on with a training that a signal stops.
        num_classes: of targets that are mixed up.

    Raises:
        UserError: a loss that stays non-finite, a checkpoint that does not fit, a full disk, no usable image.
        StoppedBySignal: SIGTERM or SIGINT came, where there is a folder; a checkpoint is written.
    """
    where = choose_device(device)
    with ExitStack() as stack:
        stack.enter_context(tuned_for(where))
        kept = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unlabeled-")))
        torch.manual_seed(recipe.seed)
        training = _Training(model, head, loss, recipe, where, num_classes)
        state = read_checkpoint(folder, training.modules()) if folder else None
        trained = training.run(
            examples, validation, state, kept, cache or kept / "cache", report or (lambda key, reason: None), console,
            writes=folder is not None, again=again,
        )  # fmt: skip
        if folder:
            shutil.rmtree(folder / "cache", ignore_errors=True)
    return trained


class _Training:
    """A model, a head and their optimizer."""

    def __init__(
        self,
        model: VisionTransformer,
        head: TrainableHead,
        loss: Loss,
        recipe: TrainRecipe,
        device: torch.device,
        num_classes: int,
    ) -> None:
        self.model, self.loss, self.recipe, self.device = model, loss, recipe, device
        self.head = cast("nn.Module", head).to(device)
        self.layers, self.norm = head.layers(len(model.blocks)), head.norm
        self.num_classes = num_classes
        prepare(model.to(device), recipe)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, self.head, recipe), fused=device.type != "mps"
        )
        self.learned: list[Tensor] = [*learning(self.head).values(), *learning(model).values()]
        self.average = [one.detach().clone() for one in self.learned] if recipe.ema else []
        self.frozen = Frozen(model, head, device)

    def modules(self) -> dict[str, Any]:
        """Return what a checkpoint is read into."""
        return {
            "head": self.head, "backbone": self.model, "optimizer": self.optimizer, "average": self.average,
        }  # fmt: skip

    def run(
        self,
        examples: Examples,
        validation: Validation | None,
        state: dict[str, Any] | None,
        folder: Path,
        cache: Path,
        report: Report,
        console: Console | None,
        *,
        writes: bool,
        again: str,
    ) -> Trained:
        """Train from a checkpoint's state, or from the beginning."""
        recipe, begun = self.recipe, time.perf_counter()
        start = state["step"] if state else 0
        best: dict[str, Any] = state["best"] if state else {}
        quiet = console or Console(quiet=True)
        judged_on = validation.examples if validation else None
        feed = open_feed(
            self.model, cast(TrainableHead, self.head), recipe, self.frozen, examples, judged_on, cache, report, console
        )  # fmt: skip
        if state is None and isinstance(self.head, LinearHead):
            self.model.eval()
            self.head.standardise(torch.cat([*map(self.head.features, feed.sample())]))
            self.model.train(recipe.backbone != "freeze")
        history: list[dict[str, Any]] = []
        skipped, waited = 0, 0.0
        with ExitStack() as stack:
            received = stack.enter_context(noted_signals()) if writes else []
            metrics = stack.enter_context(Metrics(folder, start, writes=writes))
            progress = stack.enter_context(Progress(quiet, "training", "step", start, recipe.steps))
            if start:
                progress.say(f"resumed from step {start}")
            loop_begun = time.perf_counter()
            for step, batch in enumerate(feed.batches(start), start):
                done = step + 1
                lr = self._set_rates(step)
                torch.manual_seed((recipe.seed * 1_000_003 + step) * 65_537)
                value = self._step(batch)
                row: dict[str, Any] = {"step": step, "loss": value, "lr": lr}
                skipped = 0 if math.isfinite(value) else skipped + 1
                if skipped:
                    progress.say(f"step {step}: the loss or a gradient is not finite; the step is skipped")
                if skipped == MAX_SKIPPED:
                    metrics.add(row)
                    raise UserError(
                        f"{MAX_SKIPPED} steps in a row had a non-finite loss (last: {step}); "
                        f"try a lower train.lr than {recipe.lr:g}"
                    )
                evaluates = done == recipe.steps or self._is_evaluation(done)
                if evaluates and validation:
                    with self._averaged():
                        found = self._validate(validation, feed)
                        row |= found
                        progress.say(f"step {done}: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
                        if not best or _better(found, best["figures"], validation):
                            best = self._best(done, found)
                history.append(row)
                metrics.add(row)
                progress.update(done, f"loss {value:.4f}")
                stopping = bool(received) and done < recipe.steps
                if writes and (evaluates or stopping):
                    metrics.flush()
                    write_checkpoint(folder, self.modules(), done, best)
                if stopping:
                    raise StoppedBySignal(received[0], f"stopped after step {done}; go on with: {again}")
            waited = time.perf_counter() - loop_begun
        if best:
            self.head.load_state_dict(best["head"])
            self.model.load_state_dict(best["backbone"], strict=False)
        elif self.average:
            _copy(self.learned, self.average)
        self.head.eval()
        self.model.eval()
        return Trained(
            history, best.get("figures", {}), best.get("step", recipe.steps),
            time.perf_counter() - begun, feed.saved(recipe.steps - start, waited),
        )  # fmt: skip

    def _set_rates(self, step: int) -> float:
        """Set the learning rates of a step; returns the head's."""
        recipe = self.recipe
        warmup = round(recipe.warmup * recipe.steps)
        share = cosine_warmup(step + 1, recipe.steps + 2, warmup, 0.0, 1.0, 0.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        return recipe.lr * share

    def _step(self, batch: list[Group]) -> float:
        """Learn from one batch; returns its loss. A step that is not finite changes nothing."""
        self.head.train()
        total = sum(len(group.targets) for group in batch)
        value = torch.zeros((), device=self.device)
        for group in batch:  # in one batch but for images of several shapes
            targets = group.targets.to(self.device)
            inputs = self._inputs(group.inputs)
            if self.recipe.mixup and isinstance(inputs, Tensor):
                inputs, targets = mixed_up(inputs, targets, self.num_classes, self.recipe.mixup)
            part = self.loss(self._outputs(inputs), targets) * (len(targets) / total)
            part.backward()
            value += part.detach()
        gradients = [one.grad for one in self.learned if one.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        finite = bool(torch.isfinite(value) & torch.isfinite(norm))
        if finite:
            if self.recipe.clip:
                nn.utils.clip_grads_with_norm_(self.learned, self.recipe.clip, norm)
            self.optimizer.step()
            if self.average:
                with torch.no_grad():
                    torch._foreach_lerp_(self.average, self.learned, 1 - self.recipe.ema)
        self.optimizer.zero_grad(set_to_none=True)
        return float(value) if finite else math.nan

    def _inputs(self, inputs: Tensor | list[Tokens]) -> Tensor | list[Tokens]:
        """Return normalised images, or tokens, on the device."""
        if isinstance(inputs, Tensor):
            return normalize(inputs.to(self.device)) if self.recipe.backbone != "freeze" else inputs
        to = self.device
        return [Tokens(one.cls.to(to), one.registers.to(to), one.patches.to(to), one.grid) for one in inputs]

    def _outputs(self, inputs: Tensor | list[Tokens]) -> Tensor:
        """Return what the head says of normalised images, of uint8 ones where the backbone is frozen, or of tokens."""
        if isinstance(inputs, Tensor):
            if self.recipe.backbone == "freeze":
                inputs = self.frozen(inputs)
            else:
                with self.frozen.autocast():
                    inputs = self.model.intermediate_layers(inputs, self.layers, norm=self.norm)
        with self.frozen.autocast():
            return cast(Tensor, self.head(inputs))

    @torch.no_grad()
    def _validate(self, validation: Validation, feed: Feed) -> dict[str, float]:
        self.head.eval()
        self.model.eval()
        outputs = (
            (self._outputs(self._inputs(group.inputs)).float(), group.targets.to(self.device))
            for group in feed.judged()
        )
        found = validation.score(outputs)
        self.model.train(self.recipe.backbone != "freeze")
        return found

    def _is_evaluation(self, done: int) -> bool:
        """Whether validation comes after so many steps: `evaluations` times, evenly."""
        total, times = self.recipe.steps, self.recipe.evaluations
        return done * times // total > (done - 1) * times // total

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the average in the weights' place meanwhile, where there is one."""
        if not self.average:
            yield
            return
        kept = [one.detach().clone() for one in self.learned]
        _copy(self.learned, self.average)
        try:
            yield
        finally:
            _copy(self.learned, kept)

    def _best(self, step: int, figures: dict[str, float]) -> dict[str, Any]:
        return {
            "step": step,
            "figures": figures,
            "head": {name: value.detach().cpu().clone() for name, value in self.head.state_dict().items()},
            "backbone": {name: one.detach().cpu().clone() for name, one in learning(self.model).items()},
        }


def _better(found: Mapping[str, float], best: Mapping[str, float], validation: Validation) -> bool:
    new, old = found[validation.by], best[validation.by]
    if not math.isfinite(old):
        return True
    return new > old if validation.larger else new < old


@torch.no_grad()
def _copy(to: list[Tensor], values: list[Tensor]) -> None:
    for one, value in zip(to, values, strict=True):
        one.copy_(value)
