"""The crops of crops.py, made on the device that trains: the CPU decodes and draws, the device does all pixels.

The numbers drawn are those of the crops made on the CPU, and so are the steps and where they round to 8 bits. All that
decides the shape of a tensor is known to the host, so that it never waits for the device.

Shape suffixes: B images, N crops of one size (view-major), P pixels of all images, H W of a box, S of a crop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unlabeled.pretrain.batch import Batch, Masks

PIXELS_AT_ONCE = (
    2**25
)  # of boxes that are cut out and resampled together: 0.4 GB in float32, and their places 0.3
HUE = 3  # of the four operations of colour jitter
LUMA = (19595.0, 38470.0, 7471.0)  # ITU-R 601-2, in 1/65536

Held = TypeVar("Held")


@dataclass(frozen=True)
class Draws:
    """All crops of one size: what was drawn for them, and which of them each step is for.

    Attributes:
        size: S, pixels.
        starts_N: int64, the first pixel of the box among the P.
        steps_N: int64, pixels from one row of the image to the next.
        boxes_N2: float32, height and width.
        flips_N: bool.
        factors_N3: float32, of brightness, contrast and saturation.
        hues_N: float32, share of the colour circle.
        sigmas_N: float32, of the blur, pixels.
        thresholds_N: float32, of solarisation.
        blended: by place in the order of jitter: int64, the crops whose turn is brightness, contrast or saturation.
        operations: which of the three.
        turned: int64, the crops whose turn is hue.
        greyed, blurred, solarised: int64, the crops.
        radius: of the blur's kernel, pixels.
        sides: height and width of each box, on the host.
    """

    size: int
    starts_N: Tensor
    steps_N: Tensor
    boxes_N2: Tensor
    flips_N: Tensor
    factors_N3: Tensor
    hues_N: Tensor
    sigmas_N: Tensor
    thresholds_N: Tensor
    blended: tuple[Tensor, ...]
    operations: tuple[Tensor, ...]
    turned: tuple[Tensor, ...]
    greyed: Tensor
    blurred: Tensor
    solarised: Tensor
    radius: int
    sides: NDArray[np.int64]

    @staticmethod
    def of(
        parameters_N: NDArray[np.void], firsts_N: NDArray[np.int64], widths_N: NDArray[np.int64], size: int
    ) -> Draws:
        """The parameters of crops, as draw_parameters has them.

        Args:
            parameters_N: of dtype PARAMETERS.
            firsts_N: the first pixel of each crop's image among the P.
            widths_N: of the image, pixels.
            size: of the crops.
        """
        p = parameters_N
        order_N4 = np.where(p["jitter"][:, None] > 0, p["order"], -1)

        def where(chosen: NDArray[np.bool_]) -> Tensor:
            return torch.from_numpy(np.flatnonzero(chosen))

        turns = [order_N4[:, place] for place in range(4)]
        blends = [(turn >= 0) & (turn != HUE) for turn in turns]
        starts = firsts_N + p["top"].astype(np.int64) * widths_N + p["left"].astype(np.int64)
        factors = np.stack([p["brightness"], p["contrast"], p["saturation"]], 1)
        sides = np.stack([p["height"], p["width"]], 1)
        return Draws(
            size,
            torch.from_numpy(starts),
            torch.from_numpy(widths_N),
            torch.from_numpy(sides),
            torch.from_numpy(p["flip"] > 0),
            torch.from_numpy(factors),
            torch.from_numpy(p["hue"].copy()),
            torch.from_numpy(p["sigma"].copy()),
            torch.from_numpy(p["solarise"].copy()),
            tuple(where(blend) for blend in blends),
            tuple(
                torch.from_numpy(turn[blend].astype(np.int64))
                for turn, blend in zip(turns, blends, strict=True)
            ),
            tuple(where(turn == HUE) for turn in turns),
            where(p["grey"] > 0),
            where(p["sigma"] > 0),
            where(p["solarise"] > 0),
            int(p["radius"].max(initial=0)),
            sides.astype(np.int64),
        )


@dataclass(frozen=True)
class Uncropped:
    """A batch whose crops are still to be made.

    Attributes:
        pixels_P3: uint8 RGB, the images one after the other, row by row.
        globals: the global crops.
        locals: the local crops.
        masks: as Batch has them.
        num_images: B.
    """

    pixels_P3: Tensor
    globals: Draws
    locals: Draws
    masks: Masks | None
    num_images: int

    @staticmethod
    def of(
        images: list[NDArray[np.uint8]],
        parameters: list[NDArray[np.void]],
        sizes: tuple[int, int],
        num_globals: int,
        masks: Masks | None,
    ) -> Uncropped:
        """Images and what was drawn for the crops of each."""
        widths_B = np.array([image.shape[1] for image in images])
        counts = np.array([image.shape[0] * image.shape[1] for image in images])
        firsts_B = np.cumsum(counts) - counts
        drawn_VB = np.stack(parameters, 1)
        draws = [
            Draws.of(part.ravel(), np.tile(firsts_B, len(part)), np.tile(widths_B, len(part)), size)
            for part, size in zip((drawn_VB[:num_globals], drawn_VB[num_globals:]), sizes, strict=True)
        ]
        pixels = np.concatenate([image.reshape(-1, 3) for image in images])
        return Uncropped(torch.from_numpy(pixels), draws[0], draws[1], masks, len(images))

    def pin_memory(self) -> Uncropped:
        """The same in page-locked memory."""
        return _mapped(self, lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The batch with its crops, made there."""
        there = _mapped(self, lambda tensor: tensor.to(device, non_blocking=True))
        return Batch(
            crops_of(there.pixels_P3, there.globals),
            crops_of(there.pixels_P3, there.locals),
            there.masks,
            self.num_images,
        )


