"""Segmentation and depth by heads on frozen features, beside the same heads on an untrained backbone and on pixels.

    python benchmarks/dense.py segmentation CAMVID --model RUN [--out TABLE.md] [--picture PNG]
    python benchmarks/dense.py depth SCENES --model RUN [--rows FOLDER] [--out TABLE.md] [--picture PNG]

CAMVID holds train/ and val/, each of images/ and labels/ (11 is void); SCENES is what `unlabeled scenes` wrote. All
heads have the same images, steps and learning rates to choose from. --rows keeps each row of depth in a folder: rows
can then be runs of their own (--only trained/linear), and a run of --only none gives the table of all that are
there, with their differences image by image (paired bootstrap) from each pixel's mean and from the same head on raw
pixels.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from matplotlib import colormaps
from PIL import Image
from rich.console import Console
from scipy.stats import spearmanr
from torch import nn

from machine import device_name
from unlabeled.dense.inference import predict
from unlabeled.dense.labelled import DenseData, depth_images, labelled_images
from unlabeled.dense.losses import resized
from unlabeled.dense.metrics import DEPTH_METRICS, depth_scores
from unlabeled.evaluate.bootstrap import compare, interval
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
    train, test = depth_images(args.data / "train"), depth_images(args.data / "test")
    each = pixel_means(train)
    with tempfile.TemporaryDirectory() as other:
        folder = args.rows or Path(other)
        folder.mkdir(parents=True, exist_ok=True)
        if args.only in ("", "none"):
            constants(each, train, test, folder)
        pictures: list[list[list[np.ndarray]]] = []
        kinds = ("linear", "regression", "linear4", "dpt")
        models = (("trained", trained), ("untrained", untrained(trained)), ("pixels", pixels(trained)))
        for name, model in models:
            cache = Path(other) / name
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
                scores = np.stack([result.figures[metric].values_M for metric in DEPTH_METRICS], 1)
                save_row(
                    folder,
                    f"{name}, {head}, lr {chosen.settings['learning_rate']:g}",
                    scores,
                    motorcycle(chosen),
                )
                console.print(f"{name}, {head}: {time.perf_counter() - begun:.0f} s", highlight=False)
                if args.picture and name == "trained":
                    chosen_few = test.subset(shown(len(test)))
                    pictures.append(depth_pictures(chosen, chosen_few, bool(pictures)))
                    save_grid(
                        args.picture.with_stem(f"{args.picture.stem}_motorcycle"),
                        [motorcycle_picture(chosen)],
                    )
        if args.picture:
            save_grid(args.picture, pictures)
        return table(folder)


def save_row(folder: Path, name: str, scores_IM: np.ndarray, stereo: np.ndarray) -> None:
    """Keep what the tables are made of, in a file named after features and head."""
    kind = "_".join(name.split(", ")[:2]).replace(" ", "-")
    np.savez(folder / f"{kind}.npz", name=name, scores=scores_IM, stereo=stereo)


def table(folder: Path) -> list[str]:
    """Return the tables of the rooms and of the motorcycle, from the rows that a folder holds."""
    held = {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}
    order = ("none", "pixels", "untrained", "trained")
    stems = sorted(held, key=lambda stem: (order.index(stem.split("_")[0]), stem))
    rows = [
        "| features, head | RMSE, m | 95% | less each pixel's mean, 95% | less the same head on pixels, 95% | AbsRel "
        "| log10 | delta1 | delta2 | delta3 |",
        "|" + "---|" * 10,
    ]
    stereo = [*STEREO]
    for stem in stems:
        scores = held[stem]["scores"]
        low, high = interval(scores[:, 0])
        features, head = stem.split("_")
        same = "linear" if head == "linear4" else head  # pixels say the same after every block
        rivals = ("none_mean-of-each-pixel", f"pixels_{same}" if features not in ("none", "pixels") else "")
        less = [
            differences(held[rival]["scores"], scores) if rival in held and rival != stem else ""
            for rival in rivals
        ]
        means = scores.mean(0)
        rows.append(
            f"| {held[stem]['name']} | {means[0]:.3f} | {low:.3f} to {high:.3f} | {less[0]} | {less[1]} | "
            + " | ".join(f"{value:.3f}" for value in means[1:])
            + " |"
        )
        cells = (f"{value:.3f}" if np.isfinite(value) else "" for value in held[stem]["stereo"])
        stereo.append(f"| {held[stem]['name']} | " + " | ".join(cells) + " |")
    return [*rows, "", *stereo]


def differences(rival_IM: np.ndarray, scores_IM: np.ndarray) -> str:
    """Return by how much RMSE differs from a rival's, with the interval of the paired bootstrap."""
    found = compare(rival_IM[:, 0], scores_IM[:, 0])
    return f"{found.difference:+.3f}, {found.low:+.3f} to {found.high:+.3f}"


