"""The images that are kept, as DATA: a list of files, or tar shards of their bytes."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np

from unlabeled.atomic import replacing
from unlabeled.curate.blocks import Integers
from unlabeled.errors import UserError, writing
from unlabeled.features.table import content_hash
from unlabeled.images.files import FileSource
from unlabeled.images.sources import IMAGE_SUFFIXES, LIST_NAME, Source
from unlabeled.progress import Progress

SHARD_IMAGES = 4096
SIGNATURES = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
)


def image_suffix(data: bytes) -> str | None:
    """Return the file suffix that encoded bytes call for, by their first bytes; None for no image that is read."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return next((suffix for start, suffix in SIGNATURES if data.startswith(start)), None)


def write_output(
    folder: Path,
    source: Source,
    kept: Integers,
    hashes: list[str],
    *,
    shards: bool,
    progress: Progress | None,
) -> Path:
    """Write the kept images of a source to a folder as DATA, and return it; shards that are there stay.

    kept: ascending indices in the source. hashes: content hash of each. shards: tar shards also where images are files.
    Raises UserError: an image is another than when it was measured, the disk is full.
    """
    as_list = isinstance(source, FileSource) and not shards
    identity = {
        "kept": hashlib.sha256(
            np.ascontiguousarray(kept, np.int64).tobytes() + "".join(hashes).encode()
        ).hexdigest(),
        "as_list": as_list,
    }
    plan = folder / "work" / "output.json"
    if not plan.is_file() or json.loads(plan.read_text()) != identity:
        for old in (folder / LIST_NAME, *folder.glob("curated-*.tar")):
            old.unlink(missing_ok=True)
        with writing(plan), replacing(plan) as part:
            part.write_text(json.dumps(identity))
    if as_list:
        assert isinstance(source, FileSource)
        _write_list(folder / LIST_NAME, source, kept)
        return folder
    for number, start in enumerate(range(0, len(kept), SHARD_IMAGES)):
        shard = folder / f"curated-{number:06}.tar"
        stop = min(len(kept), start + SHARD_IMAGES)
        if not shard.exists():
            with writing(shard), replacing(shard) as part, tarfile.open(part, "w") as archive:
                for place in range(start, stop):
                    _add(archive, source, int(kept[place]), hashes[place])
        if progress:
            progress.update(stop, "")
    return folder


def _write_list(path: Path, source: FileSource, kept: Integers) -> None:
    labels, names = source.labels(), source.class_names
    with (
        writing(path),
        replacing(path) as part,
        part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["path", "label"] if labels is not None else ["path"])
        for index in kept.tolist():
            label = [] if labels is None or names is None else [names[labels[index]]]
            writer.writerow([source.path(index), *label])


def _add(archive: tarfile.TarFile, source: Source, index: int, expected: str) -> None:
    """Add an image, and its class and key as .json."""
    try:
        sample = source.read(index)
    except OSError as error:
        raise UserError(f"Image {index} of {source.name} cannot be read any more: {error}") from error
    if content_hash(sample.data) != expected:
        raise UserError(f"{sample.key} of {source.name} is another image now than when it was measured.")
    suffix = Path(sample.key).suffix.lower()
    suffix = image_suffix(sample.data) or (suffix if suffix in IMAGE_SUFFIXES else ".jpg")
    notes: dict[str, str] = {"key": sample.key}
    if sample.label is not None:
        notes["label"] = source.class_names[sample.label] if source.class_names else str(sample.label)
    add_member(archive, f"{index:09}{suffix}", sample.data)
    add_member(archive, f"{index:09}.json", json.dumps(notes).encode())


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to an archive, the same bytes at every run."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