@torch.no_grad()
def crops_of(pixels_P3: Tensor, draws: Draws) -> Tensor:
    """uint8 (N, 3, S, S): resampled, flipped, jittered, greyed, blurred, solarised."""
    size, device = draws.size, pixels_P3.device
    crops = torch.empty(len(draws.sides), 3, size, size, device=device)
    for part in _chunks(draws.sides):
        crops[part] = _resampled(pixels_P3, draws, part)
    for chosen, operations, turned in zip(draws.blended, draws.operations, draws.turned, strict=True):
        if len(chosen):
            crops[chosen] = _blended(crops[chosen], operations, draws.factors_N3[chosen])
        if len(turned):
            crops[turned] = _turned(crops[turned], draws.hues_N[turned])
    if len(draws.greyed):
        crops[draws.greyed] = _luma(crops[draws.greyed]).expand(-1, 3, -1, -1)
    if len(draws.blurred):
        crops[draws.blurred] = _blurred(crops[draws.blurred], draws.sigmas_N[draws.blurred], draws.radius)
    if len(draws.solarised):
        some, least = crops[draws.solarised], draws.thresholds_N[draws.solarised, None, None, None]
        crops[draws.solarised] = torch.where(some >= least, 255 - some, some)
    return crops.to(torch.uint8)


def _chunks(sides: NDArray[np.int64]) -> Iterator[slice]:
    """Runs of crops whose boxes, each as large as the largest, are few enough pixels."""
    start = 0
    while start < len(sides):
        stop, most = start, np.zeros(2, np.int64)
        while stop < len(sides):
            most = np.maximum(most, sides[stop])
            if stop > start and int(most.prod()) * (stop + 1 - start) > PIXELS_AT_ONCE:
                break
            stop += 1
        yield slice(start, stop)
        start = stop


def _resampled(pixels_P3: Tensor, draws: Draws, part: slice) -> Tensor:
    """Boxes as (n, 3, S, S) whole levels: two products with matrices of bicubic weights."""
    size, device = draws.size, pixels_P3.device
    height, width = (int(side) for side in draws.sides[part].max(0))
    boxes_n2 = draws.boxes_N2[part]
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    # Beyond a box come pixels of weight 0; beyond the last image there are none.
    places_nHW = draws.starts_N[part, None, None] + draws.steps_N[part, None, None] * rows[:, None] + columns
    boxes_nHW3 = pixels_P3[places_nHW.clamp_(max=len(pixels_P3) - 1)].float()
    down_nSH = resize_weights(boxes_n2[:, 0], size, height)
    across_nSW = resize_weights(boxes_n2[:, 1], size, width)
    across_nSW = torch.where(draws.flips_N[part, None, None], across_nSW.flip(1), across_nSW)
    n = len(boxes_nHW3)
    short_nSW3 = (down_nSH @ boxes_nHW3.view(n, height, -1)).view(n, size, width, 3)
    crops_nSS = short_nSW3.transpose(2, 3).reshape(n, -1, width) @ across_nSW.mT  # (n, S * 3, S)
    crops_n3SS = crops_nSS.view(n, size, 3, size).transpose(1, 2)
    return _whole(crops_n3SS + 0.5)


