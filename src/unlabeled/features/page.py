"""A page of panels: sized in whole pixels, so that what is laid over an image lies exactly on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text
from matplotlib.textpath import TextPath
from numpy.typing import NDArray
from PIL import Image

from unlabeled.errors import UserError, writing

WIDTH = 1600  # pixels of a page
WIDTHS = (400, 2000)
# In pixels on a page of WIDTH, and in proportion on others, of LEAST or more, that text can still be read.
MARGIN, GAP, TITLE, SMALL = 28, 20, 28, 24
LEAST = 0.4
BAR = (560, 22)  # of a colour scale
TALLEST = (0.78, 1.25)  # page height over its width, with up to 8 panels and with more
SQUEEZED = 0.72  # of its size a title may lose the rest, to fit its panel
RIBBON = 2.6  # from this ratio of the sides on, panels have equal areas, not equal heights
LONGEST = 2.0  # times the side of a square panel that a ribbon's long side has: equal areas would leave the page to it
NAMES = (26, 14, 9)  # letters of a title; fewer, where a page would otherwise have no room
LARGEST = 0.62  # side of a panel over the page's width
INK, GREY = "#1a1a1a", "#6b6b6b"
DPI = 100  # a font's point is DPI / 72 pixels


class Box(NamedTuple):
    """A rectangle on a page, in whole pixels from the top left."""

    left: int
    top: int
    width: int
    height: int


class Scale(NamedTuple):
    """A colour bar."""

    label: str
    low: float
    high: float
    cmap: str


def check_place(path: Path, images: Sequence[str]) -> None:
    """Raise UserError, before the work, where a picture of some images could not be written after it."""
    if path.suffix.lower() != ".png":
        raise UserError(f"The picture is a PNG: {path} should end in .png.")
    if path.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder.")
    if any(path.exists() and Path(image).exists() and path.samefile(image) for image in images):
        raise UserError(f"{path} is one of the images; choose another place for the picture.")
    probe = path.with_name(f".{path.name}.partial")
    with writing(path):
        probe.touch()
        probe.unlink()


@dataclass
class Page:
    """Where everything is: panels of image i at boxes[i][j], under their titles.

    pixels: what is drawn where; marks: Matplotlib artists are added to `axes`, whose units are the page's pixels.
    """

    width: int
    height: int
    unit: float
    boxes: list[list[Box]]
    titles: list[list[str]]
    scale: Scale | None
    caption: str
    panels: list[tuple[Box, NDArray[np.uint8]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.figure = Figure(figsize=(self.width / DPI, self.height / DPI), dpi=DPI, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1), frameon=False, zorder=1)
        self.axes.set(xlim=(0, self.width), ylim=(self.height, 0), xticks=[], yticks=[])
        self.axes.patch.set_visible(False)

    def put(self, image: int, panel: int, pixels_HW3: NDArray[np.uint8]) -> Box:
        """Draw pixels of a panel's very size."""
        box = self.boxes[image][panel]
        self.panels.append((box, pixels_HW3))
        return box

    def save(self, path: Path) -> None:
        """Write a PNG; a file that is there is replaced when the new one is whole. Raises UserError."""
        for box, pixels in self.panels:
            self.figure.figimage(
                pixels, box.left, self.height - box.top - box.height, origin="upper", zorder=-1
            )
        pairs = [pair for row in zip(self.boxes, self.titles, strict=True) for pair in zip(*row, strict=True)]
        fits = [box.width / max(text_width(title, TITLE * self.unit), 1) for box, title in pairs]
        size = TITLE * min(1, max(SQUEEZED, min(fits)))
        for box, title in pairs:
            self.text(box.left + box.width / 2, box.top - 0.45 * TITLE * self.unit, title, size, INK)
        below: float = max(box.top + box.height for boxes in self.boxes for box in boxes)
        if self.scale:
            below = self._bar(self.scale, below)
        if self.caption:
            y = below + (GAP + SMALL) * self.unit
            self.text(self.width / 2, y, self.caption, SMALL, GREY, self.width - 2 * MARGIN * self.unit)
        partial = path.with_name(f".{path.name}.partial")
        with writing(path):
            try:
                with rc_context({"text.hinting": "no_hinting"}):  # as `text_width` measures it
                    self.figure.savefig(partial, format="png", dpi=DPI)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def text(self, x: float, y: float, words: str, size: float, colour: str, most: float = math.inf) -> None:
        """Write centred at a baseline; smaller, where the words would be wider than `most` pixels."""
        pixels = size * self.unit
        pixels *= min(1, most / max(text_width(words, pixels), 1))
        artist = Text(x, y, words, color=colour, fontsize=pixels * 72 / DPI, ha="center", va="baseline",
                      parse_math=False)  # fmt: skip
        self.axes.add_artist(artist)

    def _bar(self, scale: Scale, top: float) -> float:
        """Draw the colour bar below `top`, and return where it ends."""
        u = self.unit
        width, height = min(BAR[0] * u, self.width - 4 * MARGIN * u), BAR[1] * u
        left, label_y = (self.width - width) / 2, top + (GAP + SMALL) * u
        self.text(self.width / 2, label_y, scale.label, SMALL, INK, self.width - 2 * MARGIN * u)
        y = label_y + 0.5 * SMALL * u
        bar = self.figure.add_axes(
            (left / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        )
        bar.imshow(
            np.linspace(0, 1, 512)[None], aspect="auto", cmap=scale.cmap, extent=(scale.low, scale.high, 0, 1)
        )
        bar.set_yticks([])
        bar.locator_params(axis="x", nbins=6, steps=[1, 2, 2.5, 5, 10])
        bar.tick_params(axis="x", labelsize=SMALL * u * 72 / DPI, length=6 * u, width=u, colors=INK)
        bar.spines[:].set_visible(False)
        return y + height + 1.6 * SMALL * u


def lay_out(
    shapes: list[tuple[int, int]],
    titles: list[list[str]],
    *,
    scale: Scale | None = None,
    caption: str = "",
    width: int = WIDTH,
) -> Page:
    """Arrange the panels of some images on a page, as large as they get there.

    shapes: (height, width) of each image; its panels have its aspect. All panels of a page are equally high, or
        equally large where there are ribbons, which are smaller if they would be longer than LONGEST. titles: one a
        panel, as many for every image; shortened where there is no room. width: of the page at most, in pixels.
    Raises UserError for a width that no page has, or that has no room.
    """
    if not WIDTHS[0] <= width <= WIDTHS[1]:
        raise UserError(f"A page is {WIDTHS[0]} to {WIDTHS[1]} pixels wide, not {width}.")
    u = max(width / WIDTH, LEAST)
    foot = MARGIN * u + (4.0 * SMALL * u + BAR[1] * u if scale else 0) + ((GAP + SMALL) * u if caption else 0)
    for most in NAMES:
        shorter = [[shortened(title, most) for title in row] for row in titles]
        best = _arranged(shapes, shorter, width, foot, u)
        if best.boxes:
            break
    else:
        raise UserError(
            f"A page of {width} pixels has no room for so many panels; choose fewer images, or a wider page "
            f"({WIDTHS[1]} at most)."
        )
    needed = [text_width(caption, 0.8 * SMALL * u), text_width(scale.label, SMALL * u) if scale else 0]
    wanted = min(width, math.ceil(max(best.right, *(text + 2 * MARGIN * u for text in needed))))
    shift = int(wanted - best.right) // 2
    boxes = [[box._replace(left=box.left + shift) for box in row] for row in best.boxes]
    return Page(wanted, math.ceil(best.bottom + foot), u, boxes, shorter, scale, caption)


def _arranged(
    shapes: list[tuple[int, int]], titles: list[list[str]], width: float, foot: float, u: float
) -> _Table:
    """Return the best arrangement; arguments as `lay_out`'s. Without a box, where there is no room for any."""
    num_panels = max(len(row) for row in titles)
    words = [max(SQUEEZED * text_width(title, TITLE * u) for title in row) for row in titles]
    tallest = TALLEST[num_panels * len(shapes) > 8] * width - foot
    best, best_score = _Table([], 0, 0), 0.0
    for across in range(1, num_panels + 1):
        for beside in range(1, len(shapes) + 1):
            table = _largest(shapes, words, num_panels, across, beside, width, tallest, u)
            if table is None:
                continue
            cells = -(-num_panels // across) * across * -(-len(shapes) // beside) * beside
            filled = num_panels * len(shapes) / cells
            area = float(np.mean([math.sqrt(row[0].width * row[0].height) for row in table.boxes]))
            # Holes in an arrangement cost it a little, and so do panels that are no line of their own an image.
            score = area * filled**0.3 * (1 if len(shapes) == 1 or across in (1, num_panels) else 0.8)
            if score > best_score * 1.001:
                best, best_score = table, score
    return best


class _Table(NamedTuple):
    boxes: list[list[Box]]
    right: float  # pixels that the table takes of the page, the margin included
    bottom: float  # without the margin


def _largest(
    shapes: list[tuple[int, int]],
    words: list[float],
    num_panels: int,
    across: int,
    beside: int,
    width: float,
    height: float,
    u: float,
) -> _Table | None:
    """Return an arrangement with panels as large as the page allows; None where it has no room.

    words: width of the widest title of each image. across: panels of an image side by side. beside: images side by
        side.
    """
    power = 0.5 if max(max(shape) / min(shape) for shape in shapes) > RIBBON else 0.0
    longest = LONGEST if power else math.inf
    found, low, high = None, 24 * u, LARGEST * width
    for _ in range(24):
        middle = (low + high) / 2
        heights = [middle * min((h / w) ** power, longest, longest * h / w) for h, w in shapes]
        sizes = [
            (max(1, round(k * w / h)), max(1, round(k))) for k, (h, w) in zip(heights, shapes, strict=True)
        ]
        table = _table(sizes, words, num_panels, across, beside, u)
        biggest = max(max(size) for size in sizes)
        if table.right <= width and table.bottom <= height and biggest <= LARGEST * width * (1 + power):
            found, low = table, middle
        else:
            high = middle
    return found


def _table(
    sizes: list[tuple[int, int]], words: list[float], num_panels: int, across: int, beside: int, u: float
) -> _Table:
    """Arrange panels of these sizes (width, height); other arguments as `_largest`'s."""
    # A cell is as wide as its panel or its title; an image's cells make a block, blocks side by side make a row.
    cells = [
        (max(size[0], title) + GAP * u, size[1] + (1.35 * TITLE + GAP) * u)
        for size, title in zip(sizes, words, strict=True)
    ]
    lines = -(-num_panels // across)
    columns = [max(cell[0] for cell in cells[place::beside]) * across for place in range(beside)]
    boxes: list[list[Box]] = []
    top = MARGIN * u
    for start in range(0, len(sizes), beside):
        for index in range(start, min(start + beside, len(sizes))):
            place, (cell_width, cell_height), (w, h) = index - start, cells[index], sizes[index]
            left = MARGIN * u + sum(columns[:place]) + (columns[place] - cell_width * across) / 2
            boxes.append([])
            for line, column in (divmod(number, across) for number in range(num_panels)):
                x = left + column * cell_width + (cell_width - GAP * u - w) / 2
                boxes[-1].append(Box(round(x), round(top + line * cell_height + 1.35 * TITLE * u), w, h))
        top += lines * max(cells[index][1] for index in range(start, min(start + beside, len(sizes))))
    return _Table(boxes, 2 * MARGIN * u + sum(columns) - GAP * u, top - GAP * u)


@lru_cache(maxsize=1024)
def text_width(words: str, pixels: float) -> float:
    """Return how wide a line of text is, in pixels, at a font size in pixels."""
    if not words.strip():
        return 0.0
    return float(
        TextPath((0, 0), words, size=pixels, prop=FontProperties(), usetex=False).get_extents().width
    )


def shortened(name: str, most: int = NAMES[0]) -> str:
    """Return a name without its middle, where it has more than `most` characters; "?" for what has no glyph."""
    glyphs = get_font(findfont(FontProperties()))
    name = "".join(letter if glyphs.get_char_index(ord(letter)) else "?" for letter in name)
    if len(name) <= most:
        return name
    end = min(8, most // 3)
    return f"{name[: most - end - 3]}...{name[-end:]}"


def photograph(pixels_HW3: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    """Return an image at a panel's size."""
    resized = Image.fromarray(pixels_HW3).resize((box.width, box.height), Image.Resampling.LANCZOS)
    return np.asarray(resized)


def blocks(grid_hw: NDArray[Any], box: Box) -> NDArray[Any]:
    """Return the values of a patch grid at each pixel of a panel: every pixel has its own patch's."""
    h, w = grid_hw.shape[:2]
    rows = ((np.arange(box.height) + 0.5) * h / box.height).astype(int)
    columns = ((np.arange(box.width) + 0.5) * w / box.width).astype(int)
    values: NDArray[Any] = grid_hw[rows[:, None], columns]
    return values


def grey(pixels_HW3: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the luminance in [0, 1], (H, W, 1)."""
    luminance: NDArray[np.float64] = pixels_HW3 @ np.array([0.299, 0.587, 0.114]) / 255
    return luminance[:, :, None]


def heat(
    pixels_HW3: NDArray[np.uint8], values_HW: NDArray[np.floating], scale: Scale, relief: float = 0.36
) -> NDArray[np.uint8]:
    """Return values as colours of a scale, made lighter and darker by the image, so that on average they stay true."""
    shares = ((values_HW - scale.low) / max(scale.high - scale.low, 1e-12)).clip(0, 1)
    luminance = grey(pixels_HW3)
    return to_bytes(colormaps[scale.cmap](shares)[..., :3] + relief * (luminance - luminance.mean()))


def to_bytes(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return [0, 1] as 0 to 255."""
    return (values.clip(0, 1) * 255 + 0.5).astype(np.uint8)
