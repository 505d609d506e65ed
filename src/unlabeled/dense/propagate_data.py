"""A video or a folder of frames to a folder of masks and a video: what `unlabeled segment` does with a first mask."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unlabeled.dense.mask_pictures import draw_frames, overlay
from unlabeled.dense.masks import OBJECT, Labels, patch_shares
from unlabeled.dense.propagate import (
    MEMORY,
    TEMPERATURE,
    TOP,
    Directions,
    Labelled,
    Propagation,
    normalised,
)
from unlabeled.dense.reference import dense_extractor, largest, mask_values
from unlabeled.dense.segment_data import Places, begin, named, save_image
from unlabeled.dense.upsample import upsampled
from unlabeled.dense.video import Frame, Frames, write_video
from unlabeled.errors import UserError, writing
from unlabeled.images.bad_files import BadFiles
from unlabeled.progress import Progress
from unlabeled.weights.files import replacing

if TYPE_CHECKING:
    from rich.console import Console

    from unlabeled.vit import VisionTransformer

RADIUS = 0.5  # patches, of the filter that takes masks to pixels
SHOWN = 6  # frames on the page


def propagate_data(
    model: str | Path | VisionTransformer,
    frames: Frames,
    labels: Labels,
    out: str | Path,
    *,
    size: int | None = None,
    layer: int = -1,
    memory: int = MEMORY,
    top: int = TOP,
    neighbourhood: int | None = None,
    temperature: float = TEMPERATURE,
    whiten: bool = True,
    radius: float = RADIUS,
    class_names: Sequence[str] | None = None,
    caption: str = "",
    device: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Write the masks of all frames to a folder, the first one's being given, and return what was done.

    The folder has masks/000012.png (or of the frame's name; as the first mask is: class numbers, or 255 and 0),
    overlay.mp4, segment.png (a page of some frames), segment.json and, for frames that cannot be read or have another
    size than the first, bad_files.jsonl. A run that was stopped goes on, with the same result to the last bit.

    labels: of the first frame that can be read, one map. size, layer: see `learn_prototypes`. memory, top,
    neighbourhood, temperature: see `Propagation`. whiten: features by the first frame's (`Directions`). radius: see
    `upsampled`. The rest is as in `segment_data`.

    Returns targets (frames that have a mask), bad_files, out, video, picture, and pixels: how many of each class.
    Raises UserError where mask and first frame differ in size, no frame can be read, or `segment_data` does.
    """
    if memory < 0 or top < 1 or (neighbourhood or 0) < 0 or not temperature > 0 or radius < 0:
        raise UserError(
            "Propagation takes the 1 or more most similar patches within 0 or more rows and columns of 0 or more last "
            f"frames, at a temperature above 0; not {top}, {neighbourhood}, {memory} and {temperature:g}."
        )
    folder = Path(out).expanduser()
    extractor = dense_extractor(model, size, layer, device)
    identity = {
        "features": extractor.identity,
        "frames": frames.name,
        "first mask": hashlib.sha256(labels.maps[0].tobytes()).hexdigest(),
        "classes": list(labels.classes),
        "is_binary": labels.is_binary,
        "propagation": [memory, top, neighbourhood, temperature, whiten, radius],
    }
    begin(folder / "segment.json", identity)
    bad = BadFiles(folder / "bad_files.jsonl")
    state = _State(folder / "state", Propagation(memory, top, neighbourhood, temperature))
    bar = Progress(console, "propagating", "frame", 0, frames.count) if console else contextlib.nullcontext()
    done = 0
    with bar as shown:
        for number, (place, frame) in enumerate(_placed(frames), 1):
            if shown:
                shown.update(min(number, frames.count), f"{bad.count} bad" if bad.count else "")
            if reason := _refused(frame, labels, is_first=not done):
                bad.add(frame.key, reason)
                continue
            path = folder / "masks" / f"{place}.png"
            if not path.exists():
                assert frame.pixels is not None
                features_hwD = extractor(frame.pixels)
                if done:
                    propagation, directions = state.at(done)
                    known = propagation.next(directions(features_hwD))
                    maps = upsampled(known.labels, frame.pixels, radius)
                    places_HW, _ = largest(normalised(one) for one in maps)
                    mask_HW = mask_values(labels.classes, labels.is_binary)[places_HW]
                else:
                    known = state.begin(features_hwD, _shares(labels, features_hwD), whiten)
                    mask_HW = labels.maps[0] * np.uint8(OBJECT) if labels.is_binary else labels.maps[0]
                state.save(done, known)
                save_image(mask_HW, path)
            done += 1
    if not done:
        raise UserError(f"{frames.name} holds no frame that can be read; {bad.path} names {bad.count}.")
    names = named(labels.classes, labels.is_binary, class_names)
    pixels = dict.fromkeys(names, 0)
    page: list[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]] = []
    wanted = set(np.linspace(0, done - 1, min(SHOWN, done)).round().astype(int).tolist())

    def pictures() -> Iterator[NDArray[np.uint8]]:
        masked = (
            (place, frame) for place, frame in _placed(frames) if (folder / "masks" / f"{place}.png").exists()
        )
        for number, (place, frame) in enumerate(masked):
            assert frame.pixels is not None
            mask_HW = np.asarray(Image.open(folder / "masks" / f"{place}.png"))
            for value in pixels:
                pixels[value] += int((mask_HW == value).sum())
            picture = overlay(frame.pixels, mask_HW, labels.is_binary)
            if number in wanted:
                page.append((f"frame {number}", frame.pixels, mask_HW))
            yield picture

    write_video(folder / "overlay.mp4", pictures(), frames.rate)
    draw_frames(page, names, labels.is_binary, caption).save(folder / "segment.png")
    shutil.rmtree(state.folder, ignore_errors=True)
    return {
        "targets": done,
        "bad_files": bad.count,
        "out": str(folder),
        "video": str(folder / "overlay.mp4"),
        "picture": str(folder / "segment.png"),
        "pixels": {names[value]: count for value, count in pixels.items()},
    }


