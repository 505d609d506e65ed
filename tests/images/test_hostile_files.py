"""Broken and hostile files are refused with a reason, cheaply; nothing makes decoding crash or hang."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unlabeled.images.decode import MAX_PIXELS, BadImage, decode
from unlabeled.images.headers import jpeg_header, png_header, webp_header

SETTINGS = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo(photograph: np.ndarray) -> Image.Image:
    return Image.fromarray(photograph[:131, :201])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_refused_wherever_they_end(photo: Image.Image, kind: str) -> None:
    data = encoded(photo, kind)
    decode(data)
    for share in (0.02, 0.1, 0.3, 0.5, 0.8, 0.95, 0.99):
        with pytest.raises(BadImage):
            decode(data[: int(share * len(data))])
    # The last bytes of GIF and PNG say only that nothing follows; checksums come before them in PNG.
    with pytest.raises(BadImage):
        decode(data[: {"GIF": -4, "PNG": -24}.get(kind, -2)])


def test_the_reason_says_truncated(photo: Image.Image) -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encoded(photo, kind)
        with pytest.raises(BadImage, match="truncated"):
            decode(data[: len(data) // 2])


def test_the_thumbnail_of_a_truncated_jpeg_does_not_hide_it(photo: Image.Image) -> None:
    thumbnail = encoded(photo.resize((30, 20)), "JPEG")
    block = b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"Exif\0\0" + thumbnail
    data = encoded(photo, "JPEG")
    whole = data[:2] + block + data[2:]
    np.testing.assert_array_equal(decode(whole), decode(data))
    with pytest.raises(BadImage, match="truncated"):
        decode(whole[: len(block) + 1200])


def test_bytes_after_the_image_do_no_harm(photo: Image.Image) -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encoded(photo, kind)
        np.testing.assert_array_equal(decode(data + bytes(10_000)), decode(data))


def test_a_zero_filled_download_is_refused(photo: Image.Image) -> None:
    for kind in ("JPEG", "PNG"):
        for mode in ("RGB", "L", *(("P", "RGBA") if kind == "PNG" else ())):
            data = encoded(photo.convert(mode), kind)
            with pytest.raises(BadImage):
                decode(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\0", "not an image"),
        (b"hello, I am a text file\n" * 50, "not an image"),
        (b"<html><body>404</body></html>", "not an image"),
        (b"%PDF-1.4 ...", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"\xff\xd8\xff", "."),
        (b"\x89PNG\r\n\x1a\n", "."),
        (b"RIFF\0\0\0\0WEBP", "."),
        (b"GIF89a", "."),
        (b"BM", "."),
        (b"II*\0", "."),
        (bytes(1_000_000), "not an image"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        decode(data)
    assert str(caught.value) and "\n" not in str(caught.value)


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def huge_png(width: int, height: int, data: bytes = b"") -> bytes:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + png_chunk(b"IDAT", data or zlib.compress(bytes(1000)))
        + png_chunk(b"IEND", b"")
    )


def huge_jpeg(width: int, height: int, marker: int = 0xC0) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=marker == 0xC2))
    at = data.index(bytes([0xFF, marker]))
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def huge_tiff(width: int, height: int, tile: int | None = None) -> bytes:
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)]
    body = zlib.compress(bytes(1000))
    at = 8 + 2 + 12 * (len(tags) + (4 if tile else 3)) + 4
    if tile:
        tags += [(322, 4, tile), (323, 4, tile), (324, 4, at), (325, 4, len(body))]
    else:
        tags += [(273, 4, at), (278, 4, height), (279, 4, len(body))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in sorted(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + body


def huge_gif(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def huge_gif_frame(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    at = data.index(b",\0\0\0\0\x08\0\x08\0")
    data[at + 5 : at + 9] = struct.pack("<HH", width, height)
    return bytes(data)


def huge_bmp(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def huge_webp(kind: str) -> bytes:
    if kind == "lossless":
        data = bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
        data[21:25] = struct.pack("<I", 16382 | 16382 << 14)
    elif kind == "lossy":
        data = bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP"))
        data[26:30] = struct.pack("<HH", 16383, 16383)
    else:
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        data = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
        data[24:30] = (16382).to_bytes(3, "little") * 2
    return bytes(data)


HUGE = {
    "png": huge_png(100_000, 100_000),
    "png just beyond": huge_png(16_384, MAX_PIXELS // 16_384 + 1),
    "jpeg": huge_jpeg(65_500, 65_500),
    "jpeg progressive": huge_jpeg(65_500, 65_500, 0xC2),
    "jpeg below the limit, but too few bytes": huge_jpeg(10_000, 10_000),
    "progressive below the limit, but too few bytes": huge_jpeg(10_000, 10_000, 0xC2),
    "tiff": huge_tiff(100_000, 100_000),
    "tiff tile": huge_tiff(100, 100, 100_000),
    "gif": huge_gif(65_535, 65_535),
    "gif frame": huge_gif_frame(65_535, 65_535),
    "bmp": huge_bmp(100_000, 100_000),
    "bmp upside down": huge_bmp(100_000, -100_000),
    "webp lossy": huge_webp("lossy"),
    "webp lossless": huge_webp("lossless"),
    "webp animated": huge_webp("animated"),
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_declared_sizes_are_refused(name: str) -> None:
    with pytest.raises(BadImage, match="truncated" if "few" in name else "too large"):
        decode(HUGE[name])


def test_refusing_takes_no_memory(tmp_path: Path, grown_by: Callable[..., int]) -> None:
    for name, data in HUGE.items():
        (tmp_path / name.replace(" ", "_")).write_bytes(data)
    prepare = """
