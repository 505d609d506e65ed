"""A first frame's mask through a video: each patch takes the labels of the most similar patches near it, before it.

Shape suffixes: K frames, C classes, D width, h w patches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unlabeled.dense.reference import whitened
from unlabeled.features.fitting import unit_rows

TOP = 5
NEIGHBOURHOOD = 0.2  # of the grid's shorter side, to each side: 12 patches of the protocol's 60 rows
MEMORY = 7  # last frames, beside the first
TEMPERATURE = 0.05  # of whitened features; the protocol has 0.1 of features as they are
_TILE = 8  # patches: a square of them is compared with a square of the other frames at once


class Directions(NamedTuple):
    """Features as they are compared: whitened by what a video's first frame has in common, and of length 1.

    Patches of one street are all alike to a small backbone: without it the most similar patch is hardly more similar
    than any other.
    """

    mean_D: NDArray[np.float32]
    whitening_DD: NDArray[np.float32]

    @classmethod
    def of(cls, features_hwD: NDArray[np.float32]) -> Directions:
        """Learn from the patches of a first frame."""
        return cls(*whitened(features_hwD.reshape(-1, features_hwD.shape[-1])))

    def __call__(self, features_hwD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a frame's features (h, w, D), of length 1."""
        white_hwD = ((features_hwD - self.mean_D) @ self.whitening_DD).astype(np.float32, copy=False)
        return unit_rows(white_hwD).reshape(features_hwD.shape)


class Labelled(NamedTuple):
    """A frame of which something is known."""

    features: NDArray[np.float32]  # (h, w, D), of length 1
    labels: NDArray[np.float32]  # (C, h, w), shares of classes


class Propagation:
    """The frames that the next one takes its labels from: the first, and the last few.

    Args:
        memory: how many of the last frames are kept, the first not counted.
        top, neighbourhood, temperature: see `propagated`; a neighbourhood of None is NEIGHBOURHOOD of the grid.

    Attributes:
        first: the frame whose mask is given.
        last: the last frames, the oldest first.
    """

    def __init__(
        self,
        memory: int = MEMORY,
        top: int = TOP,
        neighbourhood: int | None = None,
        temperature: float = TEMPERATURE,
    ) -> None:
        self.first: Labelled | None = None
        self.last: deque[Labelled] = deque(maxlen=memory)
        self.top, self.neighbourhood, self.temperature = top, neighbourhood, temperature

    def begin(self, first: Labelled) -> Labelled:
        """Take the frame whose mask is given, and return it."""
        self.first = first
        self.last.clear()
        return first

    def next(self, features_hwD: NDArray[np.float32]) -> Labelled:
        """Return the next frame with its labels, and keep it; `begin` is called before."""
        assert self.first is not None
        context = [self.first, *self.last]
        near = self.neighbourhood
        if near is None:
            near = max(1, round(NEIGHBOURHOOD * min(features_hwD.shape[:2])))
        labels_Chw = propagated(features_hwD, context, self.top, near, self.temperature)
        frame = Labelled(features_hwD, labels_Chw)
        self.last.append(frame)
        return frame


@torch.inference_mode()
def propagated(
    features_hwD: NDArray[np.float32],
    context: Sequence[Labelled],
    top: int,
    neighbourhood: int,
    temperature: float,
) -> NDArray[np.float32]:
    """Return the labels of a frame's patches, (C, h, w), from frames of the same grid whose labels are known.

    The protocol of DINO (arXiv 2104.14294, section 4.2.2; Jabri et al. 2020) on DAVIS: of all patches of all those
    frames that are at most `neighbourhood` rows and columns away, the `top` most similar ones count, with the weights
    softmax(cosine / temperature).

    features: of length 1.
    """
    h, w, _ = features_hwD.shape
    targets = torch.from_numpy(np.ascontiguousarray(features_hwD))
    sources = torch.from_numpy(np.stack([frame.features for frame in context]))
    labels_KhwC = torch.from_numpy(np.stack([frame.labels for frame in context])).permute(0, 2, 3, 1)
    result = torch.empty(h, w, labels_KhwC.shape[-1])
    for top_row in range(0, h, _TILE):
        for left in range(0, w, _TILE):
            rows = slice(top_row, min(h, top_row + _TILE))
            columns = slice(left, min(w, left + _TILE))
            around = (
                slice(max(0, rows.start - neighbourhood), min(h, rows.stop + neighbourhood)),
                slice(max(0, columns.start - neighbourhood), min(w, columns.stop + neighbourhood)),
            )
            result[rows, columns] = _tile(
                targets[rows, columns],
                sources[:, around[0], around[1]],
                labels_KhwC[:, around[0], around[1]],
                _near(rows, around[0], neighbourhood),
                _near(columns, around[1], neighbourhood),
                top,
                temperature,
            )
    return result.permute(2, 0, 1).contiguous().numpy()


def _near(here: slice, there: slice, most: int) -> Tensor:
    """Whether rows, or columns, are at most so far from each other, (here, there)."""
    return (
        torch.arange(here.start, here.stop)[:, None] - torch.arange(there.start, there.stop)
    ).abs() <= most


def _tile(
    targets_rcD: Tensor,
    sources_KRSD: Tensor,
    labels_KRSC: Tensor,
    near_rR: Tensor,
    near_cS: Tensor,
    top: int,
    temperature: float,
) -> Tensor:
    """`propagated` of a rectangle (r, c) from what is around it, (R, S)."""
    r, c, D = targets_rcD.shape
    near = (near_rR[:, None, :, None] & near_cS[None, :, None, :]).flatten(2).flatten(0, 1)
    cosines = targets_rcD.reshape(-1, D) @ sources_KRSD.reshape(-1, D).T
    cosines = cosines.view(r * c, len(sources_KRSD), -1).masked_fill_(~near[:, None], -torch.inf).flatten(1)
    best, places = cosines.topk(min(top, cosines.shape[1]), dim=1)
    weights = torch.softmax(best / temperature, dim=1)  # what is not near has none
    return (weights[:, :, None] * labels_KRSC.flatten(0, 2)[places]).sum(1).view(r, c, -1)


def normalised(map_HW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a class's map from 0 at its least to 1 at its most, as the protocol does before classes are compared.

    So a small object, whose labels fade from frame to frame, is not lost to what surrounds it. A map that is the same
    everywhere, or has no positive value, stays as it is.
    """
    low, high = float(map_HW.min()), float(map_HW.max())
    if high <= 0 or high == low:
        return map_HW
    return (map_HW - np.float32(low)) / np.float32(high - low)
