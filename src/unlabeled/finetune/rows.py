"""A prediction as a row: of the journal that is written as images are done, and of the table at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

from unlabeled.errors import writing
from unlabeled.weights.files import replacing

TOP = 5  # classes of an image that are written


class Row(TypedDict, total=False):
    """A line of predictions.jsonl."""

    index: int
    key: str
    file: str  # of a mask or of depth, below the folder
    top: list[tuple[str, float]]
    label: str | None
    width: int
    height: int
    shares: dict[str, float]  # of the pixels, by class
    metres: tuple[float, float, float]  # nearest, median, farthest


def kept_rows(journal: Path) -> list[Row]:
    """Return the rows that are done; a last line that a crash has cut is taken off the file."""
    if not journal.exists():
        return []
    held = journal.read_bytes()
    whole = held[: held.rfind(b"\n") + 1]
    if len(whole) < len(held):
        with writing(journal), replacing(journal) as part:
            part.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def flat(row: Row) -> dict[str, Any]:
    """Return a row of the table: one column for one thing."""
    held: dict[str, Any] = {"key": row["key"]}
    if "top" in row:
        for number in range(TOP):
            name, probability = row["top"][number] if number < len(row["top"]) else (None, None)
            ending = f"_{number + 1}" if number else ""
            held |= {f"class{ending}": name, f"probability{ending}": probability}
        return held | {"label": row.get("label")}
    held |= {"file": row["file"], "width": row["width"], "height": row["height"]}
    if "metres" in row:
        return held | dict(zip(("nearest", "median", "farthest"), row["metres"], strict=True))
    name = max(row["shares"], key=lambda one: row["shares"][one])
    return held | {"class": name, "share": row["shares"][name]}