from pathlib import Path
from unlabeled.images.decode import BadImage, decode
files = [p.read_bytes() for p in sorted(Path(sys.argv[1]).iterdir())]
"""
    work = """
for data in files:
    try:
        decode(data)
    except BadImage:
        continue
    raise SystemExit("decoded")
"""
    assert grown_by(prepare, work, str(tmp_path)) < 50_000


def test_a_progressive_jpeg_of_endless_scans_is_refused(photo: Image.Image) -> None:
    data = encoded(photo, "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    with pytest.raises(BadImage, match="scans"):
        decode(data[:-2] + 2000 * data[scan:-2] + data[-2:])


def test_a_png_text_bomb_takes_little(
    photo: Image.Image, tmp_path: Path, grown_by: Callable[..., int]
) -> None:
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(400_000_000), 9))
    data = encoded(photo, "PNG")
    (tmp_path / "bomb.png").write_bytes(data[:33] + bomb + data[33:])
    prepare = """
import contextlib
from pathlib import Path
from unlabeled.images.decode import BadImage, decode
data = Path(sys.argv[1]).read_bytes()
"""
    work = """
with contextlib.suppress(BadImage):
    decode(data)
"""
    assert grown_by(prepare, work, str(tmp_path / "bomb.png")) < 150_000


def test_another_librarys_settings_change_nothing(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    data = encoded(photo, "GIF")
    with pytest.raises(BadImage):
        decode(data[: len(data) // 2])
    with pytest.raises(BadImage, match="too large"):
        decode(HUGE["gif"])


# Fuzz: never anything but pixels or BadImage

FUZZED = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("GIF", {}),
    ("TIFF", {}),
    ("BMP", {}),
]


@pytest.fixture(scope="module")
def samples(photo: Image.Image) -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    small = photo.resize((67, 45))
    return [
        encoded(small, kind, **options, **({} if kind in ("GIF", "BMP") else {"exif": exif}))
        for kind, options in FUZZED
    ] + [encoded(small.convert(mode), "PNG") for mode in ("P", "LA", "1")]


def survives(data: bytes) -> None:
    try:
        pixels = decode(data)
    except BadImage as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        assert 4 <= pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS


@SETTINGS
@given(which=st.integers(0, 9), share=st.floats(0, 1))
def test_any_truncation(samples: list[bytes], which: int, share: float) -> None:
    survives(samples[which][: int(share * len(samples[which]))])


@SETTINGS
@given(
    which=st.integers(0, 9),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=8),
    head=st.booleans(),
)
def test_any_flipped_bytes(
    samples: list[bytes], which: int, flips: list[tuple[float, int]], head: bool
) -> None:
    data = bytearray(samples[which])
    for place, change in flips:
        data[int(place * (min(len(data), 200) if head else len(data)))] ^= change
    survives(bytes(data))


@SETTINGS
@given(which=st.integers(0, 9), junk=st.binary(max_size=300), keep=st.integers(0, 60))
def test_any_junk_behind_a_true_beginning(samples: list[bytes], which: int, junk: bytes, keep: int) -> None:
    survives(samples[which][:keep] + junk)
    for header in (jpeg_header, png_header, webp_header):
        header(samples[which][:keep] + junk)
