"""What is drawn over or around a copied picture: text, emoji, the window of a browser, a telephone's screen.

All sizes are relative to the picture's, so that a copy of a thumbnail looks like one of a photograph. Nothing needs a
font file: letters are OpenCV's strokes, emoji are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Transformation = Callable[[Pixels, np.random.Generator], Pixels]
Colour = tuple[int, int, int]

FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_TRIPLEX, cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_SCRIPT_COMPLEX,
)  # fmt: skip
LETTERS = tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!?#@&")
SIDE = 256  # pixels an emoji is drawn at, before it is brought to its size
YELLOW, BROWN, RED = (255, 204, 77), (102, 69, 0), (221, 46, 68)


def resized(pixels_HW3: Pixels, height: int, width: int) -> Pixels:
    """Pixels at another size, at least 2 x 2: by area where that is smaller, else linear."""
    size = max(2, width), max(2, height)
    smaller = size[0] < pixels_HW3.shape[1] and size[1] < pixels_HW3.shape[0]
    how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return as_bytes(cv2.resize(pixels_HW3, size, interpolation=how))


def as_bytes(pixels_HW3: NDArray[Any]) -> Pixels:
    """What OpenCV returns, which has no type of its own, as contiguous pixels."""
    return np.ascontiguousarray(pixels_HW3, np.uint8)


def text(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Write 1 to 4 lines of random words, 8% to 20% of the short side high, in random colours and strokes."""
    out = pixels_HW3.copy()
    height, width = out.shape[:2]
    for _ in range(int(rng.integers(1, 5))):
        words = "".join(
            " " if rng.random() < 0.15 else str(rng.choice(LETTERS)) for _ in range(rng.integers(6, 26))
        )
        scale = min(height, width) * rng.uniform(0.08, 0.2) / 22  # letters are 22 pixels high at a scale of 1
        place = int(width * rng.uniform(-0.1, 0.4)), int(height * rng.uniform(0.1, 1.0))
        thick = max(1, round(scale * rng.uniform(1, 4)))
        cv2.putText(out, words, place, int(rng.choice(FONTS)), scale, _colour(rng), thick, cv2.LINE_AA)
    return out


