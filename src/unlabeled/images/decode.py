"""Encoded bytes to RGB pixels: fast for what is common, careful with what is broken.

The pixels are those of Pillow's `Image.open(file).convert("RGB")` (alpha is dropped, as torchvision and
Meta's release drop it), with EXIF orientation applied and more than 8 bits scaled to 8. OpenCV decodes
ordinary JPEG, PNG and WebP, 1.2 to 3 times as fast; Pillow the rest, and whatever OpenCV refuses.
"""

from __future__ import annotations

import io
import logging
import os
import sys
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
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from unlabeled.images.headers import Header, jpeg_header, png_header, webp_header

SUPPORTED = "Supported: JPEG, PNG, WebP, GIF (first frame), TIFF, BMP."
# Width x height; more is refused from the header. A decode then stays near 1 GB, the largest of Pillow's and
# libjpeg's own buffers included; a 100-megapixel camera passes, a decompression bomb does not.
MAX_PIXELS = 2**27
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
# (an MPO is opened as a JPEG, whose plugin then hands it on)
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
_BAND = 2**22  # pixels converted at a time, so that a large image is not held three times over
_MAX_SCANS = 1000  # of a progressive JPEG; cameras and encoders write about 10, files made to stall millions
_REDUCED = {
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

# Pillow warns and logs of what is reported as a reason here.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)


class BadImage(Exception):  # noqa: N818  (a fact about a file, met every day)
    """Bytes that are no usable image; the message is the reason."""


def decode(data: bytes, min_side: int | None = None) -> NDArray[np.uint8]:
    """Decode an image file.

    Alpha is dropped, grey and palette become RGB, CMYK is converted, 16 bits are scaled to 8 (65535 is 255;
    integers and floats of 32 bits by their own maximum where that is beyond 65535 or 1), EXIF orientation is
    applied.

    Args:
        data: a whole file: JPEG, PNG, WebP, GIF (first frame), TIFF, BMP.
        min_side: pixels; a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its short side stays
            at least this long (faster, and no worse where the image is shrunk further anyway). None: full
            size.

    Returns:
        uint8 (H, W, 3) RGB, contiguous.

    Raises:
        BadImage: empty, truncated, broken, not an image, a side below 2 pixels, more than MAX_PIXELS
            declared.
    """
    if not data:
        raise BadImage("empty file")
    if data[:3] == b"\xff\xd8\xff":
        pixels = _decode_fast(data, _checked_jpeg(data), min_side)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        pixels = _decode_fast(data, _checked_webp(data), None)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        pixels = _decode_fast(data, _checked_png(data), None)
    else:
        pixels = None
    return _decode_pillow(data) if pixels is None else pixels


def _checked_jpeg(data: bytes) -> Header | None:
    header = jpeg_header(data)
    if header is None:
        return None
    _check_size(header.width, header.height)
    # Decoders fill what is missing of a truncated file with grey and say nothing: the end marker tells. An
    # embedded thumbnail has its own, so only what follows the start of the scan counts.
    if data.rfind(b"\xff\xd9", header.start) < 0:
        raise BadImage("truncated: the end marker is missing")
    # Huffman codes spend at least a bit on every 8 x 8 block: fewer cannot be the image, whatever is
    # declared.
    if header.huffman and header.width * header.height > 64 * 8 * len(data):
        raise BadImage(f"truncated: {len(data)} bytes for {header.width} x {header.height} pixels")
    if header.progressive and data.count(b"\xff\xda") > _MAX_SCANS:
        raise BadImage(f"broken: more than {_MAX_SCANS} scans")
    return header


def _checked_webp(data: bytes) -> Header | None:
    header = webp_header(data)
    if header is None:
        return None
    # Pillow decodes through libwebp's animation decoder, which holds several canvases.
    _check_size(header.width, header.height, MAX_PIXELS if header.plain else MAX_PIXELS // 2)
    if len(data) < header.start:
        raise BadImage(f"truncated: {len(data)} of {header.start} bytes")
    return header


def _checked_png(data: bytes) -> Header | None:
    header = png_header(data)
    if header is not None:
        _check_size(header.width, header.height)
        if header.damaged:  # libpng stops at that; Pillow goes on, with noise
            raise BadImage("broken: a checksum does not match")
    return header


def _check_size(width: int, height: int, most: int = MAX_PIXELS) -> None:
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"too small: {width} x {height} pixels")
    if width * height > most:
        raise BadImage(f"too large: {width} x {height} pixels declared, {most} are allowed")


def _decode_fast(data: bytes, header: Header | None, min_side: int | None) -> NDArray[np.uint8] | None:
    """The common case, by OpenCV, which applies EXIF orientation; None where Pillow should look."""
    if header is None or not header.plain:
        return None
    flags: int = cv2.IMREAD_COLOR_RGB
    if min_side is not None:
        short = min(header.width, header.height)
        for denominator, reduced in _REDUCED.items():
            if -(-short // denominator) >= min_side:
                flags = cv2.IMREAD_COLOR_RGB | (reduced & ~cv2.IMREAD_COLOR)
    try:
        pixels: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    return None if pixels is None else np.ascontiguousarray(pixels)


def _decode_pillow(data: bytes) -> NDArray[np.uint8]:
    # Another library may have asked Pillow to fill truncated files with grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(*image.size)
            tags = getattr(image, "tag_v2", {})
            tile = tags.get(322, 1) * tags.get(323, 1)
            if tile > MAX_PIXELS:
                raise BadImage(f"too large: a tile of {tile} pixels declared")
            image.load()
            orientation = _orientation(image)
            pixels = _rgb(image)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: more than {MAX_PIXELS} pixels declared") from error
    except UnidentifiedImageError as error:
        raise BadImage("not an image, or of a kind that is not supported") from error
    except MemoryError as error:
        raise BadImage("too large: there is not enough memory to decode it") from error
    # Pillow's plugins meet broken bytes with errors of every kind.
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(text if text.startswith("truncated") else f"{_kind_of(text)}: {text}") from error
    return _turned(pixels, orientation)


def _kind_of(text: str) -> str:
    signs = (
        "truncated",
        "not enough",
        "incomplete",
        "unpack requires",
        "index out of range",
        "unexpected end",
    )
    return "truncated" if any(sign in text.lower() for sign in signs) else "broken"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it is broken (Pillow loads TIFFs upright)."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a broken tag table is no reason to lose the image
        return 1


def _turned(pixels_HW3: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Upright pixels; EXIF 2.32, tag 0x0112."""
    if orientation in (5, 6, 7, 8):
        pixels_HW3 = pixels_HW3.transpose(1, 0, 2)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels_HW3[::rows, ::columns])


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels of a loaded image, converted band by band."""
    width, height = image.size
    deep = image.mode in ("I", "F") or image.mode.startswith("I;")
    rows = max(1, _BAND // width)
    tops = range(0, height, rows)
    full = _full_scale(image, tops) if deep else 0.0
    pixels = np.empty((height, width, 3), np.uint8)
    for top in tops:
        band = _band(image, top, rows)
        if deep:
            values = np.nan_to_num(np.asarray(band).astype(np.float32)).clip(0, full)
            pixels[top : top + rows] = (values * (255 / full) + 0.5).astype(np.uint8)[:, :, None]
        else:
            pixels[top : top + rows] = np.asarray(band.convert("RGB"))
    return pixels


def _band(image: Image.Image, top: int, rows: int) -> Image.Image:
    width, height = image.size
    return image if rows >= height else image.crop((0, top, width, min(height, top + rows)))


def _full_scale(image: Image.Image, tops: range) -> float:
    """What becomes 255: 65535 for integers and 1 for floats, or the image's maximum if that is more."""
    full = 1.0 if image.mode == "F" else 65535.0
    if image.mode.startswith("I;16"):
        return full
    for top in tops:
        values = np.asarray(_band(image, top, tops.step))
        full = max(full, float(values.max(initial=0, where=np.isfinite(values))))
    return full


def quiet_native_libraries() -> None:
    """Send what C libraries print to standard error nowhere (libjpeg on corrupt files); Python's own output
    stays.

    For worker processes: nothing else there has to say anything through C.
    """
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
