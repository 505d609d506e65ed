"""The pictures of a run: loss curves, nearest neighbours, patch PCA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from unlabeled.features.extract import extract
from unlabeled.features.pca import patch_pca
from unlabeled.images.decode import BadImage, decode
from unlabeled.images.sources import Source, open_source
from unlabeled.pretrain.recipes import read_recipe
from unlabeled.weights.load import load_model

if TYPE_CHECKING:
    from unlabeled.vit import VisionTransformer

MAX_CANDIDATES = 2000  # images searched for neighbours
LONGEST = 4  # times its short side, what is shown of an image: its patches attend to each other


def write_pictures(run: Path, data: str | Path | None = None, side: int | None = None) -> list[Path]:
    """Write RUN/pictures: losses.png, neighbours.png, patch_pca.png.

    Args:
        run: a finished run's folder.
        data: images for the last two; the run's own by default.
        side: pixels that these are seen at, and twice that for the patches; the global crop's by default.

    Returns:
        The files.
    """
    recipe = read_recipe(run / "recipe.toml")
    folder = run / "pictures"
    folder.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    model = load_model(str(run))
    source = open_source(data or recipe.data.train)
    side = side or recipe.crops.global_size
    figures = {
        "losses.png": loss_curves(rows),
        "neighbours.png": neighbours(model, source, side),
        "patch_pca.png": pca(model, source, side),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)
    return [folder / name for name in figures]


def loss_curves(rows: list[dict[str, Any]]) -> Figure:
    """Losses, teacher entropy, effective rank and learning rate over the steps of a run."""
    panels: list[tuple[str, list[str]]] = [
        ("losses", [name for name in ("loss", "dino", "ibot", "koleo") if name in rows[-1]]),
        ("entropy of the targets, nats", ["teacher_entropy", "target_entropy"]),
        ("effective rank (RankMe)", ["rankme"]),
        ("learning rate", ["lr"]),
    ]
    if any("knn" in row for row in rows):
        panels.append(("k-NN accuracy", ["knn"]))
    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if not points:
                continue
            steps, values = np.array(points).T
            smooth = _smoothed(values) if len(values) > 200 else values
            (line,) = axes.plot(steps, smooth, label=name.replace("_", " "), linewidth=1.5)
            if len(values) > 200:
                axes.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.5)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        axes.ticklabel_format(axis="y", useOffset=False)
        if "entropy" in title:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])  # uniform targets are a line at the top, not noise
        if len(names) > 1:  # below, where no curve can be
            axes.legend(
                frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(names)
            )
    return figure


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over a fiftieth of the run, narrower at the ends."""
    half = max(1, len(values) // 100)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    low, high = np.maximum(0, index - half), np.minimum(len(values), index + half + 1)
    smooth: NDArray[np.float64] = (sums[high] - sums[low]) / (high - low)
    return smooth


def neighbours(
    model: VisionTransformer, source: Source, side: int, num_queries: int = 8, k: int = 6
) -> Figure:
    """Some images, and the most similar others by the cosine of their CLS tokens.

    Frames tell same label (green) from another (red), where there are labels.
    """
    rng = np.random.default_rng(0)
    indices = np.sort(rng.permutation(len(source))[:MAX_CANDIDATES])
    found = extract(model, source, indices=indices, resize=side, crop=side)
    by_key = {key: row for row, key in enumerate(found.keys)}
    readable = [index for index in indices if _key(source, int(index)) in by_key]
    rows = found.features / np.linalg.norm(found.features, axis=1, keepdims=True)
    k = min(k, len(rows) - 1)
    queries = np.linspace(0, len(rows) - 1, min(num_queries, len(rows))).astype(int)
    figure = Figure(figsize=(1.25 * (k + 1) + 0.3, 1.35 * len(queries) + 0.3), layout="constrained")
    grid = figure.subplots(len(queries), k + 1, squeeze=False)
    for line, query in zip(grid, queries, strict=True):
        similarity = rows @ rows[query]
        similarity[query] = -2
        order = [query, *np.argsort(-similarity)[:k]]
        for place, (axes, row) in enumerate(zip(line, order, strict=True)):
            axes.imshow(decode(source.read(int(readable[row])).data))
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title("query" if place == 0 else f"{similarity[row]:.2f}", fontsize=8, pad=2)
            if place and found.labels is not None:
                same = found.labels[row] == found.labels[query]
                for spine in axes.spines.values():
                    spine.set(color="tab:green" if same else "tab:red", linewidth=2)
    return figure


def _key(source: Source, index: int) -> str | None:
    try:
        return source.read(index).key
    except OSError:
        return None


def pca(model: VisionTransformer, source: Source, side: int, num_images: int = 8) -> Figure:
    """Images above the first three principal components of their patch tokens, as red, green and blue."""
    images: list[NDArray[np.uint8]] = []
    for index in np.unique(np.linspace(0, len(source) - 1, 4 * num_images).astype(int)):
        try:
            images.append(_enlarged(decode(source.read(int(index)).data), 2 * side))
        except (BadImage, OSError):
            continue
    images = images[:: max(1, len(images) // num_images)][:num_images]
    figure = Figure(figsize=(1.5 * len(images), 3.2), layout="constrained")
    grid = figure.subplots(2, len(images), squeeze=False)
    colours = patch_pca(model, images, foreground=False, size=2 * side).colours
    for column, (image, components) in enumerate(zip(images, colours, strict=True)):
        height, width = image.shape[:2]
        grid[0, column].imshow(image)
        grid[1, column].imshow(components, extent=(0, width, height, 0), interpolation="nearest")
        for axes in grid[:, column]:
            axes.set_axis_off()
    return figure


def _enlarged(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """An image, of a very long one the middle, with a short side of `side` pixels."""
    from PIL import Image

    most = LONGEST * min(image.shape[:2])
    top, left = (max(0, length - most) // 2 for length in image.shape[:2])
    image = image[top : top + most, left : left + most]
    height, width = image.shape[:2]
    scale = side / min(height, width)
    size = (round(width * scale), round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
