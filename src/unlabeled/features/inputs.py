"""One image in whatever form a user has it, as pixels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.images.decode import BadImage, decode

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

ImageLike: TypeAlias = "str | Path | bytes | Image.Image | NDArray[Any] | Tensor"
CHANNELS = (1, 3, 4)  # grey, RGB, RGB with alpha


def as_pixels(image: ImageLike) -> NDArray[np.uint8]:
    """Return the RGB pixels of one image, upright; alpha is dropped, grey becomes RGB.

    image: a file's path; a file's bytes; a Pillow image; an array (H, W) or (H, W, 1, 3 or 4); a tensor of those
        shapes or with the channels first, which is what is assumed where both would do. Arrays and tensors are
        uint8, or float in [0, 1].

    Returns uint8 (H, W, 3), contiguous; it may share memory with an array that was given.
    Raises UserError, naming the file where it is one: missing, unreadable, of another shape, type or range.
    """
    from PIL import Image

    if isinstance(image, str | Path):
        try:
            return _decoded(Path(image).expanduser().read_bytes(), str(image))
        except OSError as error:
            raise UserError(
                f"{str(image) or repr(image)} cannot be read: {error.strerror or error}."
            ) from error
        except ValueError as error:  # a zero byte in the name
            raise UserError(f"{str(image)!r} is no path of an image: {error}.") from error
    if isinstance(image, bytes | bytearray | memoryview):
        return _decoded(bytes(image), f"The image of {len(image)} bytes")
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if isinstance(image, np.ndarray):
        return _from_array(image, "array")
    if hasattr(image, "detach") and hasattr(image, "cpu"):
        return _from_tensor(image)
    raise UserError(
        f"An image can be a path, bytes, a Pillow image, an array or a tensor, not {type(image).__name__}."
    )


def are_several(images: object) -> bool:
    """Whether this is images in a row: a list, a tuple, a generator, or a batch of four dimensions."""
    if isinstance(images, list | tuple):
        return True
    if isinstance(images, Iterator):
        return not hasattr(images, "read")  # a file gives lines
    return getattr(images, "ndim", 0) == 4


def _decoded(data: bytes, name: str) -> NDArray[np.uint8]:
    try:
        return decode(data)
    except BadImage as error:
        raise UserError(f"{name} cannot be read: {error}.") from error


def _from_pillow(image: Image.Image) -> NDArray[np.uint8]:
    from io import BytesIO

    from PIL import ImageOps

    try:
        upright = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;"):  # Pillow clips more than 8 bits
            buffer = BytesIO()
            upright.save(buffer, "TIFF")
            return decode(buffer.getvalue())
        return np.array(upright.convert("RGB"))
    # A Pillow image is read from its file on first use, and broken files raise errors of every kind.
    except Exception as error:
        name = getattr(image, "filename", "") or f"The Pillow image of mode {image.mode}"
        raise UserError(f"{name} cannot be read: {error}.") from error


def _from_tensor(image: Tensor) -> NDArray[np.uint8]:
    if image.is_floating_point():  # bfloat16 has no array type
        image = image.float()
    array: NDArray[Any] = image.detach().cpu().numpy()
    if array.ndim == 3 and array.shape[0] in CHANNELS:
        array = array.transpose(1, 2, 0)
    return _from_array(array, "tensor")


def _from_array(array: NDArray[Any], kind: str) -> NDArray[np.uint8]:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in CHANNELS or not array.size:
        hint = " or (3, H, W)" if kind == "tensor" else ""
        raise UserError(
            f"An image given as {kind} has the shape (H, W, 3){hint}, grey and alpha too; not {array.shape}."
        )
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise UserError(f"An image given as {array.dtype} is in [0, 1], not in [{low:g}, {high:g}].")
        array = (array * 255 + 0.5).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UserError(f"An image given as {kind} is uint8, or float in [0, 1]; not {array.dtype}.")
    rgb = array[:, :, :3] if array.shape[2] >= 3 else np.repeat(array, 3, axis=2)
    return np.ascontiguousarray(rgb)
