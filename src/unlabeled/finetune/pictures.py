"""Predictions as pictures.

Shape suffixes: H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from unlabeled.features.page import Page, Scale, grey, heat, lay_out, photograph, shortened, to_bytes

DEPTH_COLOURS = "viridis_r"  # near is bright
STRENGTH = 0.6  # of the classes' colours over an image
NARROW = 240  # pixels that a depth picture is wide at least
BAR_SHARE = 0.16  # of the height, at the foot of a depth picture


class Shown(NamedTuple):
    """One image of a page."""

    pixels: NDArray[np.uint8]  # (H, W, 3)
    title: str
    label: str | None = None  # the true class, where it is known
    classes: NDArray[np.integer] | None = None  # (H, W)
    depth: NDArray[np.float32] | None = None  # (H, W) metres


def overlay(
    pixels_HW3: NDArray[np.uint8], classes_HW: NDArray[np.integer], palette: list[tuple[int, int, int]]
) -> NDArray[np.uint8]:
    """Return the image in grey under the colours of its classes."""
    colours = np.asarray(palette, np.float64)[classes_HW] / 255
    return to_bytes(STRENGTH * colours + (1 - STRENGTH) * grey(pixels_HW3))


def coloured_depth(metres_HW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return depth as colours, the nearest bright, above a bar that says what they are in metres.

    Small maps are shown larger, so that the numbers have room.
    """
    times = -(-NARROW // metres_HW.shape[1])
    metres_HW = metres_HW.repeat(times, axis=0).repeat(times, axis=1)
    low, high = float(metres_HW.min()), float(metres_HW.max())
    shares = (metres_HW - low) / max(high - low, 1e-9)
    height, width = metres_HW.shape
    foot = max(28, round(BAR_SHARE * height))
    picture = Image.new("RGB", (width, height + foot), "white")
    picture.paste(Image.fromarray(to_bytes(colormaps[DEPTH_COLOURS](shares)[..., :3])), (0, 0))
    ramp = colormaps[DEPTH_COLOURS](np.linspace(0, 1, max(width - 16, 2)))[None, :, :3]
    bar = Image.fromarray(to_bytes(ramp)).resize((max(width - 16, 2), foot // 3))
    picture.paste(bar, (8, height + foot // 8))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(9, foot // 3))
    numbers = [(low, 8, "ls"), ((low + high) / 2, width / 2, "ms"), (high, width - 8, "rs")]
    for metres, place, anchor in numbers:
        draw.text((place, height + foot - 4), f"{metres:.2f} m", "black", font, anchor)
    return np.asarray(picture)


def write_page(
    shown: list[Shown], classes: list[str], palette: list[tuple[int, int, int]], path: Path
) -> None:
    """Write a PNG of some images: with their class, beside their masks, or beside their depth."""
    shapes = [(one.pixels.shape[0], one.pixels.shape[1]) for one in shown]
    if shown[0].classes is not None:
        occurring = np.unique(
            np.concatenate([np.unique(one.classes) for one in shown if one.classes is not None])
        )
        page = lay_out(shapes, [[shortened(one.title), "classes"] for one in shown], caption=" ")
        for index, one in enumerate(shown):
            box = page.put(index, 0, photograph(one.pixels, page.boxes[index][0]))
            assert one.classes is not None
            nearest = Image.fromarray(one.classes.astype(np.uint16)).resize(
                (box.width, box.height), Image.Resampling.NEAREST
            )
            page.put(index, 1, overlay(photograph(one.pixels, box), np.asarray(nearest), palette))
        _legend(page, [(classes[number], palette[number]) for number in occurring])
    elif shown[0].depth is not None:
        maps = [one.depth for one in shown if one.depth is not None]
        scale = Scale(
            "metres",
            min(float(one.min()) for one in maps),
            max(float(one.max()) for one in maps),
            DEPTH_COLOURS,
        )
        page = lay_out(shapes, [[shortened(one.title), "depth"] for one in shown], scale=scale)
        for index, (one, metres) in enumerate(zip(shown, maps, strict=True)):
            box = page.put(index, 0, photograph(one.pixels, page.boxes[index][0]))
            resized = Image.fromarray(metres).resize((box.width, box.height), Image.Resampling.BILINEAR)
            image = photograph(one.pixels, box)
            page.put(index, 1, heat(image, np.asarray(resized), scale, relief=0.0))
    else:
        wrong = any(one.label is not None and not one.title.startswith(f"{one.label} ") for one in shown)
        titles = [
            one.title if one.label is None or not wrong or one.title.startswith(f"{one.label} ")
            else f"{one.title} (is {one.label})"
            for one in shown
        ]  # fmt: skip
        page = lay_out(shapes, [[shortened(title)] for title in titles])
        for index, one in enumerate(shown):
            page.put(index, 0, photograph(one.pixels, page.boxes[index][0]))
    page.save(path)


def _legend(page: Page, entries: list[tuple[str, tuple[int, int, int]]]) -> None:
    """Write the classes' names in their colours below the panels, where the caption would be."""
    from matplotlib.patches import Rectangle

    from unlabeled.features.page import GAP, MARGIN, SMALL, text_width

    u = page.unit
    size = SMALL * u
    swatch, space = size, 0.6 * size
    widths = [swatch + 0.4 * size + text_width(name, size) + space for name, _ in entries]
    room = page.width - 2 * MARGIN * u
    shrink = min(1.0, room / sum(widths))
    below = max(box.top + box.height for boxes in page.boxes for box in boxes)
    y = below + (GAP + SMALL) * u
    x = (page.width - shrink * sum(widths)) / 2
    for (name, colour), width in zip(entries, widths, strict=True):
        tint = tuple(value / 255 for value in colour)
        side = shrink * swatch
        page.axes.add_patch(Rectangle((x, y - side), side, side, facecolor=tint, edgecolor="none"))
        centre = x + side + shrink * (0.4 * size + text_width(name, size) / 2)
        page.text(centre, y - 0.12 * side, name, SMALL * shrink, "#1a1a1a")
        x += shrink * width
