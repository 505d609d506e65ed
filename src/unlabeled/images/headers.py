"""What JPEG, PNG and WebP files declare about themselves, read without a decoder."""

from __future__ import annotations

import zlib
from typing import NamedTuple


class Header(NamedTuple):
    """The declared facts."""

    width: int  # pixels
    height: int  # pixels
    plain: bool  # the common kind: 8 bits, grey or colour, whole; no alpha, palette, animation, CMYK
    huffman: bool = False  # JPEG: coded with Huffman codes
    progressive: bool = False  # JPEG: coded in many scans
    damaged: bool = False  # PNG: a chunk that the pixels need fails its checksum
    start: int = 0  # JPEG: where the first scan starts; WebP: how many bytes the file has


# Start-of-frame markers (ITU-T T.81, table B.1): all but DHT, JPG and DAC; from 0xC9 on, arithmetic coding.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_LOSSLESS = frozenset((0xC3, 0xC7, 0xCB, 0xCF))
_SCAN = 0xDA


def jpeg_header(data: bytes) -> Header | None:
    """The header of a JPEG; None where there is none, or stray bytes that only a decoder knows to skip."""
    at, end = 2, len(data)
    frame: Header | None = None
    while at + 9 < end:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == _SCAN:
            return frame._replace(start=at) if frame else None
        elif marker == 0x01 or 0xD0 <= marker <= 0xD9:  # markers without a segment
            at += 2
        else:
            if marker in _FRAMES:
                bits, channels = data[at + 4], data[at + 9]
                height, width = (
                    int.from_bytes(data[at + 5 : at + 7], "big"),
                    int.from_bytes(data[at + 7 : at + 9], "big"),
                )
                plain = bits == 8 and channels in (1, 3) and marker not in _LOSSLESS
                huffman = marker < 0xC8 and marker not in _LOSSLESS
                frame = Header(width, height, plain, huffman, progressive=marker % 4 == 2)
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


_NEEDED_CHUNKS = frozenset((b"IHDR", b"PLTE", b"IDAT"))
# Chunks that say nothing about the pixels' values, place or frames, and that libpng takes silently.
_PLAIN_CHUNKS = frozenset((b"IHDR", b"IDAT", b"IEND", b"sRGB", b"gAMA", b"pHYs", b"tEXt", b"tIME"))


def png_header(data: bytes) -> Header | None:
    """The header of a PNG (W3C PNG, third edition), plain only if all its chunks are whole and known."""
    if len(data) < 33 or data[12:16] != b"IHDR":
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    depth, kind, interlaced = data[24], data[25], data[28]
    plain = depth == 8 and kind in (0, 2) and not interlaced
    at, name, view = 8, b"", memoryview(data)
    while name != b"IEND":
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        name = data[at + 4 : at + 8]
        if len(data) < end + 4:
            return Header(width, height, plain=False)
        sound = zlib.crc32(view[at + 4 : end]) == int.from_bytes(data[end : end + 4], "big")
        if name in _NEEDED_CHUNKS and not sound:
            return Header(width, height, plain=False, damaged=True)
        plain = plain and sound and name in _PLAIN_CHUNKS
        at = end + 4
    return Header(width, height, plain)


def webp_header(data: bytes) -> Header | None:
    """The header of a WebP file (RFC 9649); None where there is no whole one."""
    if len(data) < 30:
        return None
    size = 8 + int.from_bytes(data[4:8], "little")
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        return Header(width, height, True, start=size)
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return Header((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, not bits >> 28 & 1, start=size)
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return Header(width, height, False, start=size)
    return None
