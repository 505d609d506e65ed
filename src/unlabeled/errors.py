"""The one error a user is meant to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake in what the user gave: one line saying what was wrong, where, and what would be right."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the failure of a write (a full disk, no permission) into a UserError that names the place."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or f"{error}; is the disk full?"  # NumPy says only how much it wrote
        raise UserError(f"{path} cannot be written: {reason}") from error


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn the failure of a read (no permission, a name too long) into a UserError that names the place."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