def resize_weights(lengths_N: Tensor, size: int, longest: int) -> Tensor:
    """(N, size, longest): row s weighs the points of [0, length) for point s of `size`; 0 beyond the length.

    Keys' bicubic kernel, a = -0.5, widened where it reduces: Pillow's.
    """
    scale = (lengths_N / size)[:, None, None]
    widen = scale.clamp_min(1)
    points = torch.arange(longest, device=lengths_N.device, dtype=torch.float32)
    centre = (torch.arange(size, device=lengths_N.device)[:, None] + 0.5) * scale
    low, high = (centre - 2 * widen + 0.5).trunc(), (centre + 2 * widen + 0.5).trunc()
    x = ((points - centre + 0.5) / widen).abs()
    near, far = ((1.5 * x - 2.5) * x) * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    inside = (points >= low) & (points < high) & (points < lengths_N[:, None, None])
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * inside
    total: Tensor = weights.sum(-1, keepdim=True)
    return weights / total


def _whole(levels: Tensor) -> Tensor:
    """Cut to whole numbers in 0..255, in place."""
    levels.clamp_(0, 255).floor_()
    return levels


def _luma(crops_n3SS: Tensor) -> Tensor:
    """(n, 1, S, S), rounded."""
    red, green, blue = crops_n3SS.split(1, 1)
    grey: Tensor = (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2] + 32768) / 65536
    return grey.floor_()


def _blended(crops_n3SS: Tensor, operations_n: Tensor, factors_n3: Tensor) -> Tensor:
    """Brightness (from black), contrast (from the mean grey), saturation (from each pixel's grey), by the crop."""
    grey = _luma(crops_n3SS)
    mean = (grey.mean((1, 2, 3), keepdim=True) + 0.5).floor_()
    operation = operations_n[:, None, None, None]
    other = torch.where(operation == 0, 0.0, torch.where(operation == 1, mean, grey))
    factor = factors_n3.gather(1, operations_n[:, None])[:, :, None, None]
    return _whole(other + factor * (crops_n3SS - other))


def _turned(crops_n3SS: Tensor, shifts_n: Tensor) -> Tensor:
    """Hue as Pillow has it: 8-bit HSV, shifted round the circle."""
    red, green, blue = crops_n3SS.split(1, 1)
    high, low = crops_n3SS.amax(1, keepdim=True), crops_n3SS.amin(1, keepdim=True)
    span = high - low
    safe = span.clamp_min(1)
    hue = torch.where(green >= high, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(red >= high, (green - blue) / safe, hue)
    hue = torch.where(hue < 0, hue + 6, hue) * (span > 0)
    step = (shifts_n * 255).trunc()[:, None, None, None]
    hue = ((hue * (255 / 6)).floor() + step).remainder(256) * (6 / 255)
    chroma = high * (span * 255 / high.clamp_min(1)).floor() / 255
    k = (torch.arange(5, 0, -2, device=hue.device)[:, None, None] + hue).remainder(6)
    return _whole(high - chroma * torch.minimum(k, 4 - k).clamp(0, 1) + 0.5)


def _blurred(crops_n3SS: Tensor, sigmas_n: Tensor, radius: int) -> Tensor:
    """Gaussian of 2 * radius + 1 taps, reflected at the borders, rounded: two products with matrices."""
    size, device = crops_n3SS.shape[-1], crops_n3SS.device
    offsets = torch.arange(-radius, radius + 1, device=device)
    taps_nK = (-0.5 * (offsets / sigmas_n[:, None]) ** 2).exp()
    taps_nK = taps_nK / taps_nK.sum(1, keepdim=True)
    places_KS = torch.arange(size, device=device) + offsets[:, None]
    period = max(1, 2 * (size - 1))
    places_KS = places_KS.remainder(period)
    places_KS = torch.minimum(places_KS, period - places_KS).clamp(max=size - 1)
    hits_KSS = (places_KS[..., None] == torch.arange(size, device=device)).float()
    matrix_nSS = (taps_nK @ hits_KSS.flatten(1)).view(-1, size, size)
    across_n3SS = (crops_n3SS.flatten(1, 2) @ matrix_nSS.mT).view_as(crops_n3SS)
    return _whole(matrix_nSS[:, None] @ across_n3SS + 0.5)


def _mapped(held: Held, change: Callable[[Tensor], Tensor]) -> Held:
    """The same dataclass with every tensor in it changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, tuple):
            return tuple(changed(item) for item in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{item.name: changed(getattr(value, item.name)) for item in fields(value)})
        return value

    result: Held = changed(held)
    return result
