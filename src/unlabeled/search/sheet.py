"""Contact sheets: queries and what was found, or groups of duplicates, as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.font_manager import findfont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from unlabeled.atomic import replacing
from unlabeled.errors import UserError, writing
from unlabeled.features.inputs import ImageLike, as_pixels
from unlabeled.features.page import (
    GREY,
    INK,
    MARGIN,
    SMALL,
    SQUEEZED,
    TITLE,
    WIDTH,
    Box,
    photograph,
    shortened,
)

if TYPE_CHECKING:
    from unlabeled.search.duplicates import Group
    from unlabeled.search.index import Hit, Index

ACROSS = 6  # images beside each other
MOST = 96  # images of a sheet
SPACE = 24  # pixels between images; all such are for a page of WIDTH
EMPTY = 235  # grey where an image cannot be read
NAME = 0.72 * SMALL
FONT = "DejaVu Sans"  # comes with Matplotlib, which is not used for more: it takes ten times as long to draw


class Tile(NamedTuple):
    """One image of a sheet, with what stands above and below it; None where it cannot be read."""

    title: str
    name: str
    pixels_HW3: NDArray[np.uint8] | None


def write_hits(
    path: Path,
    index: Index,
    queries: Sequence[ImageLike],
    names: Sequence[str],
    hits: Sequence[Sequence[Hit]],
) -> int:
    """Write a sheet with a line for each query: it and its hits; return how many hits' images could not be read.

    What is beyond 96 images is left out. Raises UserError where the sheet cannot be written.
    """
    lines: list[list[Tile]] = []
    for query, name, found in zip(queries, names, hits, strict=True):
        if lines and sum(map(len, lines)) + len(found) + 1 > MOST:
            break
        tiles = [
            _tile(index, hit.row, hit.key, f"{hit.rank}: {hit.similarity:.3f}") for hit in found[: MOST - 1]
        ]
        lines.append([Tile("query", name, as_pixels(query)), *tiles])
    return write_sheet(path, lines)


def write_groups(path: Path, index: Index, groups: Sequence[Group]) -> int:
    """Write a sheet with a line for each group, its first twelve images; return how many could not be read.

    What is beyond 96 images is left out. Raises UserError where the sheet cannot be written.
    """
    lines: list[list[Tile]] = []
    for group in groups:
        shown = list(zip(group.rows, group.keys, group.similarities, strict=True))[: 2 * ACROSS]
        if sum(map(len, lines)) + len(shown) > MOST:
            break
        titles = [f"{len(group.rows)} images", *(f"{similarity:.3f}" for _, _, similarity in shown[1:])]
        lines.append(
            [_tile(index, row, key, title) for (row, key, _), title in zip(shown, titles, strict=True)]
        )
    return write_sheet(path, lines)


def _tile(index: Index, row: int, key: str, title: str) -> Tile:
    try:
        return Tile(title, key, as_pixels(index.read_image(row)))
    except UserError:  # a source that has moved takes its pictures along, not the answer
        return Tile(title, key, None)


def write_sheet(path: Path, lines: Sequence[Sequence[Tile]]) -> int:
    """Write lines of images as a PNG; return how many could not be read."""
    across = max(2, min(ACROSS, max(map(len, lines))))
    side = min(WIDTH // 4, (WIDTH - 2 * MARGIN - (across - 1) * SPACE) // across)
    step = round(1.35 * TITLE + side + 1.5 * NAME + 0.8 * SPACE)
    width = 2 * MARGIN + across * side + (across - 1) * SPACE
    placed: list[tuple[int, int, Tile]] = []
    top = MARGIN
    for line in lines:
        for place, tile in enumerate(line):
            row, column = divmod(place, across)
            placed.append((MARGIN + column * (side + SPACE), round(top + row * step + 1.35 * TITLE), tile))
        top += math.ceil(len(line) / across) * step + SPACE // 2
    page = Image.new("RGB", (width, top + MARGIN // 2), "white")
    draw = ImageDraw.Draw(page)
    widest = max(_font(TITLE).getlength(tile.title) for _, _, tile in placed)
    size = TITLE * min(1.0, max(SQUEEZED, side / max(widest, 1)))  # one for all
    for left, y, tile in placed:
        box, pixels = _fitted(Box(left, y, side, side), tile.pixels_HW3)
        page.paste(Image.fromarray(pixels), (box.left, box.top))
        middle = left + side / 2
        _write(draw, middle, y - 0.45 * TITLE, tile.title, size, INK, side)
        name = shortened(tile.name, max(12, side // 10))
        _write(draw, middle, y + side + 1.15 * NAME, name, NAME, GREY, side)
        if tile.pixels_HW3 is None:
            _write(draw, middle, y + side / 2, "cannot be read", NAME, GREY, side)
    with writing(path), replacing(path) as part:
        page.save(part, "PNG", compress_level=3)
    return sum(tile.pixels_HW3 is None for _, _, tile in placed)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont(FONT), size)


def _write(
    draw: ImageDraw.ImageDraw, x: float, y: float, words: str, size: float, colour: str, most: float
) -> None:
    """Write centred at a baseline; smaller, where the words would be wider than `most` pixels."""
    fit = min(1.0, most / max(_font(round(size)).getlength(words), 1))
    draw.text((x, y), words, colour, _font(max(1, int(round(size) * fit))), anchor="ms")


def _fitted(cell: Box, pixels_HW3: NDArray[np.uint8] | None) -> tuple[Box, NDArray[np.uint8]]:
    """Place an image in the middle of a cell, as large as its aspect allows."""
    if pixels_HW3 is None:
        return cell, np.full((cell.height, cell.width, 3), EMPTY, np.uint8)
    height, width = pixels_HW3.shape[:2]
    scale = min(cell.width / width, cell.height / height)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    box = Box(cell.left + (cell.width - w) // 2, cell.top + (cell.height - h) // 2, w, h)
    return box, photograph(pixels_HW3, box)
