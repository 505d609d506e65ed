"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class TrainingProgress:
    """A progress bar with loss, rate and time left; about twenty lines in all where the output is no terminal."""

    def __init__(self, console: Console, start: int, total: int) -> None:
        self.console, self.total, self.start = console, total, start
        self.every = max(1, total // 20)
        self.begun = time.monotonic()
        self.bar: Progress | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("pretraining"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("[cyan]{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task("steps", total=total, completed=start, text="")

    def __enter__(self) -> TrainingProgress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: int, row: dict[str, float]) -> None:
        """Show that `done` steps are done, the last with these figures."""
        text = f"loss {row['loss']:.3f}  {row['images_per_second']:.0f} images/s"
        if self.bar:
            self.bar.update(self.task, completed=done, text=text)
        elif done % self.every == 0 or done == self.total:
            left = (time.monotonic() - self.begun) / (done - self.start) * (self.total - done)
            self.console.print(f"step {done}/{self.total}  {text}  {left:.0f} s left", highlight=False)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False)
