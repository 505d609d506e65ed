"""Schedules as pure functions of the step; every length is given in steps, every value is exact at the ends."""

from __future__ import annotations

import math


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step total - 1 (and beyond)."""
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total - 1))))
    return share * start + (1 - share) * end


def linear_warmup(step: int, warmup: int, start: float, end: float) -> float:
    """Linear from `start` at step 0 to `end` at step `warmup` and beyond."""
    return end if step >= warmup else start + (end - start) * step / warmup


def cosine_warmup(step: int, total: int, warmup: int, start: float, peak: float, end: float) -> float:
    """Linear from `start` at step 0 to `peak` at step `warmup`, then half a cosine to `end` at step total - 1."""
    if step < warmup:
        return linear_warmup(step, warmup, start, peak)
    return cosine(step - warmup, total - warmup, peak, end)
