"""The report of files that could not be read: one line each, kept over restarts."""

from __future__ import annotations

import json
from pathlib import Path

from unlabeled.errors import UserError
from unlabeled.images.decode import SUPPORTED, BadImage, decode
from unlabeled.images.sources import Source


class BadFiles:
    """bad_files.jsonl: {"key": ..., "reason": ...}, each key once, also when a run is resumed.

    The file is made with the first bad file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: set[str] = set()
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.keys.add(json.loads(line)["key"])
                except (json.JSONDecodeError, KeyError):  # a line cut by a crash
                    continue

    @property
    def count(self) -> int:
        """Number of bad files so far."""
        return len(self.keys)

    def add(self, key: str, reason: str) -> None:
        """Note a file, unless it is noted already."""
        if key not in self.keys:
            self.keys.add(key)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "reason": reason}) + "\n")


def first_readable(source: Source, limit: int = 10_000) -> int:
    """Index of the first image that decodes.

    Raises:
        UserError: none of the first `limit` does.
    """
    first = ""
    tried = min(limit, len(source))
    for index in range(tried):
        try:
            sample = source.read(index)
            decode(sample.data)
        except (BadImage, OSError) as error:
            first = first or f"{index if isinstance(error, OSError) else sample.key}: {error}"
        else:
            return index
    raise UserError(f"{source.name} holds no image that can be read ({tried} tried; first {first}). {SUPPORTED}")
