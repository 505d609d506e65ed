"""The report of files that could not be read: one line each, kept over restarts."""

from __future__ import annotations

import json
from pathlib import Path

from unlabeled.errors import UserError, writing
from unlabeled.images.decode import SUPPORTED, BadImage, decode
from unlabeled.images.files import FileSource
from unlabeled.images.sources import Source, printable


class BadFiles:
    """bad_files.jsonl: {"key": ..., "reason": ...}, each key once, also when a run is resumed or has several
    ranks.

    The file is made with the first bad file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: set[str] = set()
        self._read_to = 0
        self._catch_up()

    @property
    def count(self) -> int:
        """Number of bad files so far."""
        return len(self.keys)

    def catch_up(self) -> int:
        """Read what other processes noted; the number of bad files now."""
        self._catch_up()
        return self.count

    def add(self, key: str, reason: str) -> None:
        """Note a file, unless it is noted already."""
        if key in self.keys:
            return
        # Another rank may have met it since.
        unfinished = self._catch_up()
        if key not in self.keys:
            self.keys.add(key)
            line = json.dumps({"key": key, "reason": reason}) + "\n"
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab") as file:
                    file.write((b"\n" if unfinished else b"") + line.encode())

    def _catch_up(self) -> bool:
        """Read the lines that are new in the file; whether the last one is unfinished."""
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            new = file.read()
        whole = new.rfind(b"\n") + 1
        self._read_to += whole
        for line in new[:whole].splitlines():
            try:
                self.keys.add(json.loads(line)["key"])
            except (ValueError, KeyError, TypeError):  # a line cut by a crash
                continue
        return whole < len(new)


def name_of(source: Source, index: int) -> str:
    """Return what to call an image that could not be read at all: a file's path as its key has it, else its number."""
    return printable(source.paths[index]) if isinstance(source, FileSource) else f"image {index}"


def first_readable(source: Source, limit: int = 10_000) -> int:
    """Index of the first image that decodes.

    Raises:
        UserError: none of the first `limit` does.
    """
    first = ""
    tried = min(limit, len(source))
    for index in range(tried):
        key = name_of(source, index)
        try:
            sample = source.read(index)
            key = sample.key
            decode(sample.data)
        except (BadImage, OSError) as error:
            first = first or f"{key}: {error}"
        else:
            return index
    raise UserError(
        f"{source.name} holds no image that can be read ({tried} files tried; first: {first}). {SUPPORTED}"
    )
