"""Long work that is asked to stop does so at the next good place."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedBySignal(Exception):  # noqa: N818  (no error: the work is whole and can go on)
    """Work was asked to stop, has written what it needs to go on, and says how.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are noted, and acted on when the step is done; a second one stops at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread (a notebook server, a test): signals stay with their owner
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_with_parent(every: float = 1.0) -> None:
    """Send this process SIGTERM when the one that started it has ended, so that it stops as if asked to.

    A torchrun that is killed cannot end its ranks, which would train on.

    every: seconds between two looks.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stop with parent", daemon=True).start()
