"""Segmentation and depth by heads on frozen features, beside the same heads on an untrained backbone and on pixels.

    python benchmarks/dense.py segmentation CAMVID --model RUN [--out TABLE.md] [--picture PNG]
    python benchmarks/dense.py depth SCENES --model RUN [--out TABLE.md] [--picture PNG]

CAMVID holds train/ and val/, each of images/ and labels/ (11 is void); SCENES is what `unlabeled scenes` wrote. All
heads have the same images, steps and learning rates to choose from.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from rich.console import Console
from torch import nn

from machine import device_name
from unlabeled.dense.inference import predict
from unlabeled.dense.labelled import DenseData, depth_images, labelled_images
from unlabeled.dense.losses import resized
from unlabeled.dense.metrics import DEPTH_METRICS, depth_scores
from unlabeled.evaluate.bootstrap import interval
from unlabeled.evaluate.dense_heads import ChosenHead, chosen_head, maps_of
from unlabeled.evaluate.depth import measured as depth_of
from unlabeled.evaluate.result import Result
from unlabeled.evaluate.segmentation import measured as segmentation_of
from unlabeled.finetune.saved import palette
from unlabeled.finetune.tasks import DataOptions
from unlabeled.images.transform import normalize
from unlabeled.vit import VisionTransformer
from unlabeled.weights.load import load_model

CAMVID_CLASSES = [
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "cyclist",
]
VOID = 11
FOCAL_LENGTH, BASELINE, OFFSET = 994.978, 0.193001, 31.086  # pixels, metres, pixels; of the motorcycle
SCENES_VIEW = 60.0  # degrees, horizontal, of SCENES
ROWS = 3  # of a picture
SEGMENTATION_HEADS = {"trained": ("linear", "linear4"), "untrained": ("linear4",), "pixels": ("linear",)}
DEPTH_HEADS = {
    "trained": ("linear", "regression", "linear4", "dpt"),
    "untrained": ("linear4",),
    "pixels": ("linear", "regression", "dpt"),
}
CHANNELS = 32  # of DPT's maps; the papers' 256 take 60 times as long


def untrained(like: VisionTransformer) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(like.config).eval()


def pixels(like: VisionTransformer) -> VisionTransformer:
    """A backbone whose patch tokens are the patches' normalised pixels, after every block, and whose CLS is zero."""
    config = like.config
    width = 3 * config.patch_size**2
    model = VisionTransformer(dataclasses.replace(config, width=width, num_heads=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.patch_embed.proj.weight.copy_(
            torch.eye(width).view(width, 3, config.patch_size, config.patch_size)
        )
    model.norm = nn.Identity()  # a layer norm would take brightness and contrast out of each patch
    return model.eval()


def training(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    return {
        "size": args.size, "learning_rates": args.learning_rates, "epochs": args.epochs, "console": console,
    }  # fmt: skip


def segmentation(args: argparse.Namespace, console: Console) -> list[str]:
    trained = load_model(args.model)
    rows = ["| features | head | mIoU | 95% | pixel accuracy | " + " | ".join(CAMVID_CLASSES) + " |"]
    rows.append("|" + "---|" * (5 + len(CAMVID_CLASSES)))
    pictures: list[list[list[np.ndarray]]] = []
    for name, model in (("trained", trained), ("untrained", untrained(trained)), ("pixels", pixels(trained))):
        for head in ("linear", "linear4"):
            if head not in SEGMENTATION_HEADS[name] or args.only not in ("", f"{name}/{head}"):
                continue
            options = DataOptions(str(args.data / "train"), ignore=VOID)
            chosen = chosen_head("segment", head, model, options, **training(args, console))
            result = segmentation_of(chosen, name, args.data / "val")
            ious = [
                result.metrics.get(f"iou_{number}", float("nan")) for number in range(len(CAMVID_CLASSES))
            ]
            rows.append(
                f"| {name} | {head}, lr {chosen.settings['learning_rate']:g} | {result.score:.3f} "
                f"| {said(result, 'miou')} | {result.accuracy:.3f} | "
                + " | ".join(f"{iou:.2f}" for iou in ious)
                + " |"
            )
            console.print(rows[-1], highlight=False)
            if args.picture and head == "linear4":
                data = labelled_images(args.data / "val", ignore=VOID, class_names=chosen.classes)
                pictures.append(segmentation_pictures(chosen, data.subset(shown(len(data))), bool(pictures)))
    if args.picture:
        save_grid(args.picture, pictures)
    return rows


def segmentation_pictures(
    chosen: ChosenHead, data: DenseData, only_prediction: bool
) -> list[list[np.ndarray]]:
    colours = np.array([*palette(len(chosen.classes)), (0, 0, 0)], np.uint8)
    columns = []
    for index, (_, logits, labels) in enumerate(maps_of(chosen, data, 0, print, None)):
        said = colours[logits.argmax(0).numpy()]
        truth = colours[np.minimum(labels, len(chosen.classes))]
        columns.append([said] if only_prediction else [data.read(index).pixels, truth, said])
    return columns


def depth(args: argparse.Namespace, console: Console) -> list[str]:
    trained = load_model(args.model)
    rows = [
        "| features | head | RMSE, m | 95% | AbsRel | log10 | delta1 | delta2 | delta3 |",
        "|" + "---|" * 9,
    ]
    train, test = depth_images(args.data / "train"), depth_images(args.data / "test")
    rows += constants(train, test) if args.only in ("", "none") else []
    pictures: list[list[list[np.ndarray]]] = []
    stereo: list[str] = []
    kinds = ("linear", "regression", "linear4", "dpt")
    for name, model in (("trained", trained), ("untrained", untrained(trained)), ("pixels", pixels(trained))):
        with tempfile.TemporaryDirectory() as cache:
            for head in kinds:
                if head not in DEPTH_HEADS[name] or args.only not in ("", f"{name}/{head}"):
                    continue
                begun = time.perf_counter()
                options = DataOptions(str(args.data / "train"))
                arguments = {"channels": CHANNELS} if head == "dpt" else None
                chosen = chosen_head(
                    "depth", head, model, options, arguments, cache=cache, **training(args, console)
                )
                result = depth_of(chosen, name, args.data / "test")
                figures = " | ".join(f"{result.metrics[metric]:.3f}" for metric in DEPTH_METRICS[1:])
                rows.append(
                    f"| {name} | {head}, lr {chosen.settings['learning_rate']:g} | {result.score:.3f} "
                    f"| {said(result, 'rmse')} | {figures} |"
                )
                console.print(rows[-1], f"{time.perf_counter() - begun:.0f} s", highlight=False)
                if name != "untrained":
                    stereo.append(motorcycle(chosen, f"{name}, {head}"))
                if args.picture and name == "trained" and head in ("regression", "dpt"):
                    chosen_few = test.subset(shown(len(test)))
                    pictures.append(depth_pictures(chosen, chosen_few, bool(pictures)))
    if args.picture:
        save_grid(args.picture, pictures)
    return [*rows, "", *STEREO, constant_motorcycle(), *stereo]


def constants(train: DenseData, test: DenseData) -> list[str]:
    """Predicting the mean depth of the training images, one for all pixels or one for each pixel."""
    total, count = 0.0, 0.0
    for index in range(len(train)):
        target = train.read(index).target
        total, count = total + target, count + (target > 0)
    each = total / np.maximum(count, 1)
    one = np.full_like(each, total.sum() / count.sum())
    rows = []
    for name, predicted in (("mean of all pixels", one), ("mean of each pixel", each)):
        limit = 1.001 * train.depth_range[1]
        scores = np.stack(
            [depth_scores(predicted, test.read(index).target, 0.001, limit) for index in range(len(test))]
        )
        low, high = interval(scores[:, 0])
        means = scores.mean(0)
        figures = " | ".join(f"{value:.3f}" for value in means[1:])
        rows.append(f"| none | {name} | {means[0]:.3f} | {low:.3f} to {high:.3f} | {figures} |")
    return rows


STEREO = [
    "The motorcycle, 741 x 500 pixels, true depth 2.0 to 5.0 m, by heads that saw rendered rooms only; `focal`:",
    "times the focal length in image widths over that of the rooms; `median`: scaled to the true median.",
    "",
    "| features, head | RMSE, m | focal | median | AbsRel, median | delta1, median |",
    "|" + "---|" * 6,
]


def motorcycle_pair() -> tuple[np.ndarray, np.ndarray]:
    """Return the left image (H, W, 3) and its true depth in metres (H, W), 0 where it is not known."""
    from skimage import data as skimage_data

    left, _, disparity = skimage_data.stereo_motorcycle()
    known = np.isfinite(disparity)
    metres = np.where(known, FOCAL_LENGTH * BASELINE / (np.where(known, disparity, 0) + OFFSET), 0)
    return left, metres.astype(np.float32)


def constant_motorcycle() -> str:
    """Return the row of predicting the true median everywhere."""
    _, truth = motorcycle_pair()
    found = depth_scores(np.full_like(truth, np.median(truth[truth > 0])), truth)
    return f"| none, true median | | | {found[0]:.2f} | {found[1]:.3f} | {found[3]:.3f} |"


def motorcycle(chosen: ChosenHead, name: str) -> str:
    left, truth = motorcycle_pair()
    with torch.no_grad():
        images = normalize(torch.from_numpy(chosen.preprocessing(left))[None]).to(chosen.device)
        maps = predict(chosen.model, chosen.head, images)
    metres = resized(maps, truth.shape)[0, 0].cpu().numpy()
    rooms = 0.5 / np.tan(np.radians(SCENES_VIEW) / 2)
    factor = FOCAL_LENGTH / left.shape[1] / rooms
    plain, focal, median = (
        depth_scores(values, truth, align=align)
        for values, align in ((metres, ""), (metres * factor, ""), (metres, "median"))
    )
    return (
        f"| {name} | {plain[0]:.2f} | {focal[0]:.2f} | {median[0]:.2f} | {median[1]:.3f} | {median[3]:.3f} |"
    )


def depth_pictures(chosen: ChosenHead, data: DenseData, only_prediction: bool) -> list[list[np.ndarray]]:
    columns = []
    for index, (_, metres, truth) in enumerate(maps_of(chosen, data, 0, print, None)):
        limit = truth.max()
        coloured = [
            (colormaps["viridis"](values / limit)[..., :3] * 255).astype(np.uint8)
            for values in (truth, metres[0].numpy())
        ]
        columns.append(coloured[1:] if only_prediction else [data.read(index).pixels, *coloured])
    return columns


def shown(count: int) -> list[int]:
    return np.linspace(0, count - 1, ROWS).astype(int).tolist()


def save_grid(path: Path, parts: list[list[list[np.ndarray]]]) -> None:
    """One row an image: itself, the truth, and what each head said."""
    rows = [np.concatenate([tile for part in parts for tile in part[row]], 1) for row in range(len(parts[0]))]
    image = Image.fromarray(np.concatenate(rows))
    image.thumbnail((1000, 1000))
    image.save(path, optimize=True)


def said(result: Result, metric: str) -> str:
    low, high = result.intervals[metric]
    return f"{low:.3f} to {high:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("segmentation", "depth"))
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--size", type=int, default=0, help="short side in pixels")
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 1e-2])
    parser.add_argument("--only", default="", help="one row, such as trained/linear")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    console = Console(stderr=True)
    begun = time.perf_counter()
    rows = {"segmentation": segmentation, "depth": depth}[args.task](args, console)
    rows += ["", f"{time.perf_counter() - begun:.0f} s on {device_name(torch.device('cpu'))}."]
    print("\n".join(rows))
    if args.out:
        args.out.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
