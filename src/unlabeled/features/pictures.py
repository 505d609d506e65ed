"""What a model sees, as pictures to publish: each image beside what is computed from it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from numpy.typing import NDArray

from unlabeled.features.attention import AttentionMaps
from unlabeled.features.match import Matches
from unlabeled.features.page import (
    WIDTH,
    Page,
    Scale,
    blocks,
    grey,
    heat,
    lay_out,
    photograph,
    shortened,
    to_bytes,
)
from unlabeled.features.pca import PatchPca


class Picture(NamedTuple):
    """An image to show."""

    name: str
    pixels: NDArray[np.uint8]  # (H, W, 3)


def draw_attention(
    pictures: list[Picture], maps: list[AttentionMaps], mass: float, caption: str = "", width: int = WIDTH
) -> Page:
    """Each image, the mean attention over it, what holds the mass, and every head.

    Each map has its own scale, from 0 to its maximum: heads differ by orders of magnitude.
    """
    titles = [
        [shortened(name), "mean", f"mask, {mass:.0%}"] + [f"head {head}" for head in range(len(heads))]
        for (name, _), (heads, *_) in zip(pictures, maps, strict=True)
    ]
    scale = Scale("attention of CLS, as a share of each map's maximum", 0, 1, "inferno")
    page = lay_out(_shapes(pictures), titles, scale=scale, caption=caption, width=width)
    for index, (picture, (heads, mean, mask, _)) in enumerate(zip(pictures, maps, strict=True)):
        image = photograph(picture.pixels, page.boxes[index][0])
        page.put(index, 0, image)
        for panel, values in ((1, mean), *enumerate(heads, 3)):
            box = page.boxes[index][panel]
            page.put(index, panel, heat(image, blocks(values / max(values.max(), 1e-12), box), scale))
        page.put(index, 2, _kept(image, blocks(mask, page.boxes[index][2])))
    return page


def draw_pca(pictures: list[Picture], pca: PatchPca, caption: str = "", width: int = WIDTH) -> Page:
    """Each image and the first three components of its patches as red, green and blue."""
    titles = [[shortened(name), "PCA"] for name, _ in pictures]
    page = lay_out(_shapes(pictures), titles, caption=caption, width=width)
    for index, (picture, colours, mask) in enumerate(zip(pictures, pca.colours, pca.foreground, strict=True)):
        image = photograph(picture.pixels, page.boxes[index][0])
        page.put(index, 0, image)
        box = page.boxes[index][1]
        page.put(index, 1, to_bytes(np.where(blocks(mask, box)[..., None], blocks(colours, box), 0)))
    return page


def draw_similar(
    pictures: list[Picture],
    maps: list[NDArray[np.float32]],
    at: tuple[float, float],
    caption: str = "",
    width: int = WIDTH,
) -> Page:
    """Each image and the cosine of its patches with the one at a point of the first image; one scale for all."""
    titles = [[shortened(name), "cosine"] for name, _ in pictures]
    low = min(float(values.min()) for values in maps)
    scale = Scale("cosine with the marked patch", min(low, 1 - 1e-3), 1, "viridis")
    page = lay_out(_shapes(pictures), titles, scale=scale, caption=caption, width=width)
    for index, (picture, values) in enumerate(zip(pictures, maps, strict=True)):
        image = photograph(picture.pixels, page.boxes[index][0])
        page.put(index, 0, image)
        page.put(index, 1, heat(image, blocks(values, page.boxes[index][1]), scale))
    height, width_of_image = pictures[0].pixels.shape[:2]
    for box in page.boxes[0]:
        x = box.left + (int(at[0]) + 0.5) * box.width / width_of_image
        y = box.top + (int(at[1]) + 0.5) * box.height / height
        for colour, thickness in (("black", 5), ("white", 2.5)):
            page.axes.plot(
                [x], [y], "o", markersize=17 * page.unit, markerfacecolor="none", markeredgecolor=colour,
                markeredgewidth=thickness * page.unit,
            )  # fmt: skip
    return page


def draw_match(a: Picture, b: Picture, matches: Matches, caption: str = "", width: int = WIDTH) -> Page:
    """Two images, and lines between the points that match."""
    found = matches.similarities
    low = float(found.min()) if len(found) else 0.0
    high = float(found.max()) if len(found) else 1.0
    scale = Scale("cosine similarity", min(low, high - 1e-3), high, "plasma")
    page = lay_out(
        _shapes([a, b]), [[shortened(a.name)], [shortened(b.name)]], scale=scale, caption=caption, width=width
    )
    ends = []
    for index, (picture, points) in enumerate(((a, matches.points_a), (b, matches.points_b))):
        box = page.put(index, 0, photograph(picture.pixels, page.boxes[index][0]))
        height, width_of_image = picture.pixels.shape[:2]
        ends.append(points * (box.width / width_of_image, box.height / height) + (box.left, box.top))
    shares = (found - scale.low) / (scale.high - scale.low)
    u = page.unit
    # Curves that bend towards the middle of the images, each by its own amount, can be told apart where lines cannot.
    height = min(box.height for (box,) in page.boxes)
    middle = sum(box.top + box.height / 2 for (box,) in page.boxes) / 2
    places = np.argsort(np.argsort(ends[0][:, 0])) / max(len(found) - 1, 1)
    for start, end, share, place in reversed([*zip(*ends, shares, places, strict=True)]):
        colour = colormaps[scale.cmap](float(share))
        towards = 1 if start[1] + end[1] < 2 * middle else -1
        path = _arc(start, end, towards * (0.02 + 0.14 * place) * height)
        for tint, thickness, alpha in (("white", 3.4, 0.5), (colour, 1.7, 1.0)):
            line = PathPatch(
                path, fill=False, edgecolor=tint, linewidth=thickness * u, alpha=alpha, capstyle="round"
            )
            page.axes.add_patch(line)
        page.axes.plot(*np.stack((start, end)).T, "o", color=colour, markersize=7 * u,
                       markeredgecolor="white", markeredgewidth=1.2 * u)  # fmt: skip
    return page


def _shapes(pictures: list[Picture]) -> list[tuple[int, int]]:
    return [(picture.pixels.shape[0], picture.pixels.shape[1]) for picture in pictures]


def _arc(start: NDArray[np.float64], end: NDArray[np.float64], bulge: float) -> Path:
    """A curve that is `bulge` pixels to the right of the straight line, seen along it, at its middle."""
    along = end - start
    across = np.array([-along[1], along[0]]) / max(float(np.hypot(*along)), 1e-9)
    control = (start + end) / 2 + 2 * bulge * across
    return Path([start, control, end], [Path.MOVETO, Path.CURVE3, Path.CURVE3])


def _kept(pixels_HW3: NDArray[np.uint8], mask_HW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The image where the mask is, its pale grey shade elsewhere."""
    pale = to_bytes(np.broadcast_to(0.78 + 0.2 * grey(pixels_HW3), pixels_HW3.shape))
    return np.where(mask_HW[..., None], pixels_HW3, pale)