def first_frame(frames: Frames) -> Frame:
    """Return the first frame that can be read. Raises UserError where there is none."""
    for frame in frames:
        if frame.pixels is not None:
            return frame
    raise UserError(f"{frames.name} holds no frame that can be read.")


def _placed(frames: Frames) -> Iterator[tuple[str, Frame]]:
    """The frames, and where their results go."""
    places = Places()
    for frame in frames:
        yield places.of(frame.key), frame


def _refused(frame: Frame, labels: Labels, is_first: bool) -> str:
    """Why a frame is left out; "" if it is not."""
    if frame.pixels is None:
        return frame.reason
    size, wanted = (f"{w} x {h} pixels" for h, w in (frame.pixels.shape[:2], labels.maps[0].shape))
    if size == wanted:
        return ""
    if is_first:
        raise UserError(f"The mask has {wanted} and the first frame {size}; they must be the same.")
    return f"{size}, and the first frame has {wanted}"


def _shares(labels: Labels, features_hwD: NDArray[np.float32]) -> NDArray[np.float32]:
    h, w, _ = features_hwD.shape
    return np.stack([patch_shares(labels.maps[0] == number, (h, w)) for number in labels.classes])


class _State:
    """The frames a propagation goes on from, one file each, so that a stopped run can be taken up.

    Args:
        folder: of the files; only those that are needed stay.
        propagation: as it is in memory.
    """

    def __init__(self, folder: Path, propagation: Propagation) -> None:
        self.folder, self.propagation = folder, propagation
        self.directions: Directions | None = None

    def begin(
        self, features_hwD: NDArray[np.float32], labels_Chw: NDArray[np.float32], whiten: bool
    ) -> Labelled:
        """Take the frame whose mask is given, write what the next ones are compared by, and return the frame."""
        width = features_hwD.shape[-1]
        self.directions = (
            Directions.of(features_hwD)
            if whiten
            else Directions(np.zeros(width, np.float32), np.eye(width, dtype=np.float32))
        )
        self._write(self.folder / "directions.npz", self.directions._asdict())
        return self.propagation.begin(Labelled(self.directions(features_hwD), labels_Chw))

    def at(self, number: int) -> tuple[Propagation, Directions]:
        """Return the propagation as it is before a frame, and its directions; what is not in memory is read."""
        if self.directions is None:
            self.directions = Directions(**self._read(self.folder / "directions.npz"))
            memory = self.propagation.last.maxlen or 0
            before = range(max(1, number - memory), number)
            first, *last = (Labelled(**self._read(self._path(one))) for one in (0, *before))
            self.propagation.begin(first)
            self.propagation.last.extend(last)
        return self.propagation, self.directions

    def save(self, number: int, frame: Labelled) -> None:
        """Write a frame, and remove the one that is no longer needed."""
        self._write(self._path(number), frame._asdict())
        # One more than is remembered: the mask of this frame is not written yet.
        old = number - (self.propagation.last.maxlen or 0) - 1
        if old > 0:
            self._path(old).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.npz"

    @staticmethod
    def _write(path: Path, arrays: dict[str, NDArray[np.float32]]) -> None:
        with writing(path), replacing(path) as part, part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def _read(self, path: Path) -> dict[str, NDArray[np.float32]]:
        try:
            with np.load(path) as held:
                return dict(held)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise UserError(
                f"{self.folder.parent} cannot be gone on with: {path} is missing or damaged; choose another --out."
            ) from error
