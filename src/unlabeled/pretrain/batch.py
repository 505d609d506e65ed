"""What one rank trains on in one step, and its parts where it is cut up to save memory.

Shape suffixes: B images, V views, N patch tokens, K prototypes, M masked patches, H W pixels.
Crops are view-major: row v * B + b is view v of image b.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """The patches of the global crops that iBOT compares; the student does not see them (of a frozen teacher it does).

    Attributes:
        hidden_VBN: bool (2B, N).
        patches_M: int64, where hidden_VBN is true when flattened, ascending.
        weights_M: float32, 1 / (masked patches of the patch's crop).
        counts: masked patches of each crop, known to the host: no shape in a step depends on the device's numbers.
    """

    hidden_VBN: Tensor
    patches_M: Tensor
    weights_M: Tensor
    counts: tuple[int, ...]

    @staticmethod
    def of(hidden_VBN: Tensor) -> Masks:
        """All of it from a mask on the CPU."""
        counts = hidden_VBN.sum(1)
        weights = counts.float().reciprocal().repeat_interleave(counts)
        return Masks(hidden_VBN, hidden_VBN.flatten().nonzero().squeeze(1), weights, tuple(counts.tolist()))

    def pin_memory(self) -> Masks:
        """The same in page-locked memory."""
        return Masks(
            self.hidden_VBN.pin_memory(),
            self.patches_M.pin_memory(),
            self.weights_M.pin_memory(),
            self.counts,
        )

    def to(self, device: torch.device) -> Masks:
        """The same on another device."""
        tensors = (self.hidden_VBN, self.patches_M, self.weights_M)
        hidden, patches, weights = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return Masks(hidden, patches, weights, self.counts)


@dataclass(frozen=True)
class Batch:
    """The crops of one step on one rank.

    Attributes:
        globals_VB3HW: uint8 (2B, 3, S, S), view-major.
        locals_VB3HW: uint8 (LB, 3, s, s), view-major; L may be 0.
        masks: of the global crops, or None.
        num_images: B.
    """

    globals_VB3HW: Tensor
    locals_VB3HW: Tensor
    masks: Masks | None
    num_images: int

    def pin_memory(self) -> Batch:
        """The same in page-locked memory."""
        masks = self.masks and self.masks.pin_memory()
        return Batch(self.globals_VB3HW.pin_memory(), self.locals_VB3HW.pin_memory(), masks, self.num_images)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.globals_VB3HW.to(device, non_blocking=True),
            self.locals_VB3HW.to(device, non_blocking=True),
            self.masks and self.masks.to(device),
            self.num_images,
        )


@dataclass(frozen=True)
class Part:
    """Some images of a batch, all their crops.

    Attributes:
        images: which of the batch's.
        batch: they alone.
        rows: the slices of the whole batch's M masked patches that are theirs, in order.
    """

    images: slice
    batch: Batch
    rows: tuple[slice, ...]

    def of_masked(self, values_MX: Tensor) -> Tensor:
        """The rows of these images, of something that has a row for each masked patch of the whole batch."""
        pieces = [values_MX[rows] for rows in self.rows]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def parts(batch: Batch, num_parts: int) -> Iterator[Part]:
    """A batch cut into at most so many parts of nearly equal size."""
    B = batch.num_images
    if num_parts == 1:
        yield Part(slice(0, B), batch, (slice(None),))
        return
    num_parts = min(num_parts, B)
    sizes = [B // num_parts + (number < B % num_parts) for number in range(num_parts)]
    for first, last in pairwise(accumulate(sizes, initial=0)):
        images = slice(first, last)
        masks, rows = _of_images(batch.masks, first, last) if batch.masks else (None, ())
        large, small = _views(batch.globals_VB3HW, B, images), _views(batch.locals_VB3HW, B, images)
        yield Part(images, Batch(large, small, masks, last - first), rows)


def _of_images(masks: Masks, first: int, last: int) -> tuple[Masks, tuple[slice, ...]]:
    """The masks of both global crops of some images, and the slices of the masked patches that are theirs."""
    B, N = len(masks.counts) // 2, masks.hidden_VBN.shape[1]
    starts = [0, *accumulate(masks.counts)]
    rows = (slice(starts[first], starts[last]), slice(starts[B + first], starts[B + last]))
    moved = (
        first,
        B - last + 2 * first,
    )  # crops of the whole batch that a part leaves out before its own, by view
    small = Masks(
        _views(masks.hidden_VBN, B, slice(first, last)),
        torch.cat([masks.patches_M[mine] - crops * N for mine, crops in zip(rows, moved, strict=True)]),
        torch.cat([masks.weights_M[mine] for mine in rows]),
        masks.counts[first:last] + masks.counts[B + first : B + last],
    )
    return small, rows


def _views(crops_VBX: Tensor, num_images: int, images: slice) -> Tensor:
    """All views of some images."""
    num_views = len(crops_VBX) // num_images
    wanted: Tensor = crops_VBX.unflatten(0, (num_views, num_images))[:, images]
    return wanted.flatten(0, 1)
