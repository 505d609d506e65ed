"""From image files to a written picture and its numbers: what `unlabeled show` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.features.attention import attention
from unlabeled.features.fitting import centres, default_size, patch_grid
from unlabeled.features.inputs import as_pixels
from unlabeled.features.match import Matches, best_spread, match
from unlabeled.features.page import WIDTH, WIDTHS, check_place, shortened
from unlabeled.features.pca import patch_pca
from unlabeled.features.pictures import Picture, draw_attention, draw_match, draw_pca, draw_similar
from unlabeled.features.similar import patch_at, similar_across

if TYPE_CHECKING:
    from unlabeled.features.page import Page
    from unlabeled.vit import VisionTransformer

MAX_IMAGES = 16  # of a page; more are too small to see


def write_attention(
    model: VisionTransformer,
    images: Sequence[str],
    out: str,
    *,
    layer: int = -1,
    mass: float = 0.6,
    size: int | None = None,
    width: int = WIDTH,
    name: str = "",
) -> dict[str, Any]:
    """Write a picture of `attention`, and return its numbers.

    images: files. out: a PNG. width: of the picture at most, in pixels. name: of the model, for the caption; the
        other arguments are those of `attention`.

    Returns, an image: `on_patches`, the share of each head's attention that is not on CLS and registers;
    `mask_patches`, the share of the patches that hold the mass of the mean; `peak`, the centre of the patch with
    the most, in pixels of the image.
    Raises UserError as `attention` does, for an image that is missing or too small, and for an `out` that cannot be
    written, before anything is computed.
    """
    pictures = _opened(model, images, out, size, width)
    maps = [attention(model, picture.pixels, layer, mass, size) for picture in pictures]
    block = layer % len(model.blocks)
    caption = _caption(model, name, size, f"block {block} of 0 to {len(model.blocks) - 1}")
    _save(draw_attention(pictures, maps, mass, caption, width), out)
    return {
        "picture": out,
        "layer": block,
        "mass": mass,
        "images": [
            _about(picture, found.mean)
            | {
                "heads": len(found.heads),
                "on_patches": [round(float(share), 4) for share in found.heads.sum((1, 2))],
                "mask_patches": round(float(found.mask.mean()), 4),
                "peak": _peak(picture, found.mean),
            }
            for picture, found in zip(pictures, maps, strict=True)
        ],
    }


def write_pca(
    model: VisionTransformer,
    images: Sequence[str],
    out: str,
    *,
    foreground: bool = True,
    size: int | None = None,
    width: int = WIDTH,
    name: str = "",
) -> dict[str, Any]:
    """Write a picture of `patch_pca`, and return its numbers; arguments and errors as `write_attention`'s.

    Returns `explained`, the shares of the variance, and for each image `foreground`, the share of its patches.
    """
    pictures = _opened(model, images, out, size, width)
    pca = patch_pca(model, [picture.pixels for picture in pictures], foreground, size)
    caption = _caption(model, name, size, f"{pca.explained.sum():.0%} of the variance in three components")
    _save(draw_pca(pictures, pca, caption, width), out)
    return {
        "picture": out,
        "explained": [round(float(share), 4) for share in pca.explained],
        "images": [
            _about(picture, mask) | {"foreground": round(float(mask.mean()), 4)}
            for picture, mask in zip(pictures, pca.foreground, strict=True)
        ],
    }


def write_match(
    model: VisionTransformer,
    a: str,
    b: str,
    out: str,
    *,
    most: int = 40,
    size: int | None = None,
    width: int = WIDTH,
    name: str = "",
) -> dict[str, Any]:
    """Write a picture of `match`, and return its numbers; arguments and errors as `write_attention`'s.

    most: lines drawn, see `best_spread`.

    Returns `mutual`, the number of pairs found, and `shown`: their points in pixels of the images and cosines.
    """
    if most < 1:
        raise UserError(f"At least one line can be drawn, not {most}.")
    pictures = _opened(model, [a, b], out, size, width)
    matches = match(model, pictures[0].pixels, pictures[1].pixels, size)
    chosen = best_spread(matches, most)
    drawn = Matches(matches.points_a[chosen], matches.points_b[chosen], matches.similarities[chosen])
    mutual = len(matches.similarities)
    caption = _caption(model, name, size, f"{len(drawn.similarities)} of {mutual} mutual nearest patches")
    _save(draw_match(pictures[0], pictures[1], drawn, caption, width), out)
    return {
        "picture": out,
        "mutual": mutual,
        "shown": [
            {"a": _rounded(start), "b": _rounded(end), "similarity": round(float(cosine), 4)}
            for start, end, cosine in zip(*drawn, strict=True)
        ],
    }


def write_similar(
    model: VisionTransformer,
    images: Sequence[str],
    out: str,
    *,
    at: tuple[float, float],
    size: int | None = None,
    width: int = WIDTH,
    name: str = "",
) -> dict[str, Any]:
    """Write a picture of `similar_across`, and return its numbers; arguments and errors as `write_attention`'s.

    at: (x, y) in pixels of the first image.

    Returns, an image: `mean`, of the cosines; `best`, the cosine of the most similar patch, the marked one left
    out, and `peak`, its centre in pixels of the image.
    """
    pictures = _opened(model, images, out, size, width)
    maps = similar_across(model, [picture.pixels for picture in pictures], at, size)
    caption = _caption(model, name, size, f"marked: {at[0]:g}, {at[1]:g} in {shortened(pictures[0].name)}")
    _save(draw_similar(pictures, maps, at, caption, width), out)
    others = [maps[0].copy(), *maps[1:]]
    h, w = maps[0].shape
    others[0][patch_at(at, (h, w), pictures[0].pixels.shape[:2])] = -1
    return {
        "picture": out,
        "at": list(at),
        "images": [
            _about(picture, values)
            | {
                "mean": round(float(values.mean()), 4),
                "best": round(float(without.max()), 4),
                "peak": _peak(picture, without),
            }
            for picture, values, without in zip(pictures, maps, others, strict=True)
        ],
    }


def _opened(
    model: VisionTransformer, images: Sequence[str], out: str, size: int | None, width: int
) -> list[Picture]:
    """Read the images, and refuse before the work what would fail after it."""
    path = Path(out)
    if len(images) > MAX_IMAGES:
        raise UserError(f"A picture shows {MAX_IMAGES} images at most, not {len(images)}.")
    if not WIDTHS[0] <= width <= WIDTHS[1]:
        raise UserError(f"A picture is {WIDTHS[0]} to {WIDTHS[1]} pixels wide, not {width}.")
    check_place(path, images)
    pictures = [Picture(Path(image).name, as_pixels(image)) for image in images]
    for image, (_, pixels) in zip(images, pictures, strict=True):
        try:
            wanted = default_size(model) if size is None else size
            patch_grid(pixels.shape[0], pixels.shape[1], model.config.patch_size, wanted)
        except UserError as error:
            raise UserError(f"{image}: {error}") from error
    return pictures


def _save(page: Page, out: str) -> None:
    page.save(Path(out))


def _caption(model: VisionTransformer, name: str, size: int | None, *facts: str) -> str:
    patch_size = model.config.patch_size
    side = max(1, round((size or default_size(model)) / patch_size)) * patch_size
    words = [shortened(name, 60), *facts, f"short side {side} pixels"]
    return ", ".join(word for word in words if word)


def _about(picture: Picture, grid: NDArray[Any]) -> dict[str, Any]:
    height, width = picture.pixels.shape[:2]
    return {"image": picture.name, "width": width, "height": height, "grid": list(grid.shape)}


def _peak(picture: Picture, values: NDArray[np.float32]) -> list[float]:
    """The centre of the patch with the largest value, in pixels of the image."""
    grid = (values.shape[0], values.shape[1])
    shape = (picture.pixels.shape[0], picture.pixels.shape[1])
    return _rounded(centres(np.array([values.argmax()]), grid, shape)[0])


def _rounded(point: NDArray[np.float64]) -> list[float]:
    return [round(float(value), 2) for value in point]