def emoji(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Lay 1 to 3 faces, hearts or stars over it, 20% to 50% of the short side wide, turned, 60% to 100% opaque."""
    out = pixels_HW3.copy()
    height, width = out.shape[:2]
    for _ in range(int(rng.integers(1, 4))):
        draw = (_face, _heart, _star)[int(rng.integers(3))]
        picture, mask = np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros((SIDE, SIDE), np.uint8)
        draw(picture, mask, rng)
        side = max(2, round(min(height, width) * rng.uniform(0.2, 0.5)))
        turn = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), rng.uniform(-40, 40), 1.0)
        picture, mask = (
            cv2.resize(cv2.warpAffine(one, turn, (SIDE, SIDE)), (side, side), interpolation=cv2.INTER_AREA)
            for one in (picture, mask)
        )
        top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
        place = out[top : top + side, left : left + side]
        alpha = mask[:, :, None].astype(np.float32) / 255 * np.float32(rng.uniform(0.6, 1))
        place[:] = (place * (1 - alpha) + picture * alpha).round()
    return out


def screenshot(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """Show it in a drawn window of a browser, or on a telephone's screen with bars above and below."""
    frame = _browser if rng.random() < 0.5 else _telephone
    return frame(pixels_HW3, rng)


def _browser(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """A title bar with three buttons and an address, margins, and lines of text under the picture."""
    height, width = pixels_HW3.shape[:2]
    unit = max(2, round(min(height, width) * rng.uniform(0.06, 0.1)))
    margin = round(width * rng.uniform(0, 0.2))
    below = round(height * rng.uniform(0.05, 0.3))
    page, ink, bar = _theme(rng)
    top = 2 * unit
    canvas = np.full((top + unit + height + below, width + 2 * margin, 3), page, np.uint8)
    canvas[:top] = bar
    for number, colour in enumerate(((237, 106, 94), (245, 191, 79), (97, 197, 84))):
        cv2.circle(canvas, (unit + number * unit, unit // 2 + 1), max(1, unit // 3), colour, -1, cv2.LINE_AA)
    cv2.rectangle(canvas, (unit, unit), (canvas.shape[1] - unit, top - unit // 4), page, -1)
    canvas[top + unit // 2 : top + unit // 2 + height, margin : margin + width] = pixels_HW3
    _lines(canvas, top + height + unit, unit, ink, rng)
    return canvas


def _telephone(pixels_HW3: Pixels, rng: np.random.Generator) -> Pixels:
    """A tall screen as wide as the picture: a status bar, a line of names, the picture, buttons, lines of text."""
    height, width = pixels_HW3.shape[:2]
    unit = max(2, round(width * rng.uniform(0.05, 0.08)))
    total = max(height + 5 * unit, round(width * rng.uniform(1.3, 1.9)))
    page, ink, bar = _theme(rng)
    canvas = np.full((total, width, 3), page, np.uint8)
    canvas[:unit] = bar
    cv2.putText(canvas, "12:34", (unit // 2, round(unit * 0.8)), FONTS[0], unit / 32, ink, 1, cv2.LINE_AA)
    top = 3 * unit + round((total - height - 5 * unit) * rng.uniform(0, 0.5))
    cv2.circle(canvas, (unit, top - unit), max(1, round(unit * 0.6)), _colour(rng), -1, cv2.LINE_AA)
    cv2.line(canvas, (2 * unit, top - unit), (width // 2, top - unit), ink, max(1, unit // 4))
    canvas[top : top + height] = pixels_HW3
    for number in range(3):
        place = unit + number * 2 * unit, top + height + unit
        cv2.circle(canvas, place, max(1, round(unit * 0.5)), ink, max(1, unit // 8), cv2.LINE_AA)
    _lines(canvas, top + height + 2 * unit, unit, ink, rng)
    return canvas


def _lines(canvas: Pixels, top: int, unit: int, ink: Colour, rng: np.random.Generator) -> None:
    """Bars as lines of text, from a height to the bottom."""
    height, width = canvas.shape[:2]
    for y in range(top + unit // 2, height - unit // 2, unit):
        end = round(width * rng.uniform(0.3, 0.95))
        cv2.line(canvas, (unit, y), (max(unit, end), y), ink, max(1, unit // 4))


def _theme(rng: np.random.Generator) -> tuple[Colour, Colour, Colour]:
    """Colours of the page, of what is written on it, and of a bar; light or dark."""
    if rng.random() < 0.6:
        return (255, 255, 255), (90, 90, 90), (222, 225, 230)
    return (24, 26, 27), (190, 190, 190), (53, 54, 58)


def _colour(rng: np.random.Generator) -> Colour:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def _face(picture: Pixels, mask: Pixels, rng: np.random.Generator) -> None:
    middle, radius = (SIDE // 2, SIDE // 2), round(SIDE * 0.47)
    cv2.circle(mask, middle, radius, 255, -1, cv2.LINE_AA)
    picture[:] = YELLOW
    for side in (-1, 1):
        eye = middle[0] + side * SIDE // 6, round(SIDE * 0.38)
        cv2.ellipse(picture, eye, (SIDE // 18, SIDE // 10), 0, 0, 360, BROWN, -1, cv2.LINE_AA)
    mouth, axes = (middle[0], round(SIDE * 0.56)), (SIDE // 4, round(SIDE * rng.uniform(0.12, 0.24)))
    cv2.ellipse(picture, mouth, axes, 0, 0, 180, BROWN, -1 if rng.random() < 0.6 else SIDE // 24, cv2.LINE_AA)


def _heart(picture: Pixels, mask: Pixels, rng: np.random.Generator) -> None:
    angle = np.linspace(0, 2 * np.pi, 80)
    x = 16 * np.sin(angle) ** 3
    y = -(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle))
    _filled(picture, mask, np.stack((x, y), 1) / 36 + 0.5, RED if rng.random() < 0.6 else _colour(rng))


def _star(picture: Pixels, mask: Pixels, rng: np.random.Generator) -> None:
    angle = np.arange(10) * np.pi / 5 - np.pi / 2
    radius = np.where(np.arange(10) % 2, rng.uniform(0.18, 0.26), 0.48)
    points = np.stack((np.cos(angle), np.sin(angle)), 1) * radius[:, None] + 0.5
    _filled(picture, mask, points, YELLOW if rng.random() < 0.6 else _colour(rng))


def _filled(picture: Pixels, mask: Pixels, outline_P2: NDArray[np.float64], colour: Colour) -> None:
    """Fill an outline, given as shares of the side."""
    cv2.fillPoly(mask, [(outline_P2 * SIDE).round().astype(np.int32)], 255, cv2.LINE_AA)
    picture[:] = colour
