"""The figures of each step, written when the device has them, while it is at work on the next step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unlabeled.errors import UserError
from unlabeled.metrics import Metrics
from unlabeled.progress import Progress

MAX_SKIPPED = 10  # steps in a row whose loss is not finite before a run stops
LATE = ("cuda",)  # devices that compute while the host goes on


class HostScalars:
    """A step's scalars on their way to the host: they follow the step, and nothing waits for them until `read`.

    Args:
        scalars: each of one element, on one device.
    """

    def __init__(self, scalars: dict[str, Tensor]) -> None:
        self.names = list(scalars)
        values = torch.stack([value.detach().float() for value in scalars.values()])
        self.copied: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self.values = torch.empty(len(values), pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self.values = values

    def read(self) -> dict[str, float]:
        """Their values, when their step is done; steps begun after it are not waited for."""
        if self.copied:
            self.copied.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


@dataclass
class _Step:
    row: dict[str, Any]
    scalars: HostScalars
    read: dict[str, float] | None = None
    seconds: float = 0.0  # from the end of the step before it to its own
    waited: float = 0.0  # of these, by the host for images


class Rows:
    """Rows of metrics; of a device that computes while the host goes on, each is read and written one step late.

    Args:
        metrics: where they go.
        progress: says what is skipped, and shows the loss.
        device: of the scalars.
        batch_size: images of a step, of all ranks.
        checkpoints: the folder that a run which has to stop can go on from.
    """

    def __init__(
        self, metrics: Metrics, progress: Progress, device: torch.device, batch_size: int, checkpoints: Path
    ) -> None:
        self.metrics, self.progress = metrics, progress
        self.late, self.batch_size, self.checkpoints = device.type in LATE, batch_size, checkpoints
        self.skipped = 0
        self.held: _Step | None = None
        self.since, self.waited = time.perf_counter(), 0.0

    def begin(self, row: dict[str, Any], scalars: dict[str, Tensor], waited: float) -> None:
        """Note a step whose work the device has been given; the step before it is written.

        Args:
            row: with "step"; figures may be added until `end`.
            scalars: the step's own, `finite` among them.
            waited: seconds that the host waited for the batch.

        Raises:
            UserError: too many steps in a row were not finite; or the disk is full.
        """
        step = _Step(row, HostScalars(scalars))
        self.waited += waited
        self._write()
        self.held = step
        if not self.late:
            self.settle()

    def settle(self) -> None:
        """Wait for the step to be done, and take its time."""
        step = self.held
        if step and step.read is None:
            step.read, now = step.scalars.read(), time.perf_counter()
            step.seconds, self.since = now - self.since, now
            step.waited, self.waited = self.waited, 0.0

    def end(self, written: bool) -> None:
        """The row is complete; it is in the file when this returns if `written`, or if the device is not late.

        Raises:
            UserError: as `begin`.
        """
        if written or not self.late:
            self._write()

    def go_on(self) -> None:
        """What was done since the last step is no part of the next one's time, if none is under way."""
        if self.held is None:
            self.since = time.perf_counter()

    def _write(self) -> None:
        self.settle()
        step, self.held = self.held, None
        if step is None or step.read is None:
            return
        scalars, number = step.read, step.row["step"]
        self.skipped = 0 if scalars.pop("finite") else self.skipped + 1
        if self.skipped:
            step.row["skipped"] = 1.0
            self.progress.say(f"step {number}: the loss or a gradient is not finite; the step is skipped")
        rate = {"images_per_second": self.batch_size / step.seconds, "data_wait": step.waited / step.seconds}
        self.metrics.add({"step": number} | scalars | step.row | rate)
        text = f"loss {scalars['loss']:.3f}  {rate['images_per_second']:.0f} images/s"
        self.progress.update(number + 1, text)
        if self.skipped == MAX_SKIPPED:
            saved = (
                f"what was saved before is in {self.checkpoints}"
                if any(self.checkpoints.glob("step_*"))
                else "nothing is saved yet"
            )
            raise UserError(
                f"{MAX_SKIPPED} steps in a row had a non-finite loss or gradient (last: {number}); {saved}. "
                "Try a lower optimizer.lr, a lower optimizer.clip, or run.precision float32"
            )
