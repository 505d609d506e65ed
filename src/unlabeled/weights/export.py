"""One model to another format, checked against the model itself before it takes its place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unlabeled.errors import UserError, writing
from unlabeled.vit import Interpolation, VisionTransformer, VitConfig
from unlabeled.weights import graph
from unlabeled.weights.card import push_folder, write_card
from unlabeled.weights.huggingface import save_huggingface
from unlabeled.weights.load import load_model
from unlabeled.weights.meta import save_meta
from unlabeled.weights.quantize import Int8Accuracy, quantize, read_images
from unlabeled.weights.timm import save_timm

# format: the suffix of its file; "" is a folder
SUFFIXES = {
    "hf": "",
    "meta": ".pth",
    "timm": ".safetensors",
    "onnx": ".onnx",
    "openvino": ".xml",
    "pt2": ".pt2",
}
INT8_FORMATS = ("onnx", "openvino")
RUNNERS = {"onnx": graph.onnx_runner, "openvino": graph.openvino_runner, "pt2": graph.pt2_runner}
MAX_DIFFERENCE = 1e-3  # relative to the largest feature; float32 on another runtime stays far below


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        path: the file, or folder.
        files: names of what was written, beside or inside path.
        notes: one line for each thing that the format cannot carry.
        difference: largest absolute difference of a feature to torch's, where the format is a graph in float32.
        int8: the features of the int8 graph beside those in float32, where one was made.
        url: where it was pushed to.
    """

    path: Path
    files: list[str]
    notes: list[str]
    difference: float | None = None
    int8: Int8Accuracy | None = None
    url: str | None = None


def export(
    model: str | Path,
    to: str,
    out: str | Path,
    *,
    int8: bool = False,
    calibrate: str | None = None,
    push: str | None = None,
    interpolation: Interpolation = "",
) -> Exported:
    """Write a model in another format.

    model: what load_model takes. to: hf (a folder with a model card), meta (.pth), timm (.safetensors), onnx,
    openvino (.xml, and .bin beside it) or pt2 (a torch.export archive). out: the file or folder to write.
    int8: onnx and openvino only: weights and activations of 8 bits, calibrated on the images of `calibrate`
    (DATA). push: hf only: the hub's repository to put the folder in. interpolation: as load_model takes it.
    Raises UserError for a combination that does not exist, an `out` that does not fit the format, a package
    that is not installed, or a hub that does not take it.
    """
    path = Path(out).expanduser()
    check(to, path, int8, calibrate, push)
    vit = load_model(model, interpolation=interpolation)
    # First, since it can fail, and a graph takes a while.
    images = list(read_images(calibrate, vit.config)) if calibrate else []
    with writing(path):
        if to == "hf":
            notes = _save_hf(vit, path, model, push or path.resolve().name)
            files = sorted(file.name for file in path.iterdir())
            url = push_folder(path, push) if push else None
            return Exported(path, files, notes, url=url)
        with beside(path) as temporary:
            difference, accuracy = None, None
            if to == "meta":
                notes = save_meta(vit, temporary) + lost_heads(vit.config)
            elif to == "timm":
                notes = save_timm(vit, temporary) + lost_heads(vit.config)
            else:
                notes = [f"The graph takes sides that are multiples of {vit.config.patch_size} pixels only."]
                if to == "pt2":
                    graph.save_pt2(graph.trace(vit), vit.config, temporary)
                    notes.append("The archive takes sides of at least two patches.")
                else:
                    _save_runtime(vit, to, temporary)
                difference = checked(vit, to, temporary)
                if int8:
                    accuracy = quantize(to, temporary, images, RUNNERS[to])
                    difference = None
            files = sorted(file.name for file in temporary.parent.iterdir())
    return Exported(path, files, notes, difference, accuracy)


def describe(result: Exported) -> list[str]:
    """Return the lines that say what an export made and what it costs."""
    lines = [f"note: {note}" for note in result.notes]
    if result.difference is not None:
        lines.append(f"largest difference of a feature to torch's: {result.difference:.1e}")
    if found := result.int8:
        lines += [
            f"int8: {found.megabytes:.1f} MB of {found.float_megabytes:.1f}; calibrated on "
            f"{found.calibration_images} images, measured on {found.held_out_images} others:",
            f"  cosine to float32, CLS: mean {found.cls_mean:.4f}, worst {found.cls_worst:.4f}",
            f"  cosine to float32, mean patch: mean {found.patches_mean:.4f}, worst {found.patches_worst:.4f}",
        ]
    lines.append(f"written: {result.path} ({', '.join(result.files)})")
    if result.url:
        lines.append(f"pushed: {result.url}")
    return lines