def pixel_means(train: DenseData) -> np.ndarray:
    """Return the mean depth of the training images at each pixel (H, W)."""
    total, count = 0.0, 0.0
    for index in range(len(train)):
        target = train.read(index).target
        total, count = total + target, count + (target > 0)
    return total / np.maximum(count, 1)


def constants(each: np.ndarray, train: DenseData, test: DenseData, folder: Path) -> None:
    """Keep the rows of predicting the mean depth of the training images, one for all pixels or one for each pixel."""
    _, truth = motorcycle_pair()
    for name, predicted in (
        ("mean of all pixels", np.full_like(each, each.mean())),
        ("mean of each pixel", each),
    ):
        limit = 1.001 * train.depth_range[1]
        scores = [
            depth_scores(predicted, test.read(index).target, 0.001, limit) for index in range(len(test))
        ]
        enlarged = resized(torch.from_numpy(predicted)[None, None], truth.shape)[0, 0].numpy()
        save_row(folder, f"none, {name}", np.stack(scores), motorcycle_scores(enlarged, truth))


STEREO = [
    "The motorcycle, 741 x 500 pixels, true depth 2.0 to 5.0 m, by what saw rooms only. `median`: scaled to the true",
    "median; `scale and shift`: by least squares; `order`: Spearman's rank correlation with the true depth.",
    "",
    "| features, head | RMSE, m | median | AbsRel, median | delta1, median | scale and shift | order |",
    "|" + "---|" * 7,
]


def motorcycle_pair() -> tuple[np.ndarray, np.ndarray]:
    """Return the left image (H, W, 3) and its true depth in metres (H, W), 0 where it is not known."""
    left, _, disparity = skimage.data.stereo_motorcycle()
    known = np.isfinite(disparity)
    metres = np.where(known, FOCAL_LENGTH * BASELINE / (np.where(known, disparity, 0) + OFFSET), 0)
    return left, metres.astype(np.float32)


def motorcycle_map(chosen: ChosenHead, left: np.ndarray) -> np.ndarray:
    """Return metres (H, W), times the focal length in image widths over that of the rooms."""
    with torch.no_grad():
        images = normalize(torch.from_numpy(chosen.preprocessing(left))[None]).to(chosen.device)
        maps = predict(chosen.model, chosen.head, images)
    rooms = 0.5 / np.tan(np.radians(SCENES_VIEW) / 2)
    factor = FOCAL_LENGTH / left.shape[1] / rooms
    return resized(maps, left.shape[:2])[0, 0].cpu().numpy() * factor


def motorcycle_scores(metres: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the figures of a row of the motorcycle's table."""
    plain, median, fitted = (
        depth_scores(metres, truth, align=align) for align in ("", "median", "least squares")
    )
    known = truth > 0
    order = spearmanr(metres[known], truth[known]).statistic if np.ptp(metres) else np.nan
    return np.array([plain[0], median[0], median[1], median[3], fitted[0], order])


def motorcycle(chosen: ChosenHead) -> np.ndarray:
    left, truth = motorcycle_pair()
    return motorcycle_scores(motorcycle_map(chosen, left), truth)


def motorcycle_picture(chosen: ChosenHead) -> list[list[np.ndarray]]:
    """Return the image, its true depth, and what was said of it, scaled to the true median."""
    left, truth = motorcycle_pair()
    metres = motorcycle_map(chosen, left)
    metres *= np.median(truth[truth > 0]) / np.median(metres[truth > 0])
    return [[left, *(coloured(values, truth.max()) for values in (truth, metres))]]


def depth_pictures(chosen: ChosenHead, data: DenseData, only_prediction: bool) -> list[list[np.ndarray]]:
    columns = []
    for index, (_, metres, truth) in enumerate(maps_of(chosen, data, 0, print, None)):
        limit = truth.max()
        maps = [coloured(values, limit) for values in (truth, metres[0].numpy())]
        columns.append(maps[1:] if only_prediction else [data.read(index).pixels, *maps])
    return columns


def coloured(metres: np.ndarray, limit: float) -> np.ndarray:
    return (colormaps["viridis"](metres / limit)[..., :3] * 255).astype(np.uint8)


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
    parser.add_argument("--rows", type=Path, help="of depth: a folder where each row is kept")
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
