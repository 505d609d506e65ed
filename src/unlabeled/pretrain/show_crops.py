"""A picture of one image's crops: where they lie and what became of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from unlabeled.pretrain.crops import CropRecipe, apply_parameters, draw_parameters

NUM_COLUMNS = 5  # of crops


def draw_crops(image_HW3: NDArray[np.uint8], recipe: CropRecipe, seed: int) -> Figure:
    """The image with the boxes of its crops, beside the crops, each labelled with what was done to it.

    Args:
        image_HW3: uint8 RGB.
        recipe: sizes and augmentations.
        seed: of the crops.
    """
    height, width = image_HW3.shape[:2]
    parameters = draw_parameters(height, width, recipe, np.random.default_rng(seed))
    num_globals = recipe.num_globals
    crops = [*apply_parameters(image_HW3, parameters[:num_globals], recipe.global_size)]
    crops += [*apply_parameters(image_HW3, parameters[num_globals:], recipe.local_size)]
    num_rows = -(-len(crops) // NUM_COLUMNS)
    figure = Figure(figsize=(4.8 + 2.1 * NUM_COLUMNS, max(3.6, 3.1 * num_rows)), layout="constrained")
    left, right = cast(Any, figure.subfigures(1, 2, width_ratios=(4.8, 2.1 * NUM_COLUMNS)))
    axes = left.subplots()
    axes.imshow(image_HW3)
    axes.set_title(f"{width} x {height} pixels", fontsize=9)
    axes.set_axis_off()
    grid = right.subplots(num_rows, NUM_COLUMNS, squeeze=False).ravel()
    for unused in grid[len(crops) :]:
        unused.set_axis_off()
    for number, (crop, row) in enumerate(zip(crops, parameters, strict=True)):
        is_global = number < num_globals
        colour = "tab:red" if is_global else "tab:blue"
        box = Rectangle((row["left"], row["top"]), row["width"], row["height"], fill=False, edgecolor=colour)
        axes.add_patch(box)
        name = f"global {number + 1}" if is_global else f"local {number - num_globals + 1}"
        # Names of global crops stand in the corner where those of local crops do not.
        x, y = row["left"] + 4, row["top"] + 4
        if is_global:
            x, y = row["left"] + row["width"] - 4, row["top"] + row["height"] - 4
        axes.text(x, y, name, color="white", fontsize=6,
                  ha="right" if is_global else "left", va="bottom" if is_global else "top",
                  bbox={"facecolor": colour, "edgecolor": "none", "pad": 1})  # fmt: skip
        grid[number].imshow(crop.transpose(1, 2, 0))
        grid[number].set(xticks=[], yticks=[])
        grid[number].set_title(f"{name}, {crop.shape[-1]} px", fontsize=8, color=colour)
        grid[number].set_xlabel(_said(row, height * width), fontsize=7)
        for spine in grid[number].spines.values():
            spine.set_color(colour)
    return figure


def _said(row: NDArray[np.void], area: int) -> str:
    done = [f"{row['width'] * row['height'] / area:.0%} of the area"]
    done += ["flip"] if row["flip"] else []
    done += [f"hue {row['hue']:+.2f}, brightness {row['brightness']:.2f}"] if row["jitter"] else []
    done += ["grey"] if row["grey"] else []
    done += [f"blur {row['sigma']:.1f} px"] if row["sigma"] else []
    done += ["solarised"] if row["solarise"] else []
    return "\n".join([done[0], *_pairs(done[1:])])


def _pairs(words: list[str]) -> list[str]:
    return [", ".join(words[start : start + 2]) for start in range(0, len(words), 2)]


def write_crops(image_HW3: NDArray[np.uint8], recipe: CropRecipe, seed: int, path: Path) -> None:
    """Save `draw_crops` as a PNG."""
    draw_crops(image_HW3, recipe, seed).savefig(path, dpi=130)
