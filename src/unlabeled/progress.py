"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

import rich.progress as bars
from rich.console import Console


class Progress:
    """A progress bar with figures and time left; about twenty lines in all where the output is no terminal.

    Args:
        console: where to.
        title: of the work, a word.
        unit: what is counted, one of it.
        start: units that are done already.
        total: units.
    """

    def __init__(self, console: Console, title: str, unit: str, start: int, total: int) -> None:
        self.console, self.unit, self.total, self.start = console, unit, total, start
        self.every = max(1, total // 20)
        self.shown = start // self.every
        self.begun = time.monotonic()
        self.bar: bars.Progress | None = None
        if console.is_terminal:
            self.bar = bars.Progress(
                bars.TextColumn(title),
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TextColumn("[cyan]{task.fields[text]}"),
                bars.TimeElapsedColumn(),
                bars.TextColumn("left"),
                bars.TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task(unit, total=total, completed=start, text="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, done: int, text: str) -> None:
        """Show that `done` units are done, with figures of the last ones."""
        if self.bar:
            self.bar.update(self.task, completed=done, text=text)
        elif done // self.every > self.shown or done == self.total:
            self.shown = done // self.every
            left = (time.monotonic() - self.begun) / max(1, done - self.start) * (self.total - done)
            self.say(f"{self.unit} {done}/{self.total}  {text}  {left:.0f} s left")

    def say(self, text: str) -> None:
        """A line above the bar, as it stands: names may have brackets, and a log has lines of any length."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
