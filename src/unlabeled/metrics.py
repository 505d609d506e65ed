"""The figures of a run: metrics.jsonl, one row a step, and the same as TensorBoard events."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from unlabeled.errors import UserError, writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Metrics:
    """Writes rows; a resumed run first drops the rows of steps that will be done again.

    Args:
        folder: the run folder.
        start: the first step that will be written.
        writes: False on ranks other than 0.

    Raises:
        UserError: here and in every method, the disk is full or the folder cannot be written.
    """

    def __init__(self, folder: Path, start: int, writes: bool) -> None:
        self.writer: SummaryWriter | None = None
        self.file = None
        self.hook = threading.excepthook
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        with writing(folder):
            _keep_before(self.path, start)
            self.file = self.path.open("a", encoding="utf-8")
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)

    def __enter__(self) -> Metrics:
        self.hook, threading.excepthook = threading.excepthook, self._in_thread
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close(error)
        finally:
            threading.excepthook = self.hook

    def _in_thread(self, error: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread hands a full disk on to `add`, and raises it too: said once is enough."""
        is_theirs = type(error.thread).__module__.startswith("tensorboard")
        if not (is_theirs and isinstance(error.exc_value, OSError)):
            self.hook(error)

    def _close(self, error: BaseException | None) -> None:
        if not (self.file and self.writer):
            return
        for part in (self.file, self.writer):
            try:
                with writing(self.path.parent):
                    part.close()
            except UserError:  # closing writes what is left; what stopped the run says more
                if error is None:
                    raise

    def add(self, row: dict[str, Any]) -> None:
        """One step's row; it is in the file when this returns."""
        if not (self.file and self.writer):
            return
        # JSON has no NaN: a figure that is not finite is null.
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with writing(self.path.parent):
            self.file.write(json.dumps(finite) + "\n")
            self.file.flush()
            for name, value in finite.items():
                if name != "step" and value is not None:
                    self.writer.add_scalar(name, value, row["step"])

    def flush(self) -> None:
        """On the disk, before a checkpoint counts on it."""
        if self.file:
            with writing(self.path):
                os.fsync(self.file.fileno())


def _keep_before(path: Path, start: int) -> None:
    """A crash may have cut the last line, and may have come after rows later than the checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] >= start:
            break
        kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
