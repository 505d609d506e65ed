"""A small copy detector, trained by self-supervision on the user's own images as SSCD is (2202.10261).

The descriptor is the backbone's CLS token: its last block is linear before the last norm, so that a projection behind
it would add nothing that a MODEL's folder could not hold. A detector is a MODEL, then: DETECTOR/model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader

from unlabeled.curate.contrastive import detector_loss
from unlabeled.curate.views import ViewBatch, ViewDataset, ViewRecipe
from unlabeled.devices import choose_device, tuned_for
from unlabeled.errors import UserError, writing
from unlabeled.features.extract import Pooled, features_of
from unlabeled.features.extractor import Extractor
from unlabeled.images.bad_files import BadFiles, first_readable
from unlabeled.images.order import ShuffledOrder
from unlabeled.images.sources import Source, open_source
from unlabeled.images.transform import normalize
from unlabeled.json_file import read_json
from unlabeled.layer_decay import is_decayed
from unlabeled.metrics import Metrics
from unlabeled.pretrain.data import start_worker
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.positions import sine_positions
from unlabeled.progress import Progress
from unlabeled.schedules import cosine_warmup
from unlabeled.scripts import refuse_imported_script
from unlabeled.signals import StoppedBySignal, noted_signals
from unlabeled.vit import VisionTransformer, vit_config
from unlabeled.weights.files import read_tensors, replacing
from unlabeled.weights.huggingface import save_huggingface
from unlabeled.weights.load import load_model

MAX_SKIPPED = 10  # steps in a row whose loss is not finite before training stops


@dataclass(frozen=True)
class DetectorRecipe:
    """Everything a copy detector is made of; saved as detector.json."""

    model: str = ""  # MODEL to go on from; "": random numbers, and the next three
    size: str = "vit_tiny"  # a name in unlabeled.vit.SIZES
    depth: int = 4  # blocks; 0: the size's own
    patch_size: int = 16  # pixels
    kind: Pooled = "cls"  # of the features that are the descriptor
    views: ViewRecipe = field(default_factory=ViewRecipe)
    temperature: float = 0.05  # of the contrastive loss (SSCD)
    entropy: float = 0.3  # weight of KoLeo; SSCD has 30 for batches of 4096
    lr: float = 1e-3  # after the warm-up, for AdamW
    warmup: float = 0.1  # fraction of the training, linear from 0
    weight_decay: float = 0.05
    clip: float = 1.0  # gradient norm
    steps: int = 2000  # optimizer steps
    batch_size: int = 64  # images a step, of two views each
    seed: int = 0  # of everything random
    checkpoint_every: int = 0  # steps; 0: a tenth of the training
    workers: int = -1  # processes that make views; -1: one on a CPU, else one a core up to 16


def train_copy_detector(
    data: str | Path,
    out: str | Path,
    *,
    recipe: DetectorRecipe | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> Path:
    """Train a copy detector on DATA; a folder that is there already is gone on with, to the same numbers.

    Args:
        data: DATA, without labels.
        out: the DETECTOR's folder: detector.json, metrics.jsonl, checkpoints/, model/, bad_files.jsonl.
        recipe: by default a backbone of 4 blocks for 2000 steps.
        device: auto, cpu, cuda, cuda:1 or mps.
        console: where progress goes; standard error by default.

    Returns:
        The folder, a MODEL; `load_detector` gives what makes descriptors.

    Raises:
        UserError: bad data or fields, a folder of another recipe or of something else, a full disk, a loss that stays
            non-finite.
    """
    refuse_imported_script()
    recipe, folder = recipe or DetectorRecipe(), Path(out).expanduser()
    console = console or Console(stderr=True)
    target = choose_device(device)
    source = open_source(data)
    network = _network(recipe)
    _check(recipe, network, source)
    _join(folder, recipe, str(data))
    network.to(target).train()
    with tuned_for(target):
        _train(network, source, recipe, folder, target, console)
    return folder


def load_detector(folder: str | Path, device: str = "auto") -> Extractor:
    """Return what makes descriptors, as the detector was trained: its kind of features, its size, aspects stretched.

    Raises UserError where there is no detector, or none that has been trained as far as its first checkpoint.
    """
    path = Path(folder).expanduser()
    held = _held(path)
    size, patch = int(held["recipe"]["views"]["size"]), int(held["patch_size"])
    return Extractor(path, held["recipe"]["kind"], size=size // patch * patch, shape="stretch", device=device)


def _network(recipe: DetectorRecipe) -> VisionTransformer:
    torch.manual_seed(recipe.seed)
    if recipe.model:
        return load_model(recipe.model)
    overrides: dict[str, Any] = {"depth": recipe.depth} if recipe.depth else {}
    config = vit_config(
        recipe.size, patch_size=recipe.patch_size, image_size=recipe.views.size, layer_scale=1.0, **overrides
    )
    network = VisionTransformer(config)
    with torch.no_grad():
        network.pos_embed[:, 1:] = sine_positions(config.grid_side, config.width)
    return network


def _check(recipe: DetectorRecipe, network: VisionTransformer, source: Source) -> None:
    """Refuse what would otherwise fail late or silently."""
    patch, size, views = network.config.patch_size, recipe.views.size, recipe.views
    for good, text in (
        (
            size >= patch and size % patch == 0,
            f"views of {size} pixels are no multiple of the patch, {patch}",
        ),
        (
            recipe.batch_size >= 2,
            f"a batch of {recipe.batch_size} has nothing to compare; 2 images at least do",
        ),
        (
            len(source) >= 2,
            f"{source.name} has one image; a detector learns from two at least, and needs many",
        ),
        (recipe.steps >= 1, f"{recipe.steps} steps; at least 1"),
        (recipe.temperature > 0, f"a temperature of {recipe.temperature:g}; above 0"),
        (recipe.entropy >= 0, f"an entropy weight of {recipe.entropy:g}; at least 0"),
        (recipe.lr > 0, f"a learning rate of {recipe.lr:g}; above 0"),
        (0 < views.scale[0] <= views.scale[1] <= 1, f"a scale of {views.scale}; 0 < low <= high <= 1"),
    ):
        if not good:
            raise UserError(f"This is no recipe for a copy detector: {text}.")
    first_readable(source)


def _join(folder: Path, recipe: DetectorRecipe, data: str) -> None:
    """Write detector.json, or see that the one that is there says the same."""
    held = {
        "data": data,
        "patch_size": recipe.patch_size if not recipe.model else load_model(recipe.model).config.patch_size,
        "recipe": asdict(recipe),
    }
    path = folder / "detector.json"
    if path.exists():
        before = read_json(path)
        if before != json.loads(json.dumps(held)):
            raise UserError(
                f"{folder} holds a detector of other data or another recipe; choose another --out."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds something else already; choose another --out.")
    with writing(path), replacing(path) as part:
        part.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")


def _held(folder: Path) -> dict[str, Any]:
    if not (folder / "detector.json").exists():
        raise UserError(f"{folder} holds no copy detector; `unlabeled curate train-copy-detector` makes one.")
    return read_json(folder / "detector.json")


def _train(
    network: VisionTransformer,
    source: Source,
    recipe: DetectorRecipe,
    folder: Path,
    device: torch.device,
    console: Console,
) -> None:
    optimizer = torch.optim.AdamW(_groups(network, recipe.weight_decay), lr=0.0)
    checkpoint = folder / "checkpoints" / "last.pt"
    start = _resumed(checkpoint, network, optimizer) if checkpoint.exists() else 0
    every = recipe.checkpoint_every or max(1, recipe.steps // 10)
    report, parallel = BadFiles(folder / "bad_files.jsonl"), Parallel(device)
    skipped = 0
    with (
        noted_signals() as received,
        Progress(console, "training", "step", start, recipe.steps) as progress,
        Metrics(folder, start, writes=True) as metrics,
    ):
        begun = time.perf_counter()
        for step, batch in _batches(source, recipe, start, device):
            for key, reason in batch.bad:
                report.add(key, reason)
            lr = cosine_warmup(step, recipe.steps, round(recipe.warmup * recipe.steps), 0.0, recipe.lr, 0.0)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with parallel.autocast("auto"):
                tokens = network(normalize(batch.views_VB3HW.to(device)))
            descriptors_ND = features_of(tokens, recipe.kind)
            losses = detector_loss(
                descriptors_ND, batch.shows_VBI.to(device), recipe.temperature, recipe.entropy
            )
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
            finite = bool(torch.isfinite(losses["loss"]) & torch.isfinite(norm))
            skipped = 0 if finite else skipped + 1
            if finite:
                optimizer.step()
            elif skipped == MAX_SKIPPED:
                raise UserError(
                    f"{MAX_SKIPPED} steps in a row had a non-finite loss (last: {step}); lower --lr."
                )
            done, now = step + 1, time.perf_counter()
            row = {"step": step} | {name: float(value.detach()) for name, value in losses.items()}
            row |= {"lr": lr, "images_per_second": recipe.batch_size / (now - begun)}
            begun = now
            metrics.add(row)
            progress.update(done, f"loss {row['loss']:.3f}  {row['images_per_second']:.0f} images/s")
            stopping = bool(received)
            if done % every == 0 or done == recipe.steps or stopping:
                metrics.flush()
                _save(folder, checkpoint, network, optimizer, done)
            if stopping and done < recipe.steps:
                raise StoppedBySignal(received[0], f"stopped after step {done}; the same command goes on")
    if report.count:
        images = "image" if report.count == 1 else "images"
        said = f"{report.count:,} {images} could not be read: {report.path}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)


def _groups(network: VisionTransformer, weight_decay: float) -> list[dict[str, Any]]:
    parameters = [(is_decayed(name, one), one) for name, one in network.named_parameters()]
    return [
        {"params": [one for decays, one in parameters if decays is wanted], "weight_decay": decay}
        for wanted, decay in ((True, weight_decay), (False, 0.0))
    ]


def _batches(
    source: Source, recipe: DetectorRecipe, start: int, device: torch.device
) -> Iterator[tuple[int, ViewBatch]]:
    """(step, batch) from a step on; everything random depends on (seed, position) alone."""
    order = ShuffledOrder(len(source), recipe.seed, block_starts=source.block_starts, window=source.window)
    workers = recipe.workers
    if workers < 0:
        workers = 1 if device.type == "cpu" else min(16, max(1, (os.cpu_count() or 2) - 1))
    size = recipe.batch_size
    loader = DataLoader(
        ViewDataset(source, recipe.views, order, recipe.seed),
        batch_sampler=[list(range(step * size, (step + 1) * size)) for step in range(start, recipe.steps)],
        num_workers=workers,
        collate_fn=_same,
        prefetch_factor=4 if workers else None,
        worker_init_fn=start_worker,
    )
    yield from enumerate(loader, start)


def _same(batch: Any) -> Any:
    """The dataset makes whole batches: there is nothing to collate."""
    return batch


def _save(
    folder: Path, checkpoint: Path, network: VisionTransformer, optimizer: torch.optim.Optimizer, step: int
) -> None:
    held = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    with writing(folder):
        with replacing(checkpoint) as part:
            torch.save(held, part)
        save_huggingface(network, folder / "model")


def _resumed(checkpoint: Path, network: VisionTransformer, optimizer: torch.optim.Optimizer) -> int:
    held = read_tensors(checkpoint)
    network.load_state_dict(held["model"])
    optimizer.load_state_dict(held["optimizer"])
    return int(held["step"])


def with_options(recipe: DetectorRecipe, **options: Any) -> DetectorRecipe:
    """The recipe with the options set that are not None; view_size is that of its views."""
    size = options.pop("view_size", None)
    given = {name: value for name, value in options.items() if value is not None}
    if size is not None:
        given["views"] = dataclasses.replace(recipe.views, size=size)
    return dataclasses.replace(recipe, **given)
