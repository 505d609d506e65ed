"""The frames of a video file or of a folder, in order, and a video written from pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.images.decode import BadImage, decode
from unlabeled.images.sources import Source, open_source
from unlabeled.weights.files import replacing

VIDEO_SUFFIXES = frozenset((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".gif"))
FRAMES_PER_SECOND = 10.0  # of a video made from a folder


class Frame(NamedTuple):
    """One frame, or the reason why it cannot be read."""

    key: str  # number in a video, six digits; path in a folder
    pixels: NDArray[np.uint8] | None  # (H, W, 3) RGB
    reason: str = ""


class Frames:
    """Frames that can be read from the first to the last, any number of times.

    Args:
        data: a video file that OpenCV decodes, or DATA (a folder of frames), in the order of its names.

    Attributes:
        count: of the frames; of a video what its header says, which need not be exact; 0 where it says nothing.
        rate: frames a second.

    Raises:
        UserError: there is nothing to read.
    """

    def __init__(self, data: str | Path) -> None:
        self.name = str(data)
        self.rate = FRAMES_PER_SECOND
        self.source: Source | None = None
        if not is_video(data):
            self.source = open_source(data)
            self.count = len(self.source)
            return
        with _opened(self.name) as capture:
            self.count = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
            rate = float(capture.get(cv2.CAP_PROP_FPS))
            self.rate = rate if 0 < rate < 1000 else FRAMES_PER_SECOND

    def __iter__(self) -> Iterator[Frame]:
        """Give the frames in order."""
        if self.source is None:
            yield from self._of_video()
            return
        for index in range(self.count):
            key = f"image {index}"
            try:
                sample = self.source.read(index)
                key = sample.key
                yield Frame(key, decode(sample.data))
            except (BadImage, OSError) as error:
                yield Frame(key, None, str(error))

    def _of_video(self) -> Iterator[Frame]:
        with _opened(self.name) as capture:
            number = 0
            while True:
                found, pixels_HW3 = capture.read()
                if not found:
                    break
                yield Frame(f"{number:06}", np.ascontiguousarray(pixels_HW3[:, :, ::-1]))
                number += 1


def is_video(data: str | Path) -> bool:
    """Whether DATA is a file that is read as a video."""
    path = Path(data).expanduser()
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()


@contextmanager
def _opened(name: str) -> Iterator[cv2.VideoCapture]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"There is no video at {name}.")
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise UserError(f"{name} cannot be read as a video: damaged, or of a codec that OpenCV has not.")
        yield capture
    finally:
        capture.release()


def write_video(path: Path, pictures: Iterator[NDArray[np.uint8]], rate: float) -> None:
    """Write pictures (H, W, 3) of one size as an MP4 (MPEG-4 part 2); an odd last row or column is left out.

    Raises:
        UserError: OpenCV here cannot write it.
    """
    with replacing(path) as part:
        whole = part.with_name(part.name + ".mp4")  # OpenCV goes by the ending
        writer = None
        try:
            for pixels_HW3 in pictures:
                height, width = (side - side % 2 for side in pixels_HW3.shape[:2])
                if writer is None:
                    code = cv2.VideoWriter.fourcc(*"mp4v")
                    writer = cv2.VideoWriter(str(whole), code, rate, (width, height))
                    if not writer.isOpened():
                        raise UserError(f"{path} cannot be written: OpenCV here has no MPEG-4 encoder.")
                writer.write(np.ascontiguousarray(pixels_HW3[:height, :width, ::-1]))
            if writer is not None:
                writer.release()
                whole.replace(part)
        finally:
            if writer is not None:
                writer.release()
            whole.unlink(missing_ok=True)