def as_dict(result: Exported) -> dict[str, Any]:
    """Return the result for --json."""
    return asdict(result) | {"path": str(result.path)}


def check(to: str, path: Path, int8: bool, calibrate: str | None, push: str | None) -> None:
    """Raise UserError for what cannot be, before a model is loaded."""
    if to not in SUFFIXES:
        raise UserError(f"There is no format {to!r}; choose one of {', '.join(SUFFIXES)}.")
    if int8 and to not in INT8_FORMATS:
        raise UserError(f"--int8 is for {' and '.join(INT8_FORMATS)}; {to} is written in float32.")
    if int8 and not calibrate:
        raise UserError(
            "--int8 needs images to calibrate on: --calibrate DATA, some hundreds like those of its use."
        )
    if calibrate and not int8:
        raise UserError("--calibrate is for --int8, which was not given.")
    if push and to != "hf":
        raise UserError(f"--push puts a Hugging Face folder on the hub: use it with --to hf, not {to}.")
    if not SUFFIXES[to]:
        if path.is_file():
            raise UserError(f"{path} is a file; --to {to} writes a folder.")
        if path.is_dir() and any(path.iterdir()) and not (path / "config.json").exists():
            raise UserError(f"{path} holds other things than a model; --out should be a new folder.")
    elif path.suffix != SUFFIXES[to] or path.is_dir():
        raise UserError(f"--to {to} writes a file: --out should end in {SUFFIXES[to]}, and is {path}.")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Give the same name in a temporary folder; all that lies there takes its place if the block succeeds.

    Formats of two files name the second in the first, so that the names have to be the last ones from the start.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder) / path.name
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.parent / file.name)  # noqa: PTH105


def _save_hf(vit: VisionTransformer, folder: Path, source: str | Path, name: str) -> list[str]:
    """Write weights, configuration, preprocessing and model card; return what cannot be carried."""
    notes = save_huggingface(vit, folder)
    if vit.config.fit == "pad":
        notes.append("transformers cuts off sides that are no multiple of the patch; here they are padded.")
    if not write_card(vit.config, folder, source, name):
        notes.append(f"{folder / 'README.md'} was there and was left as it is.")
    return notes


def _save_runtime(vit: VisionTransformer, to: str, path: Path) -> None:
    if to == "onnx":
        graph.save_onnx(graph.trace(vit), vit.config, path)
        return
    with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=".onnx.") as folder:
        onnx_path = Path(folder) / "model.onnx"
        graph.save_onnx(graph.trace(vit), vit.config, onnx_path)
        graph.save_openvino(onnx_path, path, vit.config)


@torch.no_grad()
def checked(vit: VisionTransformer, to: str, path: Path) -> float:
    """Return the largest absolute difference of an exported graph's features to the model's, on noise of two sizes.

    Raises RuntimeError if it is no mere rounding.
    """
    run, p = RUNNERS[to](path), vit.config.patch_size
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for B, h, w in ((2, 4, 3), (1, 3, 8)):
        images = torch.randn(B, vit.config.in_channels, h * p, w * p, generator=generator)
        tokens, found = vit(images), run(images.numpy())
        for name in graph.output_names(vit.config):
            expected = getattr(tokens, name).numpy()
            difference = float(np.abs(found[name] - expected).max())
            if not difference <= MAX_DIFFERENCE * max(1.0, float(np.abs(expected).max())):
                raise RuntimeError(
                    f"{name} of the exported {to} graph differs from the model's by {difference}"
                )
            worst = max(worst, difference)
    return worst


def lost_heads(config: VitConfig) -> list[str]:
    """Return a line if a bare state dict will be read with another number of heads."""
    if config.width == 64 * config.num_heads:
        return []
    return [
        f"the file does not hold the number of attention heads ({config.num_heads}), which readers take to be "
        "width / 64: give it when loading."
    ]
