"""Encoded bytes to RGB pixels: fast for what is common, careful with what is broken."""

from __future__ import annotations

import io
import os
import warnings
from typing import Any

# OpenCV's decoders complain on standard error of files that we report ourselves.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

SUPPORTED = "Supported: JPEG, PNG, WebP, GIF (first frame), TIFF, BMP."
MAX_PIXELS = 178_956_970  # width x height; more is refused from the header (Pillow's own limit for a bomb)
MIN_SIDE = 2  # pixels

# Pillow knows a format once its plugin is imported.
_PLUGINS = (
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "BMP")


class BadImage(Exception):  # noqa: N818  (a fact about a file, met every day)
    """Bytes that are no usable image; the message is the reason."""


def decode(data: bytes) -> NDArray[np.uint8]:
    """Decode an image file.

    Grey and palette become RGB, alpha is composited on white, CMYK is converted, 16 bits are scaled to 8, and EXIF
    orientation is applied.

    Args:
        data: a whole file: JPEG, PNG, WebP, GIF (first frame), TIFF, BMP.

    Returns:
        uint8 (H, W, 3) RGB, contiguous.

    Raises:
        BadImage: empty, truncated, not an image, smaller than 2 pixels, larger than MAX_PIXELS.
    """
    if not data:
        raise BadImage("empty file")
    common = _decode_jpeg(data) if data[:3] == b"\xff\xd8\xff" else _decode_png(data)
    return _decode_pillow(data) if common is None else common


def _decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """The common case, by libjpeg-turbo; None where Pillow should look."""
    size = _jpeg_size(data)
    # OpenCV fills what is missing of a truncated file with grey and says nothing: the end marker tells.
    if size is None or b"\xff\xd9" not in data[-4096:]:
        return None
    _check_size(*size)
    pixels: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return pixels if pixels is None else np.ascontiguousarray(pixels)


def _decode_png(data: bytes) -> NDArray[np.uint8] | None:
    """8-bit grey or RGB without transparency or orientation, by libpng; None where Pillow should look."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or b"IEND" not in data[-64:]:
        return None
    depth, kind = data[24], data[25]
    if depth != 8 or kind not in (0, 2) or b"tRNS" in data[:4096] or b"eXIf" in data[:4096]:
        return None
    _check_size(int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
    pixels: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return pixels if pixels is None else np.ascontiguousarray(pixels)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a grey or YCbCr JPEG; None if there is no such header (CMYK, broken)."""
    at, end = 2, len(data)
    while at + 9 < end:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            channels = data[at + 9]
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            return (width, height) if channels in (1, 3) else None
        if 0xD0 <= marker <= 0xD9 or marker == 0x01:
            at += 2
            continue
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"too small: {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise BadImage(f"too large: {width} x {height} pixels declared, {MAX_PIXELS} are allowed")


def _decode_pillow(data: bytes) -> NDArray[np.uint8]:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what the size check below refuses
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_size(*image.size)
                image.load()
                upright = ImageOps.exif_transpose(image)
                return np.array(_rgb(upright))
        except BadImage:
            raise
        except Image.DecompressionBombError as error:
            raise BadImage(f"too large: {error}") from error
        except Image.UnidentifiedImageError as error:
            raise BadImage("not an image, or of a kind that is not supported") from error
        # Pillow's plugins meet broken bytes with errors of every kind.
        except Exception as error:
            raise BadImage(f"broken: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float32)
        # 16 bits hold 257 times the values of 8; TIFFs of 32 bits and floats have no range of their own.
        full = 65535.0 if image.mode.startswith("I") else float(max(1.0, np.nanmax(values, initial=0.0)))
        grey = np.nan_to_num(values * (255.0 / full)).clip(0, 255).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        straight = image.convert("RGBA")
        white = Image.new("RGBA", straight.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, straight).convert("RGB")
    return image.convert("RGB")
